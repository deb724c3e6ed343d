"""Examples -> contrastive batches of token sequences, made in loader workers.

The order is fixed by the seed. A bad record is left out of its batch, written to the quarantine file with its reason,
and counted: too large a share of them stops the run.
"""

import copy
import hashlib
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated

import torch
from jaxtyping import Float32, Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from cafe.content import Content, Dialogue, Example, ImageRef, Turn
from cafe.data.mixture import EpochOrder, Mixture, epoch_order
from cafe.data.records import OpenedSource
from cafe.errors import CafeError
from cafe.lvlm.processing import ChatProcessor, ProcessedImages
from cafe.lvlm.prompts import dialogue_messages, embedding_messages
from cafe.packing import DEFAULT_PACKING, Branch, PackedBatch, PackingConfig, count_crops, count_unique_tokens, pack
from cafe.utils.dataloader import make_loader
from cafe.utils.ranges import Above


@dataclass(frozen=True)
class MicroBatch:
    """Some examples of a contrastive batch, laid out for the model.

    Attributes:
        joint: all their branches.
        embedding_only: the embedded branches alone, for the gradient cache's first phase; `joint` itself where they are all, and
            in the first micro-batch, which is read once.
        embedding_slots: the place of each readout among the batch's embeddings.
    """

    joint: PackedBatch
    embedding_only: PackedBatch
    embedding_slots: Int64[Tensor, " readouts"]

    def pin_memory(self) -> "MicroBatch":
        """See `PackedBatch`."""
        joint = self.joint.pin_memory()
        embed = joint if self.embedding_only is self.joint else self.embedding_only.pin_memory()
        return MicroBatch(joint, embed, self.embedding_slots.pin_memory())


@dataclass(frozen=True)
class Batch:
    """One contrastive batch. Its embeddings are those of all queries, then of all targets, then of all hard negatives.

    Attributes:
        micro_batches: what goes through the model at once.
        target_ids: equal numbers for pairs with equal targets.
        negative_owner: the pair that each hard negative belongs to.
        negative_match_prob: how likely each hard negative matches its pair's query after all.
        negative_ids: as `target_ids`, for the hard negatives.
        num_supervised: the number of tokens that the language loss is taken on.
        bad_records: the messages of records left out.
        record_names: the file and record of each example.
    """

    micro_batches: list[MicroBatch]
    target_ids: Int64[Tensor, " pairs"]
    negative_owner: Int64[Tensor, " negatives"]
    negative_match_prob: Float32[Tensor, " negatives"]
    negative_ids: Int64[Tensor, " negatives"]
    num_supervised: int
    bad_records: list[str]
    record_names: list[str]

    def pin_memory(self) -> "Batch":
        """See `PackedBatch`; PyTorch's loader calls it, in a thread of its own."""
        micro_batches = [micro_batch.pin_memory() for micro_batch in self.micro_batches]
        names = ("target_ids", "negative_owner", "negative_match_prob", "negative_ids")
        tensors = {name: getattr(self, name).pin_memory() for name in names}
        return replace(self, micro_batches=micro_batches, **tensors)


@dataclass(frozen=True)
class MicroBatchSize:
    """How much goes through the model at once; None for no limit.

    Attributes:
        tokens: what branches share counts once, padding not at all.
        crops: pictures, or the parts into which they are cut, for the vision tower.
    """

    tokens: Annotated[int | None, Above(0)] = None
    crops: Annotated[int | None, Above(0)] = None

    def within(self, other: "MicroBatchSize") -> "MicroBatchSize":
        """No more than either of two."""
        limits = zip(astuple(self), astuple(other), strict=True)
        return MicroBatchSize(*(min(filter(None, both), default=None) for both in limits))


@dataclass(frozen=True)
class EncodedExample:
    """The token sequences of one example."""

    query: Branch | None
    target: Branch | None
    negatives: list[Branch]
    negative_match_prob: Sequence[float]
    target_id: int
    negative_ids: list[int]
    dialogue: Branch | None

    @property
    def all(self) -> list[Branch]:
        """All of them that there are."""
        return [branch for branch in (self.query, self.target, *self.negatives, self.dialogue) if branch]


def encode_example(example: Example, chat_processor: ChatProcessor, max_tokens: int | None = None) -> EncodedExample:
    """Decodes an example's images and renders its branches; an image is decoded and processed once for all of them.

    Raises:
        CafeError: an image is missing or damaged, or its tokens do not fit; the record is named.
    """
    try:
        return _encode_example(example, chat_processor, max_tokens)
    except CafeError as error:
        raise CafeError(f"{example.origin}: {error}") from None


