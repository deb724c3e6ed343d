"""What is in the data, before anyone trains on it: counts, sizes, lengths, duplicates, bad records, and examples.

Records go the way they go in training (decoded, rendered, tokenized), so what is bad here is bad there. The page shows
examples as the model will read them: every token, the supervised ones colored, a picture where its run of tokens is.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
from cafe.errors import CafeError
from cafe.images.decoding import decode_image
from cafe.images.thumbnails import thumbnail
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import Branch
from cafe.utils.dataloader import make_loader

SHOWN_TOKENS = 600  # of a branch; what is longer is cut short on the page
BINS = 30


@dataclass(frozen=True)
class RecordStats:
    """What one record holds.

    Attributes:
        bad: why it cannot be used; empty if it can.
        tokens: the lengths of its branches in tokens, by what they are.
        supervised: tokens that the language loss is taken on.
        sizes: width and height of its pictures, in pixels.
        pictures: a digest of each picture's pixels.
        pair, target: digests of the pair and of its target; empty without a pair.
    """

    bad: str = ""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    supervised: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    pictures: tuple[bytes, ...] = ()
    pair: bytes = b""
    target: bytes = b""


@dataclass(frozen=True)
class SourceReport:
    """What was found in one source, in `len(looks)` of its `records`."""

    name: str
    records: int
    looks: list[RecordStats]
    examples: list[Example]

    @property
    def bad(self) -> list[str]:
        """Why each bad record cannot be used, with the file and the record."""
        return [look.bad for look in self.looks if look.bad]

    def lengths(self, what: str) -> list[int]:
        """The lengths in tokens of all branches of one kind."""
        return [length for look in self.looks for length in look.tokens.get(what, ())]

    def table(self) -> list[tuple[str, str]]:
        """Names and values, for people."""
        sizes = [size for look in self.looks for size in look.sizes]
        rows = [
            ("records", f"{self.records:,}"),
            ("read", f"{len(self.looks):,}"),
            ("bad", f"{len(self.bad):,}"),
            ("pairs", f"{sum(bool(look.pair) for look in self.looks):,}"),
            ("dialogues", f"{len(self.lengths('dialogue')):,}"),
            ("hard negatives", f"{len(self.lengths('negative')):,}"),
            ("supervised tokens", f"{sum(look.supervised for look in self.looks):,}"),
            ("pictures", f"{len(sizes):,}"),
            (
                "pictures seen before",
                f"{count_duplicates(digest for look in self.looks for digest in look.pictures):,}",
            ),
            ("targets seen before", f"{count_duplicates(look.target for look in self.looks if look.target):,}"),
            ("pairs seen before", f"{count_duplicates(look.pair for look in self.looks if look.pair):,}"),
        ]
        for what in ("query", "target", "negative", "dialogue"):
            if self.lengths(what):
                rows.append((f"{what}, tokens", percentiles(self.lengths(what))))
        if sizes:
            rows.append(("width, pixels", percentiles([width for width, _ in sizes])))
            rows.append(("height, pixels", percentiles([height for _, height in sizes])))
        return rows


def count_duplicates(digests: Iterator[bytes]) -> int:
    """How many are equal to an earlier one."""
    every = list(digests)
    return len(every) - len(set(every))


def percentiles(numbers: Sequence[int]) -> str:
    """Least, median, 95th percentile and most."""
    least, median, high, most = np.percentile(numbers, [0, 50, 95, 100], method="nearest").tolist()
    return f"{least:,} · {median:,} · {high:,} · {most:,}"


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
    """Reads a sample of each source, or all of it.

    Args:
        sources: the opened sources.
        chat_processor: of the model that is to read them.
        max_tokens: the longest sequence; what cannot be cut to it is bad.
        sample: records a source, by lot; 0 for all.
        examples: how many of them to keep for the page.
        workers: processes that decode and tokenize.
        seed: of the lot.
    """
    checks = []
    for records in sources:
        indices: Sequence[int] = range(len(records))
        if sample and sample < len(records):
            indices = sorted(Random(seed).sample(indices, sample))
        stream = make_loader(_StatsDataset(records, chat_processor, max_tokens, seed), indices, workers)
        looks = list(tqdm(stream, desc=f"check {records.source.path}", unit="record", total=len(indices)))
        good = [index for index, look in zip(indices, looks, strict=True) if not look.bad]
        shown = sorted(Random(seed).sample(good, min(examples, len(good))))
        kept = [records.example(index, Random(f"{seed} {index}")) for index in shown]
        checks.append(SourceReport(records.source.path, len(records), looks, kept))
    return checks


class _StatsDataset(Dataset[RecordStats]):
    """Record number n, looked at."""

    def __init__(self, records: OpenedSource, chat_processor: ChatProcessor, max_tokens: int | None, seed: int) -> None:
        self.records, self.chat_processor, self.max_tokens, self.seed = records, chat_processor, max_tokens, seed

    def __getitem__(self, index: int) -> RecordStats:
        try:
            example = self.records.example(index, Random(f"{self.seed} {index}"))
            branches = encode_example(example, self.chat_processor, self.max_tokens)
            images = {id(ref): decode_image(ref) for content in contents(example).values() for ref in content.images}
        except CafeError as error:
            return RecordStats(bad=str(error))
        digests = {key: _digest(str(image.size).encode(), image.tobytes()) for key, image in images.items()}

        def digest(content: Content) -> bytes:
            return _digest(*(p.encode() if isinstance(p, str) else digests[id(p)] for p in content.parts))

        named = {"query": branches.query, "target": branches.target, "dialogue": branches.dialogue}
        tokens = {name: [len(branch)] for name, branch in named.items() if branch}
        pair = example.pair
        return RecordStats(
            tokens=tokens | {"negative": [len(branch) for branch in branches.negatives]},
            supervised=int(branches.dialogue.loss_mask.sum()) if branches.dialogue else 0,
            sizes=tuple(image.size for image in images.values()),
            pictures=tuple(digests.values()),
            pair=_digest(digest(pair.query), digest(pair.target)) if pair else b"",
            target=digest(pair.target) if pair else b"",
        )


def _digest(*pieces: bytes) -> bytes:
    return hashlib.blake2b(b"".join(hashlib.blake2b(piece).digest() for piece in pieces), digest_size=12).digest()


def contents(example: Example) -> dict[str, Content]:
    """All that an example shows, by what it is; a dialogue is the content of its turns."""
    found: dict[str, Content] = {}
    if example.pair:
        found = {"query": example.pair.query, "target": example.pair.target}
        found |= {f"negative {number + 1}": negative for number, negative in enumerate(example.pair.negatives)}
    if example.dialogue:
        found["dialogue"] = Content(tuple(part for turn in example.dialogue.turns for part in turn.content.parts))
    return found


# The page.


@dataclass(frozen=True)
class Span:
    """Some of a branch's tokens as the page shows them: one token's text, or a whole picture (a data URI)."""

    kind: str  # "prompt", "special", "supervised", "readout" or "picture"
    text: str
    tokens: int = 1


def spans(
    branch: Branch, shown: Sequence[tuple[list[int], str]], chat_processor: ChatProcessor, embedded: bool
) -> list[Span]:
    """A branch as it is read.

    Args:
        branch: the tokens.
        shown: of each picture in order, its run of tokens and its data URI.
        chat_processor: whose tokens they are.
        embedded: whether the last token is a readout.
    """
    ids, supervised, tokenizer = branch.input_ids.tolist(), branch.loss_mask.tolist(), chat_processor.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    waiting, done, at = list(shown), [], 0
    while at < len(ids):
        if waiting and ids[at : at + len(waiting[0][0])] == waiting[0][0]:
            run, picture = waiting.pop(0)
            done.append(Span("picture", picture, len(run)))
            at += len(run)
            continue
        stop = at + 1
        text = _words(tokenizer, ids[at:stop])
        while "�" in text and stop < min(at + 4, len(ids)):  # a character may be several tokens
            stop += 1
            text = _words(tokenizer, ids[at:stop])
        kind = "supervised" if supervised[at] else "special" if ids[at] in special else "prompt"
        if embedded and stop == len(ids):
            kind = "readout"
        done.append(Span(kind, text, stop - at))
        at = stop
    return done


def _words(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    spaced = tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁")  # SentencePiece's space, which decoding drops
    return f" {text}" if spaced and not text.startswith(" ") else text


def _card(example: Example, chat_processor: ChatProcessor, max_tokens: int | None) -> dict[str, Any]:
    """An example for the page: its name and its branches as spans; a soft target with its score."""
    branches = encode_example(example, chat_processor, max_tokens)
    named = {"query": branches.query, "target": branches.target, "dialogue": branches.dialogue}
    named |= {f"negative {number + 1}": branch for number, branch in enumerate(branches.negatives)}
    soft = example.pair.negative_scores if example.pair else ()
    scores = {f"negative {number + 1}": f"{score:.2f}" for number, score in enumerate(soft)}
    rows = []
    for name, content in contents(example).items():
        images = chat_processor.decode_images(content.images)
        shown = list(zip(chat_processor.process_images(images).token_runs, map(thumbnail, images), strict=True))
        branch = named[name]
        assert branch is not None
        parts = spans(branch, shown, chat_processor, embedded=name != "dialogue")
        told = {"name": name, "score": scores.get(name), "tokens": len(branch)}
        rows.append({**told, "spans": parts[:SHOWN_TOKENS], "cut": len(parts) - SHOWN_TOKENS})
    return {"name": example.origin, "rows": rows}


def _bars(numbers: Sequence[int]) -> dict[str, Any]:
    """A histogram: heights from 0 to 1, and the ends of the axis."""
    counts, edges = np.histogram(numbers, bins=min(BINS, max(1, len(set(numbers)))))
    return {"heights": (counts / counts.max()).tolist(), "least": round(edges[0]), "most": round(edges[-1])}


def _dots(sizes: Sequence[tuple[int, int]], most: int = 600) -> dict[str, Any]:
    """Widths and heights as places from 0 to 1 in a square, by lot if there are many."""
    chosen = list(sizes) if len(sizes) <= most else Random(0).sample(list(sizes), most)
    side = max(max(size) for size in sizes)
    return {"dots": sorted({(width / side, height / side) for width, height in chosen}), "side": side}


def write_page(
    path: Path, checks: Sequence[SourceReport], chat_processor: ChatProcessor, max_tokens: int | None = None
) -> None:
    """Writes the page: one self-contained HTML file, without a script."""
    sections = []
    for found in checks:
        charts = [
            {"title": f"{what.capitalize()}, tokens", **_bars(found.lengths(what))}
            for what in ("query", "target", "negative", "dialogue")
            if found.lengths(what)
        ]
        sizes = [size for look in found.looks for size in look.sizes]
        sections.append(
            {
                "name": found.name,
                "table": found.table(),
                "bad": found.bad[:20],
                "more": max(0, len(found.bad) - 20),
                "charts": charts,
                "sizes": _dots(sizes) if sizes else None,
                "cards": [_card(example, chat_processor, max_tokens) for example in found.examples],
            }
        )
    looks = [look for found in checks for look in found.looks]
    tiles = [
        ("OpenedSource", f"{sum(found.records for found in checks):,}", f"{len(looks):,} read"),
        ("Bad", f"{sum(len(found.bad) for found in checks):,}", "of those read"),
        ("Pairs seen before", f"{count_duplicates(look.pair for look in looks if look.pair):,}", "over all sources"),
        ("Longest", f"{max((max(n, default=0) for k in looks for n in k.tokens.values()), default=0):,}", "tokens"),
    ]
    template = files("cafe.data").joinpath("inspection.html.jinja").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.from_string(template).render(sections=sections, tiles=tiles), encoding="utf-8")
