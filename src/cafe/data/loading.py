"""Examples -> contrastive batches of token sequences, made in loader workers.

The order is fixed by the seed. A bad record is left out of its batch, written to the quarantine file with its reason,
and counted: too large a share of them stops the run.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from cafe.content import Content, Example, ImageRef, open_image
from cafe.data.formats import Records
from cafe.errors import CafeError
from cafe.instructions import dialogue_messages, embedding_messages
from cafe.processing import Encoded, Pictures, Processing

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One contrastive batch as padded branches. A branch that no example has is None.

    Attributes:
        queries, targets, negatives: model inputs whose last tokens are readouts.
        target_ids: equal numbers for pairs with equal targets.
        dialogues: model inputs of the dialogues.
        supervised: which dialogue tokens the language loss is taken on.
        bad: the messages of records left out.
        sources: the file and record of each example.
    """

    queries: Inputs | None
    targets: Inputs | None
    negatives: Inputs | None
    target_ids: Int64[Tensor, "pairs"]
    dialogues: Inputs | None
    supervised: Bool[Tensor, "rows tokens"] | None
    bad: list[str]
    sources: list[str]


@dataclass(frozen=True)
class Branches:
    """The token sequences of one example."""

    query: Encoded | None
    target: Encoded | None
    negatives: list[Encoded]
    target_id: int
    dialogue: Encoded | None


def encode(example: Example, processing: Processing, max_tokens: int | None = None) -> Branches:
    """Decodes an example's images and renders its branches; an image is decoded and processed once for all of them.

    Raises:
        CafeError: an image is missing or damaged, or its tokens do not fit; the record is named.
    """
    try:
        return _encode(example, processing, max_tokens)
    except CafeError as error:
        raise CafeError(f"{example.source}: {error}") from None


def _encode(example: Example, processing: Processing, max_tokens: int | None) -> Branches:
    done: dict[tuple[int, ...], Pictures] = {}

    def pictures(refs: Sequence[ImageRef]) -> Pictures:
        key = tuple(map(id, refs))
        if key not in done:
            done[key] = processing.pictures([open_image(ref) for ref in refs])
        return done[key]

    def embedding(content: Content) -> Encoded:
        messages = embedding_messages(content, processing.prompts)
        return processing.encode_embedding(messages, pictures(content.images), max_tokens)

    query = target = dialogue = None
    negatives: list[Encoded] = []
    target_id = 0
    if example.pair:
        query, target = embedding(example.pair.query), embedding(example.pair.target)
        negatives = [embedding(negative) for negative in example.pair.negatives]
        target_id = _identity(example.pair.target)
    if example.dialogue:
        refs = [ref for turn in example.dialogue.turns for ref in turn.content.images]
        messages = dialogue_messages(example.dialogue, processing.prompts)
        dialogue = processing.encode_dialogue(messages, pictures(refs), max_tokens)
    return Branches(query, target, negatives, target_id, dialogue)


def _identity(content: Content) -> int:
    """A number that is equal for equal contents, across processes."""
    digest = hashlib.blake2b(digest_size=7)
    for part in content.parts:
        digest.update((part if isinstance(part, str) else str(part)).encode() + b"\0")
        if isinstance(part, ImageRef) and isinstance(part.source, bytes):
            digest.update(part.source)
    return int.from_bytes(digest.digest())


class Batches(Dataset[Batch]):
    """Contrastive batch number n of a run, the same for the same seed whichever worker makes it.

    Args:
        sources: the opened sources, read as one.
        processing: renders and tokenizes.
        batch_size: pairs a batch.
        seed: of the order and of every choice within records.
        max_tokens: the longest sequence.
        hard_negatives: whether to use the records' hard negatives.
        rank, world: which of several processes this is; each takes its own part of every batch.
    """

    def __init__(
        self,
        sources: Sequence[Records],
        processing: Processing,
        batch_size: int,
        seed: int,
        max_tokens: int | None = None,
        hard_negatives: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sources, self.processing, self.batch_size, self.seed = list(sources), processing, batch_size, seed
        self.max_tokens, self.hard_negatives = max_tokens, hard_negatives
        self.rank, self.world = rank, world
        self.places = [(which, index) for which, records in enumerate(self.sources) for index in range(len(records))]
        if len(self.places) < batch_size * world:
            raise CafeError(f"The data holds {len(self.places)} records, fewer than one batch of {batch_size * world}.")
        self.per_epoch = len(self.places) // (batch_size * world)
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        """Batches in one epoch; the indices go on beyond it."""
        return self.per_epoch

    def order(self, epoch: int) -> list[int]:
        """The order of an epoch."""
        if self._order[0] != epoch:
            order = list(range(len(self.places)))
            Random(f"order {self.seed} {epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]

    def __getitem__(self, number: int) -> Batch:
        epoch, within = divmod(number, self.per_epoch)
        start = (within * self.world + self.rank) * self.batch_size
        done: list[Branches] = []
        bad: list[str] = []
        names: list[str] = []
        for place in self.order(epoch)[start : start + self.batch_size]:
            which, index = self.places[place]
            try:
                example = self.sources[which].example(index, Random(f"{self.seed} {epoch} {place}"))
                done.append(encode(example, self.processing, self.max_tokens))
            except CafeError as error:
                bad.append(str(error))
            else:
                names.append(example.source)
        return self._collate(done, bad, names)

    def _collate(self, done: list[Branches], bad: list[str], names: list[str]) -> Batch:
        pairs = [branches for branches in done if branches.query]
        negatives = [row for branches in pairs for row in branches.negatives] if self.hard_negatives else []
        dialogues = [branches.dialogue for branches in done if branches.dialogue]
        return Batch(
            queries=self._inputs([branches.query for branches in pairs if branches.query]),
            targets=self._inputs([branches.target for branches in pairs if branches.target]),
            negatives=self._inputs(negatives),
            target_ids=torch.tensor([branches.target_id for branches in pairs], dtype=torch.long),
            dialogues=self._inputs(dialogues),
            supervised=pad_sequence([row.supervised for row in dialogues], batch_first=True) if dialogues else None,
            bad=bad,
            sources=names,
        )

    def _inputs(self, rows: Sequence[Encoded]) -> Inputs | None:
        return self.processing.collate(rows) if rows else None


def load(batches: Batches, start: int, stop: int, workers: int) -> Iterator[Batch]:
    """Batches number `start` to `stop`, made ahead in worker processes."""
    return iter(DataLoader(batches, batch_size=None, sampler=range(start, stop), num_workers=workers))


class Quarantine:
    """Writes down bad records and stops a run that has too many.

    Args:
        file: one JSON line a bad record is appended here.
        max_share: the largest share of bad records (0 to 1) before the run stops.
    """

    def __init__(self, file: Path, max_share: float) -> None:
        self.file, self.max_share = file, max_share
        self.bad = self.seen = 0

    def check(self, batch: Batch) -> None:
        """Counts a batch's records.

        Raises:
            CafeError: more than the set share of at least 100 records, or a whole batch, is bad.
        """
        self.bad += len(batch.bad)
        self.seen += len(batch.bad) + len(batch.sources)
        if batch.bad:
            with self.file.open("a") as out:
                out.writelines(json.dumps({"reason": reason}) + "\n" for reason in batch.bad)
        if not batch.sources or (self.seen >= 100 and self.bad > self.max_share * self.seen):
            raise CafeError(
                f"{self.bad} of {self.seen} records are bad, more than the share of {self.max_share:.2%} "
                f"that data.max_bad_share allows; {self.file} names them. The last: {(batch.bad or ['none'])[-1]}"
            )
