"""Chats that are decoded together: one token for each at a time, as they join and leave."""

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from cafe.lvlm.forward import compute_logits
from cafe.lvlm.generation import collate_to_device
from cafe.lvlm.slot_cache import KeyValues, SlotCache, read_slots
from cafe.model import Cafe
from cafe.serving.answer_text import AnswerText
from cafe.serving.jobs import ChatJob, FinishReason, Piece
from cafe.serving.sampling import TokenChooser


class RunningChat:
    """Hold the state of one answer.

    Attributes:
        job: what is answered.
        chooser: chooses its tokens.
        next_token: the last token that was chosen, which the model reads next.
        num_tokens: tokens of the answer so far.
        position: the position id of the next token; under M-RoPE the same on all of its axes.
        num_axes: the axes of position ids.
        finish_reason: None while the answer is not complete.
        last_token_at: the time of the last token, of `time.monotonic`; 0 before the first.
    """

    def __init__(self, model: Cafe, job: ChatJob) -> None:
        self.job = job
        self.chooser = TokenChooser(job.sampling, job.branch.input_ids.tolist(), model.lvlm.generation_config)
        self.next_token = 0
        self.num_tokens = 0
        # An image has fewer positions than tokens under M-RoPE, so they do not follow from the length.
        position_ids = model.packing.position_ids_fn(job.branch)
        self.position, self.num_axes = int(position_ids.max()) + 1, len(position_ids)
        # Nothing of an answer is there until the prompt was read.
        self.finish_reason: FinishReason | None = None
        self.last_token_at = 0.0
        self._text = AnswerText(model.chat_processor.tokenizer, job.sampling.stop)
        self._end_tokens = end_tokens(model)

    def push(self, token: int) -> None:
        """Take the next token of the answer, and pass on what can be shown of it."""
        self.num_tokens += 1
        self.next_token, self.last_token_at = token, time.monotonic()
        self.chooser.append(token)
        # The token that ends a turn is no part of its text.
        text = ""
        if token in self._end_tokens:
            self.finish_reason = "stop"
        else:
            text = self._text.push(token)
            if self._text.stopped:
                self.finish_reason = "stop"
            elif self.num_tokens >= self.job.sampling.max_tokens:
                self.finish_reason = "length"
        if self.finish_reason:
            text += self._text.finish()
        if text or self.finish_reason:
            self.job.on_piece(Piece(text, self.num_tokens, self.finish_reason))


def end_tokens(model: Cafe) -> frozenset[int]:
    """Return the tokens that end an answer."""
    end = model.lvlm.generation_config.eos_token_id
    return frozenset([end] if isinstance(end, int) else end or [])


class ChatBatch(Protocol):
    """Chats whose next tokens are computed in one forward pass."""

    chats: list[RunningChat]
    can_retry: bool  # whether some of them can be read again after an error

    def next_logits(self, start: int, stop: int) -> Float[Tensor, "chats vocabulary"]:
        """Read the last token of some chats, and return the logits of the next."""

    def remove(self, index: int) -> None:
        """Take a chat out; the order of the others may change."""


class SlotChats:
    """Chats that join and leave at any time, each with a slot of its own in one cache."""

    can_retry = True

    def __init__(self, model: Cafe) -> None:
        self.model = model
        self.chats: list[RunningChat] = []
        # Slot i is chat i's; both move together when one leaves.
        self.cache = SlotCache(model.lvlm.config.get_text_config().num_hidden_layers)

    def join(self, chat: RunningChat, key_values: KeyValues) -> None:
        """Add a chat whose prompt was read."""
        self.cache.join(key_values)
        self.chats.append(chat)

    def next_logits(self, start: int, stop: int) -> Float[Tensor, "chats vocabulary"]:
        """Read the last token of some chats, and return the logits of the next."""
        chats = self.chats[start:stop]
        tokens = torch.tensor([[chat.next_token] for chat in chats])
        # Answers are words, whose positions are the same on all axes of M-RoPE.
        positions = torch.tensor([[chat.position] for chat in chats]).expand(chats[0].num_axes, -1, -1)
        lengths = list(self.cache.lengths)
        try:
            hidden = read_slots(self.model.lvlm, self.cache, start, [1] * len(chats), tokens, positions)
            logits = compute_logits(self.model.lvlm, hidden)
        except Exception:
            # The same tokens may be read again, to the same places.
            self.cache.lengths = lengths
            raise
        for chat in chats:
            chat.position += 1
        return logits

    def remove(self, index: int) -> None:
        """Take a chat out; the last one moves into its slot."""
        # As the cache does with its slots, so that both stay in the same order.
        self.cache.leave(index)
        last = self.chats.pop()
        if index < len(self.chats):
            self.chats[index] = last

    def truncate(self, num_chats: int) -> None:
        """Keep the first chats and their slots alone."""
        del self.chats[num_chats:]
        while len(self.cache.lengths) > num_chats:
            self.cache.leave(len(self.cache.lengths) - 1)


class StaticChats:
    """Chats that were read together and stay together until all are done.

    For families whose layers see more than a token's own sequence: sliding windows, linear attention, prefix-LMs.
    """

    can_retry = False

    def __init__(self, model: Cafe, chats: Sequence[RunningChat]) -> None:
        self.model = model
        self.chats: list[RunningChat] = []
        self._rows = list(chats)  # of the cache; those that left stay, because the caches of some layers lose no rows
        self._cache = DynamicCache(config=model.lvlm.config.get_text_config())

    def prefill(self) -> Float[Tensor, "chats vocabulary"]:
        """Read the prompts, and return the logits of the first tokens. All chats run from now on."""
        inputs = collate_to_device(self.model.lvlm, self.model.chat_processor, [chat.job.branch for chat in self._rows])
        # Prompts are padded on the left, so all rows continue in the same column.
        self._mask, self._positions = inputs["attention_mask"], inputs["position_ids"][..., -1:]
        self.chats = list(self._rows)
        return self._read(inputs)

    def next_logits(self, start: int, stop: int) -> Float[Tensor, "chats vocabulary"]:
        """Read the last token of all chats, and return the logits of the next."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        self._positions = self._positions + 1
        tokens = torch.tensor([[chat.next_token] for chat in self._rows], device=self._mask.device)
        inputs = {"input_ids": tokens, "attention_mask": self._mask, "position_ids": self._positions}
        return self._read(inputs)[[self._rows.index(chat) for chat in self.chats]]

    def remove(self, index: int) -> None:
        """Take a chat out; its row is read on until all chats are done."""
        del self.chats[index]

    def _read(self, inputs: dict[str, Tensor]) -> Float[Tensor, "rows vocabulary"]:
        """Read tokens of all rows, and return the logits behind the last."""
        output = self.model.lvlm(**inputs, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[:, -1].float()
        return logits
