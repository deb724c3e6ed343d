"""Show what `inspect` found as one self-contained HTML page.

It shows examples as the model will read them: every token, the supervised ones colored, and each image in place of its
tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import jinja2
import numpy as np

from cafe.content import Content, Example
from cafe.data.encoding import encode_example
from cafe.data.inspection import BRANCH_NAMES, SourceReport, contents, count_duplicates
from cafe.images.thumbnails import thumbnail
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import Branch

MAX_SHOWN_TOKENS = 600  # of a branch; longer ones are cut short
MAX_SHOWN_ERRORS = 20  # of a source
MAX_SHOWN_SIZES = 600  # dots in the chart of image sizes
NUM_BINS = 30
MAX_CHARACTER_TOKENS = 4  # a character may be several tokens, one per byte


@dataclass(frozen=True)
class Span:
    """Hold some of a branch's tokens as the page shows them.

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
    # Added tokens, such as those of images, need not be among the special ones.
    tokenizer = chat_processor.tokenizer
    ids = branch.input_ids.tolist()
    supervised = branch.loss_mask.tolist()
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    waiting = list(images)
    result: list[Span] = []
    start = 0
    while start < len(ids):
        # An image's whole run of tokens is one span.
        run, uri = waiting[0] if waiting else (None, "")
        if run is not None and ids[start : start + len(run)] == run:
            waiting.pop(0)
            result.append(Span("image", uri, len(run)))
            start += len(run)
            continue

        stop, text = _decode_character(tokenizer, ids, start)
        if embedded and stop == len(ids):
            kind = "readout"
        elif supervised[start]:
            kind = "supervised"
        elif ids[start] in special:
            kind = "special"
        else:
            kind = "prompt"
        result.append(Span(kind, text, stop - start))
        start = stop
    return result


def _decode_character(tokenizer: Any, ids: list[int], start: int) -> tuple[int, str]:
    """Decode one token, or as many as make a whole character; return where they end, and the text."""
    # Byte-level tokenizers may cut a character in parts, which decode to U+FFFD by themselves.
    stop = start + 1
    last_stop = min(start + MAX_CHARACTER_TOKENS, len(ids))
    text = _decode_tokens(tokenizer, ids[start:stop])
    while "\ufffd" in text and stop < last_stop:
        stop += 1
        text = _decode_tokens(tokenizer, ids[start:stop])
    return stop, text


def _decode_tokens(tokenizer: Any, ids: list[int]) -> str:
    """Decode tokens as they are, with the space before them."""
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    # SentencePiece marks a space before a word by this character; decoding drops the first one.
    has_space = tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁")
    if has_space and not text.startswith(" "):
        return f" {text}"
    return text


def _card(example: Example, chat_processor: ChatProcessor, max_tokens: int | None) -> dict[str, Any]:
    """Lay out an example for the page: its name and its branches as spans; soft targets with their scores."""
    encoded = encode_example(example, chat_processor, max_tokens)
    scores: dict[str, str] = {}
    if example.pair:
        # By the names that `contents` gives the negatives; without soft targets there are no scores.
        for number, score in enumerate(example.pair.negative_scores, start=1):
            scores[f"negative {number}"] = f"{score:.2f}"
    # Contents and branches are in the same order: query, target, negatives, dialogue.
    rows = []
    for (name, content), branch in zip(contents(example).items(), encoded.all, strict=True):
        row = _card_row(name, content, branch, chat_processor)
        rows.append({**row, "score": scores.get(name)})
    return {"name": example.origin, "rows": rows}


def _card_row(name: str, content: Content, branch: Branch, chat_processor: ChatProcessor) -> dict[str, Any]:
    """Lay out one branch of an example as spans, with a thumbnail of each image in its content."""
    images = chat_processor.decode_images(content.images)
    token_runs = chat_processor.process_images(images).token_runs
    shown_images = list(zip(token_runs, map(thumbnail, images), strict=True))
    parts = spans(branch, shown_images, chat_processor, embedded=name != "dialogue")
    return {
        "name": name,
        "tokens": len(branch),
        "spans": parts[:MAX_SHOWN_TOKENS],
        "cut": len(parts) - MAX_SHOWN_TOKENS,
    }


def _histogram(numbers: Sequence[int]) -> dict[str, Any]:
    """Return a histogram: heights from 0 to 1, and the ends of the axis."""
    # With more bins than different numbers, some would be empty for no reason in the data.
    num_bins = min(NUM_BINS, len(set(numbers)))
    counts, edges = np.histogram(numbers, bins=num_bins)
    return {"heights": (counts / counts.max()).tolist(), "least": round(edges[0]), "most": round(edges[-1])}


def _scatter(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return widths and heights as coordinates from 0 to 1 in a square; a random sample if there are many."""
    chosen = list(sizes)
    if len(chosen) > MAX_SHOWN_SIZES:
        chosen = Random(0).sample(chosen, MAX_SHOWN_SIZES)
    # Of all sizes, not of the sample alone, so that the axis ends at the largest image.
    side = max(chain.from_iterable(sizes))
    dots = {(width / side, height / side) for width, height in chosen}  # a set: equal dots would hide each other
    return {"dots": sorted(dots), "side": side}


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
    """Lay out one source for the page: its table, bad records, charts and examples."""
    charts = []
    for kind in BRANCH_NAMES:
        lengths = report.lengths(kind)
        if lengths:
            charts.append({"title": f"{kind.capitalize()}, tokens", **_histogram(lengths)})
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
