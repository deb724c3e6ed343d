"""Inspect data before training on it: counts, sizes, lengths, duplicates, bad records, and examples.

Records are decoded, rendered and tokenized as in training, so what is bad here is bad there. The page shows examples as
the model will read them: every token, the supervised ones colored, and each image in place of its tokens.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import jinja2
import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from cafe.content import Content, Example
from cafe.data.encoding import encode_example
from cafe.data.records import OpenedSource
from cafe.errors import RecordError
from cafe.images.decoding import decode_image
from cafe.images.thumbnails import thumbnail
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import Branch
from cafe.utils.dataloader import make_loader

BRANCH_NAMES = ("query", "target", "negative", "dialogue")
MAX_SHOWN_TOKENS = 600  # of a branch; the page cuts longer ones short
MAX_SHOWN_ERRORS = 20  # of a source
MAX_SHOWN_SIZES = 600  # dots in the chart of image sizes
NUM_BINS = 30
MAX_CHARACTER_TOKENS = 4  # a character may be several tokens, one per byte


@dataclass(frozen=True)
class RecordStats:
    """Statistics of one record.

    Attributes:
        error: why it cannot be used; empty if it can.
        tokens: the lengths of its branches in tokens, by kind.
        num_supervised: the number of tokens that the language loss is taken on.
        image_sizes: width and height of its images, in pixels.
        image_digests: a digest of each image's pixels.
        pair_digest, target_digest: digests of the pair and of its target; empty without a pair.
    """

    error: str = ""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    num_supervised: int = 0
    image_sizes: tuple[tuple[int, int], ...] = ()
    image_digests: tuple[bytes, ...] = ()
    pair_digest: bytes = b""
    target_digest: bytes = b""


@dataclass(frozen=True)
class SourceReport:
    """What was found in one source.

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
        return [record.error for record in self.stats if record.error]

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        """Return the widths and heights of all images."""
        return [size for record in self.stats for size in record.image_sizes]

    @property
    def image_digests(self) -> list[bytes]:
        """Return the digests of all images."""
        return [digest for record in self.stats for digest in record.image_digests]

    @property
    def pair_digests(self) -> list[bytes]:
        """Return the digests of all pairs."""
        return [record.pair_digest for record in self.stats if record.pair_digest]

    @property
    def target_digests(self) -> list[bytes]:
        """Return the digests of all targets."""
        return [record.target_digest for record in self.stats if record.target_digest]

    def lengths(self, kind: str) -> list[int]:
        """Return the lengths in tokens of all branches of one kind."""
        return [length for record in self.stats for length in record.tokens.get(kind, ())]

    def table(self) -> list[tuple[str, str]]:
        """Return names and values for display."""
        counts = {
            "records": self.num_records,
            "read": len(self.stats),
            "bad": len(self.errors),
            "pairs": len(self.pair_digests),
            "dialogues": len(self.lengths("dialogue")),
            "hard negatives": len(self.lengths("negative")),
            "supervised tokens": sum(record.num_supervised for record in self.stats),
            "images": len(self.image_digests),
            "images seen before": count_duplicates(self.image_digests),
            "targets seen before": count_duplicates(self.target_digests),
            "pairs seen before": count_duplicates(self.pair_digests),
        }
        # Of what a source does not have there is no distribution.
        distributions = {f"{kind}, tokens": self.lengths(kind) for kind in BRANCH_NAMES}
        distributions["width, pixels"] = [width for width, _ in self.image_sizes]
        distributions["height, pixels"] = [height for _, height in self.image_sizes]
        rows = [(name, f"{count:,}") for name, count in counts.items()]
        return rows + [(name, percentiles(numbers)) for name, numbers in distributions.items() if numbers]


def count_duplicates(digests: Sequence[bytes]) -> int:
    """Count how many are equal to an earlier one."""
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
        # In order: files are read from front to back.
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
        try:
            example = self.opened.example(index, Random(f"{self.seed} {index}"))
            return _record_stats(example, self.chat_processor, self.max_tokens)
        except RecordError as error:
            return RecordStats(error=str(error))


