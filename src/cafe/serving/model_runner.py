"""Run the model for jobs: read some of them in one pass, and decode a token of every running chat."""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from cafe.lvlm.families import find_vision_tower
from cafe.lvlm.forward import compute_logits, forward_packed
from cafe.lvlm.slot_cache import KeyValues, read_slots, select_key_values
from cafe.lvlm.vision_cache import VisionCache
from cafe.model import Cafe
from cafe.packing import pack_with_layout
from cafe.serving.chats import ChatBatch, RunningChat, SlotChats, StaticChats
from cafe.serving.config import EngineConfig
from cafe.serving.jobs import ChatJob, EmbedJob, EngineError, Job, ScoreJob
from cafe.serving.metrics import Metrics
from cafe.serving.prefixes import PrefixCache
from cafe.serving.sampling import choose_tokens

logger = logging.getLogger(__name__)


class ModelRunner:
    """Read jobs and decode chats on one model. All methods are called in one thread.

    Where the model can share prefixes, chats join and leave one running batch, and a job about images that were read
    lately continues from their keys and values. Elsewhere, chats that are read together stay together.

    Attributes:
        num_failures: jobs that the model could not do although they were alone.
    """

    def __init__(self, model: Cafe, config: EngineConfig, metrics: Metrics) -> None:
        self.model, self.metrics = model, metrics
        # What tells a family whose layers see a token's own sequence alone, as slots need.
        self.can_join = model.packing.share_prefixes
        self.slots = SlotChats(model)
        self.static: list[StaticChats] = []
        self.prefixes = PrefixCache(config.cache_bytes // 3, metrics)
        tower = find_vision_tower(model.lvlm)
        self.features: VisionCache | None = None
        if tower is not None and config.cache_bytes:
            seed, max_bytes = secrets.randbits(63), config.cache_bytes // 3
            self.features = VisionCache(tower, model.lvlm.config, max_bytes=max_bytes, seed=seed)
        self.num_failures = 0

    @property
    def batches(self) -> list[ChatBatch]:
        """Return the batches of running chats."""
        return [self.slots, *self.static]

    @property
    def num_chats(self) -> int:
        """Return the number of running chats."""
        return sum(len(batch.chats) for batch in self.batches)

    @property
    def longest_chat(self) -> int:
        """Return the tokens of the longest running chat, with the whole of its answer; 0 if none runs."""
        return max((chat.job.max_length for batch in self.batches for chat in batch.chats), default=0)

    @torch.inference_mode()
    def read(self, jobs: Sequence[Job]) -> None:
        """Read jobs: embeddings and scores are done then, and chats run."""
        # No other thread runs the tower, of which `enabled` replaces the forward pass.
        seen: AbstractContextManager[Any] = self.features.enabled() if self.features else nullcontext()
        with seen:
            # Jobs with a prefix are read by themselves, because a pack begins with nothing.
            if self.can_join:
                # Looked up before any is read: what is read now is of use for later jobs alone.
                prefixes = {job: prefix for job in jobs if (prefix := self.prefixes.get(job)) is not None}
                self._isolated([job for job in jobs if job not in prefixes], self._read_packed)
                self._isolated(list(prefixes), lambda some: self._read_continued({job: prefixes[job] for job in some}))
            else:
                self._isolated([job for job in jobs if isinstance(job, ChatJob)], self._read_static)
                self._isolated([job for job in jobs if not isinstance(job, ChatJob)], self._read_packed)

    @torch.inference_mode()
    def decode(self) -> None:
        """Decode one token of every running chat."""
        for batch in self.batches:
            if not batch.chats:
                continue
            logits = None
            try:
                logits = batch.next_logits(0, len(batch.chats))
            except Exception:
                logger.exception("%d chats cannot be decoded together.", len(batch.chats))
            # Not in the handler: until its end, the error holds the memory that the pass had taken.
            if logits is None:
                self._decode_one_by_one(batch)
            else:
                self._advance(batch, 0, logits)
        self._forget_empty()

    @torch.inference_mode()
    def drop(self, is_over: Callable[[Job], bool]) -> None:
        """Take out the chats of which a function says that they are over."""
        for batch in self.batches:
            for index in reversed(range(len(batch.chats))):
                if is_over(batch.chats[index].job):
                    batch.remove(index)
        self._forget_empty()

    def _isolated(self, jobs: Sequence[Job], read: Callable[[Sequence[Job]], None]) -> None:
        """Read jobs together, or each half of them if that fails, and so on, so that one of them fails alone."""
        if not jobs:
            return
        num_running = len(self.slots.chats)
        try:
            read(jobs)
            return
        except Exception:
            logger.exception("%d jobs cannot be read.", len(jobs))
        # Not in the handler: until its end, the error holds the memory that the pass had taken.
        self.slots.truncate(num_running)
        if len(jobs) == 1:
            self._fail(jobs[0])
            return
        half = len(jobs) // 2
        self._isolated(jobs[:half], read)
        self._isolated(jobs[half:], read)

    def _read_packed(self, jobs: Sequence[Job]) -> None:
        """Read jobs in one pass, in which what they begin with in common is read once."""
        lvlm = self.model.lvlm
        packed, layout = pack_with_layout([[job.branch] for job in jobs], [[]] * len(jobs), self.model.packing)
        # Keys and values are kept where something continues from them: an answer, or later jobs on the same images.
        keeps_any = self.can_join and any(isinstance(job, ChatJob) or job.prefix_length > 0 for job in jobs)
        cache = DynamicCache(config=lvlm.config.get_text_config()) if keeps_any else None
        hidden, _ = forward_packed(lvlm, packed, cache)
        _check_finite(hidden)
        kept: dict[Job, KeyValues] = {}
        if cache is not None:
            for job, coords in zip(jobs, layout.coords, strict=True):
                if isinstance(job, ChatJob):
                    kept[job] = select_key_values(cache, coords)
                if self.prefixes.is_new(job):
                    self.prefixes.put(job, select_key_values(cache, coords[: job.prefix_length]))
        self.metrics.tokens.labels(kind="read").inc(packed.num_tokens)

        # Chats run from now on, and the logits of all their first tokens are computed at once.
        self._finish(jobs, hidden)
        first = len(self.slots.chats)
        rows = [row for row, job in enumerate(jobs) if isinstance(job, ChatJob)]
        for row in rows:
            job = jobs[row]
            assert isinstance(job, ChatJob)
            self.slots.join(RunningChat(self.model, job), kept[job])
        if rows:
            self._advance(self.slots, first, compute_logits(lvlm, hidden[rows]))

    def _read_continued(self, prefixes: dict[Job, KeyValues]) -> None:
        """Read the rest of jobs whose prefixes were read before, each in a slot."""
        lvlm, cache, first = self.model.lvlm, self.slots.cache, len(self.slots.chats)
        # Chats come first: they stay in their slots, and the others leave theirs.
        jobs = sorted(prefixes, key=lambda job: not isinstance(job, ChatJob))
        tokens, positions = [], []
        for job in jobs:
            job.cached_tokens = job.prefix_length
            tokens.append(job.branch.input_ids[job.cached_tokens :])
            # Under M-RoPE, positions behind an image depend on it, so they are those of the whole branch.
            positions.append(self.model.packing.position_ids_fn(job.branch)[:, job.cached_tokens :].T)
            cache.join(prefixes[job], room=len(tokens[-1]))
        hidden = read_slots(
            lvlm,
            cache,
            first,
            [len(rest) for rest in tokens],
            pad_sequence(tokens, batch_first=True),
            pad_sequence(positions, batch_first=True).movedim(2, 0),
        )
        _check_finite(hidden)
        self.metrics.tokens.labels(kind="read").inc(sum(map(len, tokens)))

        # The slots behind the chats' were needed for this pass alone.
        chats = [job for job in jobs if isinstance(job, ChatJob)]
        self.slots.chats += [RunningChat(self.model, job) for job in chats]
        self.slots.truncate(len(self.slots.chats))
        self._finish(jobs, hidden)
        if chats:
            self._advance(self.slots, first, compute_logits(lvlm, hidden[: len(chats)]))

    def _read_static(self, jobs: Sequence[Job]) -> None:
        """Read chats that stay together."""
        chats = [RunningChat(self.model, job) for job in jobs if isinstance(job, ChatJob)]
        batch = StaticChats(self.model, chats)
        logits = batch.prefill()
        self.static.append(batch)
        self.metrics.tokens.labels(kind="read").inc(sum(len(job.branch) for job in jobs))
        self._advance(batch, 0, logits)
        self._forget_empty()

    def _finish(self, jobs: Sequence[Job], hidden: Float[Tensor, "jobs dim"]) -> None:
        """Set the results of jobs of which one hidden state is the answer."""
        # One transfer for all, which a GPU is waited for; in float32, as embeddings are sent.
        vectors = F.normalize(hidden.float(), dim=-1).cpu().numpy()
        scored = [(row, job) for row, job in enumerate(jobs) if isinstance(job, ScoreJob)]
        for row, job in enumerate(jobs):
            if isinstance(job, EmbedJob):
                job.resolve(vectors[row])
        if scored:
            logits = compute_logits(self.model.lvlm, hidden[[row for row, _ in scored]]).cpu().numpy()
            for (_, job), row_logits in zip(scored, logits, strict=True):
                job.resolve(row_logits[list(job.token_ids)])

    def _decode_one_by_one(self, batch: ChatBatch) -> None:
        """Decode each chat of a batch by itself, after an error; those that fail again are given up."""
        # From the last one on, because the last chat takes the place of one that is given up.
        for index in reversed(range(len(batch.chats))):
            try:
                if not batch.can_retry:
                    raise EngineError
                logits = batch.next_logits(index, index + 1)
            except Exception:
                self._fail(batch.chats[index].job)
                batch.remove(index)
            else:
                self._advance(batch, index, logits)

    def _advance(self, batch: ChatBatch, first: int, logits: Float[Tensor, "chats vocabulary"]) -> None:
        """Choose the next tokens of some chats of a batch, and take out those that are complete."""
        # The list of the batch changes while chats are taken out of it, and this one does not.
        now = time.monotonic()
        chats = batch.chats[first : first + len(logits)]
        tokens = choose_tokens(logits, [chat.chooser for chat in chats])
        self.metrics.tokens.labels(kind="generated").inc(len(tokens))
        # From the last one on, because the last chat takes the place of one that leaves.
        for index in reversed(range(len(chats))):
            if not self._push(chats[index], tokens[index], now):
                batch.remove(first + index)

    def _push(self, chat: RunningChat, token: int | EngineError, now: float) -> bool:
        """Give a chat its next token, or fail it; return whether it still runs."""
        try:
            if isinstance(token, EngineError):
                raise token
            self._observe(chat, now)
            chat.push(token)
        except Exception:
            logger.exception("A chat cannot be continued.")
            self._fail(chat.job)
            return False
        if chat.finish_reason is None:
            return True
        chat.job.resolve(chat.finish_reason)
        return False

    def _observe(self, chat: RunningChat, now: float) -> None:
        """Measure how long a token was waited for."""
        if chat.num_tokens:
            self.metrics.token_seconds.observe(now - chat.last_token_at)
        else:
            self.metrics.first_token_seconds.observe(now - chat.job.created)

    def _fail(self, job: Job) -> None:
        """Give up a job that the model cannot do."""
        self.num_failures += 1
        job.resolve(EngineError("The model cannot do this job."))

    def _forget_empty(self) -> None:
        """Forget batches in which no chat runs any more."""
        self.static = [batch for batch in self.static if batch.chats]


def _check_finite(hidden: Float[Tensor, "jobs dim"]) -> None:
    """Make sure that no job gave numbers that are not finite: they spread to others that are read with it.

    A mask does not keep them apart, because nothing times NaN is NaN. What such a pass made is not kept.

    Raises:
        EngineError: one did.
    """
    if not hidden.isfinite().all():
        raise EngineError("The model's numbers are not finite.")