def _encode_example(example: Example, chat_processor: ChatProcessor, max_tokens: int | None) -> EncodedExample:
    done: dict[tuple[int, ...], ProcessedImages] = {}

    def pictures(refs: Sequence[ImageRef]) -> ProcessedImages:
        key = tuple(map(id, refs))
        if key not in done:
            done[key] = chat_processor.load_images(refs)
        return done[key]

    def embedding(content: Content) -> Branch:
        messages = embedding_messages(content, chat_processor.prompts)
        return chat_processor.encode_embedding(messages, pictures(content.images), max_tokens)

    query = target = dialogue = None
    negatives: list[Branch] = []
    scores: Sequence[float] = []
    target_id, negative_ids = 0, []
    if example.pair:
        query, target = embedding(example.pair.query), embedding(example.pair.target)
        negatives = [embedding(negative) for negative in example.pair.negatives]
        scores = example.pair.negative_scores or [0.0] * len(negatives)
        target_id = content_hash(example.pair.target)
        negative_ids = [content_hash(negative) for negative in example.pair.negatives]
    if example.dialogue:
        refs = [ref for turn in example.dialogue.turns for ref in turn.content.images]
        messages = dialogue_messages(example.dialogue, chat_processor.prompts)
        dialogue = chat_processor.encode_dialogue(messages, pictures(refs), max_tokens)
    return EncodedExample(query, target, negatives, scores, target_id, negative_ids, dialogue)


def content_hash(content: Content) -> int:
    """A number that is equal for equal contents, across processes."""
    digest = hashlib.blake2b(digest_size=7)
    for part in content.parts:
        digest.update(str(part).encode() + b"\0")
        source = part.source if isinstance(part, ImageRef) else None
        if isinstance(source, bytes):
            digest.update(source)
        elif isinstance(source, Image.Image):
            digest.update(f"{source.size}".encode() + source.tobytes())
    return int.from_bytes(digest.digest())


NUM_CHECKED_RECORDS = 100  # records, for what is trained
NO_LIMIT = MicroBatchSize()
PROPORTIONAL = Mixture()


