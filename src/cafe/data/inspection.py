"""Inspect data before training on it: counts, sizes, lengths, duplicates, bad records, and examples.

Records are decoded, rendered and tokenized as in training, so what is bad here is bad there.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from random import Random

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from cafe.content import Content, Example
from cafe.data.encoding import EncodedExample, encode_example
from cafe.data.records import OpenedSource
from cafe.errors import RecordError
from cafe.images.decoding import decode_image
from cafe.lvlm.processing import ChatProcessor
from cafe.utils.dataloader import make_loader

BRANCH_NAMES = ("query", "target", "negative", "dialogue")


@dataclass(frozen=True)
class RecordStats:
    """Hold the statistics of one record.

    Attributes:
        error: why it cannot be used; empty if it can.
        tokens: the lengths of its branches in tokens, by kind.
        num_supervised: the number of tokens that the language loss is taken on.
        is_truncated: whether it was cut to the longest sequence.
        image_sizes: width and height of its images, in pixels.
        image_digests: a digest of each image's pixels.
        pair_digest, target_digest: digests of the pair and of its target; empty without a pair.
    """

    error: str = ""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    num_supervised: int = 0
    is_truncated: bool = False
    image_sizes: tuple[tuple[int, int], ...] = ()
    image_digests: tuple[bytes, ...] = ()
    pair_digest: bytes = b""
    target_digest: bytes = b""


@dataclass(frozen=True)
class SourceReport:
    """Hold what was found in one source.

    Attributes:
        name: the source's path.
        num_records: how many records it holds.
        stats: of each record that was read.
        examples: some good records, for the page.
    """

    name: str
    num_records: int
    stats: list[RecordStats]
    examples: list[Example]

    @property
    def errors(self) -> list[str]:
        """Return why each bad record cannot be used, with the file and the record."""
        return list(filter(None, (record.error for record in self.stats)))

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Return the widths and heights of all images."""
        return list(chain.from_iterable(record.image_sizes for record in self.stats))

    @property
    def image_digests(self) -> list[bytes]:
        """Return the digests of all images."""
        return list(chain.from_iterable(record.image_digests for record in self.stats))

    @property
    def pair_digests(self) -> list[bytes]:
        """Return the digests of all pairs."""
        return list(filter(None, (record.pair_digest for record in self.stats)))

    @property
    def target_digests(self) -> list[bytes]:
        """Return the digests of all targets."""
        return list(filter(None, (record.target_digest for record in self.stats)))

    def lengths(self, kind: str) -> list[int]:
        """Return the lengths in tokens of all branches of one kind."""
        return list(chain.from_iterable(record.tokens.get(kind, ()) for record in self.stats))

    def table(self) -> list[tuple[str, str]]:
        """Return names and values for display."""
        counts = {
            "records": self.num_records,
            "read": len(self.stats),
            "bad": len(self.errors),
            "cut to max_length": sum(record.is_truncated for record in self.stats),
            "pairs": len(self.pair_digests),
            "dialogues": len(self.lengths("dialogue")),
            "hard negatives": len(self.lengths("negative")),
            "supervised tokens": sum(record.num_supervised for record in self.stats),
            "images": len(self.image_digests),
            "images seen before": count_duplicates(self.image_digests),
            "targets seen before": count_duplicates(self.target_digests),
            "pairs seen before": count_duplicates(self.pair_digests),
        }
        distributions = {f"{kind}, tokens": self.lengths(kind) for kind in BRANCH_NAMES}
        distributions["width, pixels"] = [width for width, _ in self.image_sizes]
        distributions["height, pixels"] = [height for _, height in self.image_sizes]
        rows = [(name, f"{count:,}") for name, count in counts.items()]
        # Of what a source does not have there is no distribution.
        rows += [(name, percentiles(numbers)) for name, numbers in distributions.items() if numbers]
        return rows


def count_duplicates(digests: Sequence[bytes]) -> int:
    """Count how many digests are equal to an earlier one."""
    return len(digests) - len(set(digests))


def percentiles(numbers: Sequence[int]) -> str:
    """Format minimum, median, 95th percentile and maximum."""
    # Nearest: each of the four is a number that occurs.
    low, median, high, top = np.percentile(numbers, [0, 50, 95, 100], method="nearest").tolist()
    return f"{low:,} · {median:,} · {high:,} · {top:,}"