def _record_stats(example: Example, chat_processor: ChatProcessor, max_tokens: int | None) -> RecordStats:
    encoded = encode_example(example, chat_processor, max_tokens)
    # At full size, where training may decode less: digests are of what the file holds.
    images = {id(ref): decode_image(ref) for content in contents(example).values() for ref in content.images}
    digests = {key: _digest(str(image.size).encode(), image.tobytes()) for key, image in images.items()}

    def content_digest(content: Content) -> bytes:
        return _digest(*(part.encode() if isinstance(part, str) else digests[id(part)] for part in content.parts))

    branches = {"query": encoded.query, "target": encoded.target, "dialogue": encoded.dialogue}
    tokens = {kind: [len(branch)] for kind, branch in branches.items() if branch is not None}
    tokens["negative"] = list(map(len, encoded.negatives))
    stats = RecordStats(
        tokens=tokens,
        num_supervised=sum(int(branch.loss_mask.sum()) for branch in encoded.lm_branches),
        image_sizes=tuple(image.size for image in images.values()),
        image_digests=tuple(digests.values()),
    )
    if example.pair:
        target = content_digest(example.pair.target)
        pair = _digest(content_digest(example.pair.query), target)
        stats = replace(stats, pair_digest=pair, target_digest=target)
    return stats


def _digest(*pieces: bytes) -> bytes:
    # Each piece is hashed first, so that moving bytes from one to the next makes another digest.
    return hashlib.blake2b(b"".join(hashlib.blake2b(piece).digest() for piece in pieces), digest_size=12).digest()


def contents(example: Example) -> dict[str, Content]:
    """Return all contents of an example by name; a dialogue's is that of all its turns."""
    named: dict[str, Content] = {}
    if example.pair:
        named = {"query": example.pair.query, "target": example.pair.target}
        named |= {f"negative {number + 1}": negative for number, negative in enumerate(example.pair.negatives)}
    if example.dialogue:
        named["dialogue"] = Content(tuple(part for turn in example.dialogue.turns for part in turn.content.parts))
    return named


# The page.


@dataclass(frozen=True)
class Span:
    """Some of a branch's tokens as the page shows them.

    Attributes:
        kind: "prompt", "special", "supervised", "readout" or "image".
        text: of the tokens; of an image, its data URI.
        tokens: how many they are: one, those of a character, or an image's.
    """

    kind: str
    text: str
    tokens: int = 1


def spans(
    branch: Branch, images: Sequence[tuple[list[int], str]], chat_processor: ChatProcessor, embedded: bool
) -> list[Span]:
    """Split a branch into spans.

    Args:
        branch: the tokens.
        images: of each image in order, its run of tokens and its data URI.
        chat_processor: whose tokens they are.
        embedded: whether the last token is a readout.
    """
    tokenizer = chat_processor.tokenizer
    ids, supervised = branch.input_ids.tolist(), branch.loss_mask.tolist()
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    waiting = list(images)
    result: list[Span] = []
    start = 0
    while start < len(ids):
        # An image's whole run of tokens is one span.
        if waiting and ids[start : start + len(waiting[0][0])] == waiting[0][0]:
            run, uri = waiting.pop(0)
            result.append(Span("image", uri, len(run)))
            start += len(run)
            continue
        stop, text = _decode_character(tokenizer, ids, start)
        if embedded and stop == len(ids):
            kind = "readout"
        elif supervised[start]:
            kind = "supervised"
        else:
            kind = "special" if ids[start] in special else "prompt"
        result.append(Span(kind, text, stop - start))
        start = stop
    return result


def _decode_character(tokenizer: Any, ids: list[int], start: int) -> tuple[int, str]:
    """Decode one token, or as many as make a whole character; return where they end, and the text."""
    # Byte-level tokenizers may cut a character in parts, which decode to U+FFFD by themselves.
    stop = start + 1
    text = _decode_tokens(tokenizer, ids[start:stop])
    while "\ufffd" in text and stop < min(start + MAX_CHARACTER_TOKENS, len(ids)):
        stop += 1
        text = _decode_tokens(tokenizer, ids[start:stop])
    return stop, text