class ContrastiveBatchDataset(Dataset[Batch]):
    """Contrastive batch number n of a run, the same for the same seed whichever worker makes it.

    Args:
        sources: the opened sources.
        chat_processor: renders and tokenizes.
        batch_size: pairs of a batch in each process.
        seed: of the order and of every choice within records.
        max_tokens: the longest sequence.
        contrast, language: whether to make the branches of each loss.
        hard_negatives: whether to use the records' hard negatives.
        packing: how branches become packs.
        micro_batch_size: how much goes through the model at once.
        rank, world_size: which of several processes this is; each takes its own part of every batch.
        mixture: how the sources make one stream.
        blanks: show a blank picture, to which nothing comes, in each micro-batch that has none: where the model is
            sharded over processes, each of them must run the vision tower as often as any.
    """

    def __init__(
        self,
        sources: Sequence[OpenedSource],
        chat_processor: ChatProcessor,
        batch_size: int,
        seed: int,
        max_tokens: int | None = None,
        *,
        contrast: bool = True,
        language: bool = True,
        hard_negatives: bool = True,
        packing: PackingConfig = DEFAULT_PACKING,
        micro_batch_size: MicroBatchSize = NO_LIMIT,
        rank: int = 0,
        world_size: int = 1,
        mixture: Mixture = PROPORTIONAL,
        blanks: bool = False,
    ) -> None:
        self.sources, self.chat_processor, self.batch_size, self.seed = list(sources), chat_processor, batch_size, seed
        self.max_tokens, self.contrast, self.language, self.hard_negatives = (
            max_tokens,
            contrast,
            language,
            hard_negatives,
        )
        self.packing, self.micro_batch_size = packing, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.blank = blank_branch(chat_processor) if blanks else None
        self.mixture = mixture
        self._order = (0, self._draw_order(0))
        self.per_epoch = len(self._order[1].records) // (batch_size * world_size)
        self._check_first_records()

    def __len__(self) -> int:
        """Batches in one epoch; the indices go on beyond it."""
        return self.per_epoch

    def _check_first_records(self) -> None:
        """Makes sure that the first records hold something of what is trained."""
        idle = 0
        for place in range(min(NUM_CHECKED_RECORDS, len(self.order(0).records))):
            with suppress(CafeError):  # bad ones are told of as they come
                example = self._example_at(0, place)
                if example.pair or example.dialogue:
                    return
                idle += 1
        if idle:
            parts = [name for name, trained in (("pair", self.contrast), ("dialogue", self.language)) if trained]
            raise CafeError(f"None of the first {idle} records holds a {' or a '.join(parts)}, to be trained on.")

    def _example_at(self, epoch: int, place: int) -> Example:
        """The record at a place of an epoch's order, with what is trained of it; that may be nothing."""
        order = self.order(epoch)
        records = self.sources[int(order.sources[place])]
        example = records.example(int(order.records[place]), Random(f"{self.seed} {epoch} {place}"))
        pair = example.pair if self.contrast else None
        if pair and not self.hard_negatives:
            pair = replace(pair, negatives=(), negative_scores=())
        return Example(pair, example.dialogue if self.language else None, example.origin)

    def with_micro_batch_size(self, size: MicroBatchSize) -> "ContrastiveBatchDataset":
        """The same batches in micro-batches of another size."""
        other = copy.copy(self)
        other.micro_batch_size = size
        return other

    def largest_examples(self, count: int) -> list[EncodedExample]:
        """The first `count` examples of this process, those with most tokens first; bad ones are left out."""
        found = []
        start = self.rank * self.batch_size
        for place in range(start, start + min(count, self.batch_size)):
            try:
                example = self._example_at(0, place)
                if example.pair or example.dialogue:
                    found.append(encode_example(example, self.chat_processor, self.max_tokens))
            except CafeError:
                continue
        return sorted(found, key=lambda branches: -count_unique_tokens(branches.all))

    def collate(self, examples: list[EncodedExample]) -> Batch:
        """A batch of some examples."""
        return self._collate(examples, [], [""] * len(examples))

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        if self._order[0] != epoch:
            self._order = (epoch, self._draw_order(epoch))
        return self._order[1]

    def _draw_order(self, epoch: int) -> EpochOrder:
        return epoch_order(
            [records.chunks for records in self.sources],
            [records.source.shuffle_window for records in self.sources],
            [records.source.weight for records in self.sources],
            self.mixture,
            self.batch_size * self.world_size,
            Random(f"order {self.seed} {epoch}"),
        )

    def __getitem__(self, number: int) -> Batch:
        epoch, within = divmod(number, self.per_epoch)
        start = (within * self.world_size + self.rank) * self.batch_size
        done: list[EncodedExample] = []
        bad: list[str] = []
        names: list[str] = []
        for place in range(start, start + self.batch_size):
            try:
                example = self._example_at(epoch, place)
                if not (example.pair or example.dialogue):
                    continue
                done.append(encode_example(example, self.chat_processor, self.max_tokens))
            except CafeError as error:
                bad.append(str(error))
            else:
                names.append(example.origin)
        return self._collate(done, bad, names)

    def _collate(self, done: list[EncodedExample], bad: list[str], names: list[str]) -> Batch:
        pairs = sum(branches.query is not None for branches in done)
        embedded: list[list[Branch]] = []
        slots: list[list[int]] = []
        owners: list[int] = []
        scores: list[float] = []
        negative_ids: list[int] = []
        pair = 0
        for branches in done:
            embedded.append([])
            slots.append([])
            if branches.query and branches.target:
                embedded[-1] += [branches.query, branches.target, *branches.negatives]
                hard = 2 * pairs + len(owners)
                slots[-1] += [pair, pairs + pair, *range(hard, hard + len(branches.negatives))]
                owners += [pair] * len(branches.negatives)
                scores += branches.negative_match_prob
                negative_ids += branches.negative_ids
                pair += 1
        spoken = [[branches.dialogue] if branches.dialogue else [] for branches in done]
        cuts = split_micro_batches(embedded, spoken, self.micro_batch_size)
        micro_batches = []
        for part in cuts:
            joint = self._pack(embedded[part], spoken[part])
            one = part == cuts[0] or not (any(embedded[part]) and any(spoken[part]))
            embed = joint if one else self._pack(embedded[part], [[]] * len(spoken[part]))
            places = [slot for example in slots[part] for slot in example]
            micro_batches.append(MicroBatch(joint, embed, torch.tensor(places, dtype=torch.long)))
        return Batch(
            micro_batches,
            target_ids=torch.tensor([branches.target_id for branches in done if branches.query], dtype=torch.long),
            negative_owner=torch.tensor(owners, dtype=torch.long),
            negative_match_prob=torch.tensor(scores, dtype=torch.float32),
            negative_ids=torch.tensor(negative_ids, dtype=torch.long),
            num_supervised=sum(len(micro_batch.joint.labels) for micro_batch in micro_batches),
            bad_records=bad,
            record_names=names,
        )

    def _pack(self, embedded: list[list[Branch]], spoken: list[list[Branch]]) -> PackedBatch:
        shows = any(branch.image_inputs for group in (*embedded, *spoken) for branch in group)
        if self.blank and not shows:
            embedded, spoken = [*embedded, []], [*spoken, [self.blank]]
        return pack(embedded, spoken, self.packing)

    def blank_micro_batch(self) -> MicroBatch | None:
        """A micro-batch of a blank picture alone, where there are blanks."""
        if self.blank is None:
            return None
        empty = self._pack([], [])
        return MicroBatch(empty, empty, torch.empty(0, dtype=torch.long))