def inspect(
    sources: Sequence[OpenedSource],
    chat_processor: ChatProcessor,
    *,
    max_tokens: int | None = None,
    sample: int = 1000,
    examples: int = 6,
    workers: int = 0,
    seed: int = 0,
) -> list[SourceReport]:
    """Read a random sample of each source, or all of it.

    Args:
        sources: the opened sources.
        chat_processor: of the model that is to be trained on them.
        max_tokens: the longest sequence; a record that cannot be truncated to it is bad.
        sample: records per source; 0 for all.
        examples: how many of them to keep for the page.
        workers: processes that decode and tokenize.
        seed: of the sample.
    """
    reports = []
    for opened in sources:
        # In order, though drawn at random: files are read from front to back.
        indices: Sequence[int] = range(len(opened))
        if sample and sample < len(opened):
            indices = sorted(Random(seed).sample(indices, sample))
        stream = make_loader(_StatsDataset(opened, chat_processor, max_tokens, seed), indices, workers)
        stats = list(tqdm(stream, desc=f"check {opened.source.path}", unit="record", total=len(indices)))

        # The page shows a random choice of the good ones, read once more: statistics do not keep records.
        good = [index for index, record in zip(indices, stats, strict=True) if not record.error]
        shown = sorted(Random(seed).sample(good, min(examples, len(good))))
        shown_examples = [opened.example(index, Random(f"{seed} {index}")) for index in shown]
        reports.append(SourceReport(opened.source.path, len(opened), stats, shown_examples))
    return reports


class _StatsDataset(Dataset[RecordStats]):
    """Compute the statistics of record number n."""

    def __init__(self, opened: OpenedSource, chat_processor: ChatProcessor, max_tokens: int | None, seed: int) -> None:
        self.opened, self.chat_processor, self.max_tokens, self.seed = opened, chat_processor, max_tokens, seed

    def __getitem__(self, index: int) -> RecordStats:
        # What goes wrong with a record is a finding here, not an error.
        try:
            example = self.opened.example(index, Random(f"{self.seed} {index}"))
            return _record_stats(example, self.chat_processor, self.max_tokens)
        except RecordError as error:
            return RecordStats(error=str(error))


def _record_stats(example: Example, chat_processor: ChatProcessor, max_tokens: int | None) -> RecordStats:
    """Compute the statistics of a good record.

    Raises:
        RecordError: it is bad.
    """
    encoded = encode_example(example, chat_processor, max_tokens)
    # Decoded once more, at full size, where training may decode less: digests are of what the file holds.
    refs = chain.from_iterable(content.images for content in contents(example).values())
    images = {id(ref): decode_image(ref) for ref in refs}
    image_digests = {key: _digest([str(image.size).encode(), image.tobytes()]) for key, image in images.items()}

    stats = RecordStats(
        tokens=_branch_lengths(encoded),
        is_truncated=encoded.is_truncated,
        num_supervised=sum(int(branch.loss_mask.sum()) for branch in encoded.lm_branches),
        image_sizes=tuple(image.size for image in images.values()),
        image_digests=tuple(image_digests.values()),
    )
    if example.pair:
        target = _content_digest(example.pair.target, image_digests)
        pair = _digest([_content_digest(example.pair.query, image_digests), target])
        stats = replace(stats, pair_digest=pair, target_digest=target)
    return stats


def _branch_lengths(encoded: EncodedExample) -> dict[str, list[int]]:
    """Return the lengths in tokens of an example's branches, by kind."""
    branches = {"query": encoded.query, "target": encoded.target, "dialogue": encoded.dialogue}
    lengths = {kind: [len(branch)] for kind, branch in branches.items() if branch is not None}
    lengths["negative"] = list(map(len, encoded.negatives))
    return lengths


def _content_digest(content: Content, image_digests: dict[int, bytes]) -> bytes:
    """Return a digest of a content's text and of its images' pixels, whose digests are given by `id`."""
    pieces = []
    for part in content.parts:
        pieces.append(part.encode() if isinstance(part, str) else image_digests[id(part)])
    return _digest(pieces)


def _digest(pieces: Iterable[bytes]) -> bytes:
    """Return a digest of pieces in order."""
    # Each piece is hashed first, so that moving bytes from one to the next makes another digest.
    hashed = [hashlib.blake2b(piece).digest() for piece in pieces]
    return hashlib.blake2b(b"".join(hashed), digest_size=12).digest()


def contents(example: Example) -> dict[str, Content]:
    """Return all contents of an example by name; a dialogue's is that of all its turns."""
    named: dict[str, Content] = {}
    if example.pair:
        named = {"query": example.pair.query, "target": example.pair.target}
        for number, negative in enumerate(example.pair.negatives, start=1):
            named[f"negative {number}"] = negative
    if example.dialogue:
        parts = chain.from_iterable(turn.content.parts for turn in example.dialogue.turns)
        named["dialogue"] = Content(tuple(parts))
    return named