def _decode_tokens(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # SentencePiece marks a space before a word by this character; decoding drops the first one.
    has_space = tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁")
    return f" {text}" if has_space and not text.startswith(" ") else text


def _card(example: Example, chat_processor: ChatProcessor, max_tokens: int | None) -> dict[str, Any]:
    """Lay out an example for the page: its name and its branches as spans; soft targets with their scores."""
    encoded = encode_example(example, chat_processor, max_tokens)
    branches = {"query": encoded.query, "target": encoded.target, "dialogue": encoded.dialogue}
    # By the names that `contents` gives them.
    branches |= {f"negative {number + 1}": branch for number, branch in enumerate(encoded.negatives)}
    match_prob = example.pair.negative_scores if example.pair else ()
    scores = {f"negative {number + 1}": f"{score:.2f}" for number, score in enumerate(match_prob)}
    rows = []
    for name, content in contents(example).items():
        images = chat_processor.decode_images(content.images)
        token_runs = chat_processor.process_images(images).token_runs
        branch = branches[name]
        assert branch is not None
        shown_images = list(zip(token_runs, map(thumbnail, images), strict=True))
        parts = spans(branch, shown_images, chat_processor, embedded=name != "dialogue")
        rows.append(
            {
                "name": name,
                "score": scores.get(name),
                "tokens": len(branch),
                "spans": parts[:MAX_SHOWN_TOKENS],
                "cut": len(parts) - MAX_SHOWN_TOKENS,
            }
        )
    return {"name": example.origin, "rows": rows}


def _histogram(numbers: Sequence[int]) -> dict[str, Any]:
    """Return a histogram: heights from 0 to 1, and the ends of the axis."""
    counts, edges = np.histogram(numbers, bins=min(NUM_BINS, max(1, len(set(numbers)))))
    return {"heights": (counts / counts.max()).tolist(), "least": round(edges[0]), "most": round(edges[-1])}


def _scatter(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return widths and heights as coordinates from 0 to 1 in a square; a random sample if there are many."""
    chosen = list(sizes)
    if len(chosen) > MAX_SHOWN_SIZES:
        chosen = Random(0).sample(chosen, MAX_SHOWN_SIZES)
    side = max(max(size) for size in sizes)
    return {"dots": sorted({(width / side, height / side) for width, height in chosen}), "side": side}


def write_page(
    path: Path, reports: Sequence[SourceReport], chat_processor: ChatProcessor, max_tokens: int | None = None
) -> None:
    """Write the page: one self-contained HTML file, without scripts."""
    sections = [_section(report, chat_processor, max_tokens) for report in reports]
    template = files("cafe.data").joinpath("inspection.html.jinja").read_text(encoding="utf-8")
    # What records hold is escaped: anyone may have written it.
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = page.from_string(template).render(sections=sections, tiles=_tiles(reports))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def _section(report: SourceReport, chat_processor: ChatProcessor, max_tokens: int | None) -> dict[str, Any]:
    charts = [
        {"title": f"{kind.capitalize()}, tokens", **_histogram(report.lengths(kind))}
        for kind in BRANCH_NAMES
        if report.lengths(kind)
    ]
    return {
        "name": report.name,
        "table": report.table(),
        "bad": report.errors[:MAX_SHOWN_ERRORS],
        "more": max(0, len(report.errors) - MAX_SHOWN_ERRORS),
        "charts": charts,
        "sizes": _scatter(report.image_sizes) if report.image_sizes else None,
        "cards": [_card(example, chat_processor, max_tokens) for example in report.examples],
    }


def _tiles(reports: Sequence[SourceReport]) -> Iterator[tuple[str, str, str]]:
    """Yield the headline figures over all sources: label, value and note."""
    num_records = num_read = num_bad = longest = 0
    pairs: list[bytes] = []
    for report in reports:
        num_records += report.num_records
        num_read += len(report.stats)
        num_bad += len(report.errors)
        pairs += report.pair_digests
        for kind in BRANCH_NAMES:
            longest = max([longest, *report.lengths(kind)])
    yield "Records", f"{num_records:,}", f"{num_read:,} read"
    yield "Bad", f"{num_bad:,}", "of those read"
    yield "Pairs seen before", f"{count_duplicates(pairs):,}", "over all sources"
    yield "Longest", f"{longest:,}", "tokens"