def blank_branch(chat_processor: ChatProcessor, width: int = 64, height: int = 64) -> Branch:
    """A prompt with a blank picture of so many pixels."""
    picture = Image.new("RGB", (width, height))
    messages = dialogue_messages(Dialogue((Turn("user", Content.of(picture)),)), chat_processor.prompts)
    return chat_processor.encode_prompt(messages, chat_processor.process_images([picture]))


def split_micro_batches(
    embedded: Sequence[list[Branch]], spoken: Sequence[list[Branch]], size: MicroBatchSize
) -> list[slice]:
    """Cuts examples, in their order, into micro-batches. An example that is too large makes one by itself."""
    cuts, start, tokens, crops = [], 0, 0, 0
    for index, branches in enumerate(map(list.__add__, embedded, spoken)):
        own_tokens, own_crops = count_unique_tokens(branches), count_crops(branches)
        full = (size.tokens and tokens + own_tokens > size.tokens) or (size.crops and crops + own_crops > size.crops)
        if full and index > start:
            cuts.append(slice(start, index))
            start, tokens, crops = index, 0, 0
        tokens, crops = tokens + own_tokens, crops + own_crops
    return [*cuts, slice(start, len(embedded))] if embedded else []


def iterate_batches(
    batches: ContrastiveBatchDataset, start: int, stop: int, workers: int, report: Callable[[str], None] = print
) -> Iterator[Batch]:
    """Batches number `start` to `stop`, made ahead in worker processes. Workers that die are replaced.

    Raises:
        CafeError: they died again soon after.
    """
    number, died = start, -MIN_BATCHES_BETWEEN_CRASHES
    while number < stop:
        handler = signal.getsignal(signal.SIGCHLD)
        stream = iter(
            make_loader(
                batches,
                range(number, stop),
                workers,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_leave_signals_to_the_run,
                generator=torch.Generator(),  # else making the loader would draw from the run's own
            )
        )
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)  # the loader's would raise in the middle of a step
        try:
            for batch in stream:
                yield batch
                number += 1
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            if not _is_worker_crash(error):
                raise
            if number - died < MIN_BATCHES_BETWEEN_CRASHES:
                raise CafeError(
                    f"The loader workers died twice around batch {number}: often memory is short for them, and fewer "
                    "of them (data.num_workers) or smaller pictures need less."
                ) from None
            died = number
            report(f"A loader worker died around batch {number}; new ones go on from there.")


MIN_BATCHES_BETWEEN_CRASHES = 10  # batches; workers are ahead of the run by less


def _is_worker_crash(error: Exception) -> bool:
    """Whether a loader's error says that a worker died: outright, or as its last tensors are fetched from it."""
    if isinstance(error, RuntimeError):
        return bool(re.search("DataLoader worker .*(exited unexpectedly|killed by signal)", str(error)))
    return "in DataLoader worker" not in str(error)


def _leave_signals_to_the_run(worker: int) -> None:
    """^C reaches a whole process group: the run takes it, its workers go on until it ends them by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Quarantine:
    """Writes down bad records and stops a run that has too many.

    Args:
        file: one JSON line a bad record is appended here.
        max_bad_fraction: the largest share of bad records (0 to 1) before the run stops.
        num_bad, num_records: the records of the steps that are already done; what the file names of later ones is dropped.
    """

    def __init__(self, file: Path, max_bad_fraction: float, num_bad: int = 0, num_records: int = 0) -> None:
        self.file, self.max_bad_fraction = file, max_bad_fraction
        self.num_bad, self.num_records = num_bad, num_records
        if file.is_file():
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(lines[:num_bad]))

    def record(self, batch: Batch) -> Batch:
        """Counts a batch's records, and passes it on.

        Raises:
            CafeError: more than the set share of at least 100 records is bad, or all of the first 8 or more.
        """
        self.num_bad += len(batch.bad_records)
        self.num_records += len(batch.bad_records) + len(batch.record_names)
        if batch.bad_records:
            with self.file.open("a") as out:
                out.writelines(json.dumps({"reason": reason}) + "\n" for reason in batch.bad_records)
        if self.num_bad == self.num_records >= 8:
            named = f"{self.file} names them. The last: {batch.bad_records[-1]}"
            raise CafeError(f"All of the first {self.num_bad} records are bad; {named}")
        if self.num_records >= 100 and self.num_bad > self.max_bad_fraction * self.num_records:
            raise CafeError(
                f"{self.num_bad} of {self.num_records} records are bad, more than the share of {self.max_bad_fraction:.2%} "
                f"that data.max_bad_fraction allows; {self.file} names them. The last: {(batch.bad_records or ['none'])[-1]}"
            )
        return batch
