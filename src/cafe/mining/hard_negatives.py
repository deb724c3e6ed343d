"""Hard negatives, found by a checkpoint: what it takes for a match and is none.

Every query is compared with every target. The closest targets that are not its own become its negatives, save those so
close to the positive that they may be matches themselves (positive-aware filtering, NV-Retriever, arXiv 2407.15831).
The same model's generative half may then judge each: what it says "yes" to is dropped, or becomes a soft target. The
result is a new source.
"""

import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from cafe.content import Content, Dialogue, Example, ImageRef, Turn
from cafe.data.dataset import content_hash, encode_example
from cafe.data.image_fields import IMAGE_TOKEN
from cafe.data.records import OpenedSource
from cafe.errors import CafeError
from cafe.images.decoding import image_errors
from cafe.lvlm.forward import compute_logits, forward_packed
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import dialogue_messages
from cafe.model import Cafe
from cafe.packing import Branch, PackedBatch, pack
from cafe.search import search
from cafe.utils.dataloader import make_loader

QUESTION = "Is the last of these a correct match for what comes before it? Answer yes or no."


@dataclass(frozen=True, kw_only=True)
class MiningConfig:
    """How hard negatives are found.

    Attributes:
        negatives: how many a record gets, at most; the hardest.
        top: how many of the closest targets are looked at.
        max_positive_ratio: a negative's similarity is below this share of the positive's (NV-Retriever's perc-to-pos); null for no
            such limit.
        margin: it is below the positive's by at least this; null for no such limit.
        judge: drop what the model itself says "yes" to with at least this probability; null asks nothing.
        soft: keep it as a soft target instead, with that probability as its score.
        question: what it is asked.
        batch_size: records that go through the model at once.
        workers: processes that decode and tokenize.
    """

    negatives: int = 4
    top: int = 64
    max_positive_ratio: float | None = 0.95
    margin: float | None = None
    judge: float | None = None
    soft: bool = False
    question: str = QUESTION
    batch_size: int = 16
    workers: int = 1


def mine(
    model: Cafe,
    sources: Sequence[OpenedSource],
    output: Path,
    mining: MiningConfig,
    seed: int = 0,
    max_tokens: int | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Writes the sources' records with hard negatives as one new source, of the format "pairs".

    Mined negatives take the place of what the records had. Where a record has several captions, the one drawn now is
    its target from now on.

    Args:
        model: embeds, and judges.
        sources: the opened sources.
        output: a folder: `records.jsonl`, `images/` for pictures that have no file of their own, `quarantine.jsonl`.
        mining: how.
        seed: of choices within records.
        max_tokens: the longest sequence.
        report: takes the lines meant for people.

    Returns:
        The path of the new source.

    Raises:
        CafeError: no record holds a pair, or the new source would take the place of one that is read.
    """
    path = output / "records.jsonl"
    if path.resolve() in {Path(file.name).resolve() for records in sources for file in records.files}:
        raise CafeError(f"The new source would take the place of {path}, which is mined: name another output.")
    (output / "images").mkdir(parents=True, exist_ok=True)  # before the work, for which there may be no place
    places = [(which, index) for which, records in enumerate(sources) for index in range(len(records))]
    examples = Examples(sources, seed)
    embedded = embed_pairs(model, examples, places, mining, max_tokens)
    if not len(embedded.places):
        raise CafeError("No record of these sources holds a pair that can be read: there is nothing to mine.")
    found = [dict.fromkeys(row, 0.0) for row in candidates(embedded, mining)]
    if mining.judge is not None:
        first = [list(row)[: 2 * mining.negatives] for row in found]
        found = filter_by_judge(model, examples, embedded, first, mining, mining.judge)
    chosen = {
        place: dict(islice(row.items(), mining.negatives)) for place, row in zip(embedded.places, found, strict=True)
    }

    bad = dict(embedded.bad)
    # Half of a character, in a dialogue that no one has read yet, is written as JSON escapes it.
    with path.with_suffix(".partial").open("w", encoding="utf-8", errors="backslashreplace") as out:
        for place in tqdm(places, desc="write", unit="record"):
            if place in bad:
                continue
            try:
                example = examples[place]
                scores = chosen.get(place, {})
                negatives = [examples[embedded.places[other]].pair for other in scores]
                if example.pair:
                    found_ones = tuple(pair.target for pair in negatives if pair)
                    soft = tuple(scores.values()) if mining.soft else ()
                    example = replace(example, pair=replace(example.pair, negatives=found_ones, negative_scores=soft))
                row = to_record(example, output)
            except CafeError as error:
                bad[place] = str(error)
                continue
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    path.with_suffix(".partial").replace(path)
    with (output / "quarantine.jsonl").open("w") as out:
        out.writelines(json.dumps({"reason": reason}) + "\n" for reason in bad.values())
    counts = [len(row) for row in chosen.values()]
    report(
        f"{sum(counts):,} hard negatives for {sum(map(bool, counts)):,} of {len(counts):,} pairs; "
        f"{len(bad):,} of {len(places):,} records are bad. The new source: {{path: {path}, format: pairs}}"
    )
    return path


class Examples:
    """Any record of some sources, the same whenever it is asked for."""

    def __init__(self, sources: Sequence[OpenedSource], seed: int) -> None:
        self.sources, self.seed = sources, seed

    def __getitem__(self, place: tuple[int, int]) -> Example:
        which, index = place
        return self.sources[which].example(index, Random(f"mine {self.seed} {which} {index}"))


# 1. Embed every query and target.


@dataclass(frozen=True)
class EmbeddedPairs:
    """The pairs of some sources as unit vectors, in order.

    Attributes:
        places: (source, record) of each pair.
        query_ids, target_ids: equal numbers for equal contents.
        bad: why records are left out, by place.
    """

    places: list[tuple[int, int]]
    queries: Float32[np.ndarray, "pairs dim"]
    targets: Float32[np.ndarray, "pairs dim"]
    query_ids: Int64[np.ndarray, " pairs"]
    target_ids: Int64[np.ndarray, " pairs"]
    bad: dict[tuple[int, int], str]


@dataclass(frozen=True)
class _EncodedShard:
    """Some records' pairs, laid out for the model: the queries and targets in turn."""

    pack: PackedBatch | None
    places: list[tuple[int, int]]
    ids: list[tuple[int, int]]
    bad: dict[tuple[int, int], str]


class _Pairs(Dataset[_EncodedShard]):
    """The pairs of records number `start` and after."""

    def __init__(
        self, examples: Examples, places: list[tuple[int, int]], model: Cafe, size: int, max_tokens: int | None
    ) -> None:
        self.examples, self.places, self.size, self.max_tokens = examples, places, size, max_tokens
        self.chat_processor, self.packing = model.chat_processor, model.packing

    def __getitem__(self, start: int) -> _EncodedShard:
        groups: list[list[Branch]] = []
        places, ids, bad = [], [], {}
        for place in self.places[start : start + self.size]:
            try:
                example = self.examples[place]
                if not example.pair:
                    continue
                pair = replace(example.pair, negatives=(), negative_scores=())
                branches = encode_example(Example(pair, None, example.origin), self.chat_processor, self.max_tokens)
            except CafeError as error:
                bad[place] = str(error)
                continue
            if branches.query and branches.target:
                groups.append([branches.query, branches.target])
                places.append(place)
                ids.append((content_hash(pair.query), content_hash(pair.target)))
        laid = pack(groups, [[]] * len(groups), self.packing) if groups else None
        return _EncodedShard(laid, places, ids, bad)


@torch.inference_mode()
def embed_pairs(
    model: Cafe, examples: Examples, places: list[tuple[int, int]], mining: MiningConfig, max_tokens: int | None = None
) -> EmbeddedPairs:
    """Embeds the query and the target of every record that has them."""
    data = _Pairs(examples, places, model, mining.batch_size, max_tokens)
    starts = range(0, len(places), mining.batch_size)
    stream = make_loader(data, starts, mining.workers)
    kept: list[tuple[int, int]] = []
    vectors, ids, bad = [], [], {}
    for part in tqdm(stream, desc="embed", unit="batch", total=len(starts)):
        bad.update(part.bad)
        if part.pack is not None:
            hidden, _ = forward_packed(model.lvlm, part.pack)
            vectors.append(F.normalize(hidden.float(), dim=-1).cpu().numpy())
            kept += part.places
            ids += part.ids
    dim = model.lvlm.config.get_text_config().hidden_size
    both = np.concatenate([np.empty((0, dim), np.float32), *vectors])
    numbers = np.array(ids, np.int64).reshape(-1, 2)
    return EmbeddedPairs(kept, both[::2], both[1::2], numbers[:, 0], numbers[:, 1], bad)


# 2. Find the closest targets that are no matches.


def candidates(embedded: EmbeddedPairs, mining: MiningConfig) -> list[list[int]]:
    """For each pair the numbers of pairs whose targets may be its hard negatives, the hardest first.

    A target equal to the pair's own, or paired elsewhere with an equal query, is a match and no negative.
    """
    targets, first = np.unique(embedded.target_ids, return_index=True)
    matches: dict[int, set[int]] = defaultdict(set)
    for query, target in zip(embedded.query_ids.tolist(), embedded.target_ids.tolist(), strict=True):
        matches[query].add(target)
    matched = min(max(map(len, matches.values())), mining.top)  # to be passed over, so looked up beside
    scores, found = search(embedded.queries, embedded.targets[first], min(mining.top + matched, len(targets)))
    positives = np.einsum("nd,nd->n", embedded.queries, embedded.targets)
    limits = [max_negative_similarity(float(positive), mining) for positive in positives]
    result = []
    for number, query in enumerate(embedded.query_ids.tolist()):
        own = matches[query]
        close = [
            int(first[place])
            for place, score in zip(found[number], scores[number], strict=True)
            if int(targets[place]) not in own and score < limits[number]
        ]
        result.append(close[: mining.top])
    return result


def max_negative_similarity(positive: float, mining: MiningConfig) -> float:
    """What a negative's similarity has to be below, given the positive's (arXiv 2407.15831)."""
    limits = [math.inf]
    if mining.max_positive_ratio is not None:
        limits.append(
            min(mining.max_positive_ratio * positive, positive)
        )  # a share of a negative number would be above it
    if mining.margin is not None:
        limits.append(positive - mining.margin)
    return min(limits)


# 3. Let the model itself say which of them match after all.


class _Questions(Dataset[PackedBatch]):
    """About each candidate of some pairs, the question whether it matches."""

    def __init__(
        self, examples: Examples, embedded: EmbeddedPairs, found: list[list[int]], model: Cafe, mining: MiningConfig
    ) -> None:
        self.examples, self.places, self.found = examples, embedded.places, found
        self.chat_processor, self.packing, self.mining = model.chat_processor, model.packing, mining

    def __getitem__(self, numbers: list[int]) -> PackedBatch:
        groups = []
        for number in numbers:
            query = self._pair(number).query
            others = [self._pair(other).target for other in self.found[number]]
            groups.append(questions(query, others, self.chat_processor, self.mining.question))
        return pack(groups, [[]] * len(groups), self.packing)

    def _pair(self, number: int) -> Any:
        return self.examples[self.places[number]].pair


def questions(query: Content, others: Sequence[Content], chat_processor: ChatProcessor, question: str) -> list[Branch]:
    """The prompts that ask of each content whether it matches the query; they share the query's tokens."""
    done = []
    refs = [ref for content in (query, *others) for ref in content.images]
    shown = dict(zip(map(id, refs), chat_processor.decode_images(refs), strict=True))
    for other in others:
        asked = Content((*query.parts, "\n", *other.parts, f"\n{question}"))
        pictures = chat_processor.process_images([shown[id(ref)] for ref in asked.images])
        messages = dialogue_messages(Dialogue((Turn("user", asked),)), chat_processor.prompts)
        done.append(chat_processor.encode_prompt(messages, pictures))
    return done


@torch.inference_mode()
def filter_by_judge(
    model: Cafe,
    examples: Examples,
    embedded: EmbeddedPairs,
    found: list[list[int]],
    mining: MiningConfig,
    threshold: float,
) -> list[dict[int, float]]:
    """The candidates that are kept, and the score of each.

    Those that the model calls matches, because its probability of "yes" is not below the threshold, are dropped, or
    kept with that probability as their score where `mining.soft` says so. The others' is 0.
    """
    asked = [number for number, row in enumerate(found) if row]
    size = max(1, mining.batch_size // 4)
    groups = [asked[start : start + size] for start in range(0, len(asked), size)]
    data = _Questions(examples, embedded, found, model, mining)
    stream = make_loader(data, groups, mining.workers)
    kept: list[dict[int, float]] = [{} for _ in found]
    for numbers, laid in zip(groups, tqdm(stream, desc="judge", unit="batch", total=len(groups)), strict=True):
        hidden, _ = forward_packed(model.lvlm, laid)
        chances = iter(yes_probability(model, hidden).tolist())
        for number in numbers:
            scores = {other: next(chances) for other in found[number]}
            if mining.soft:
                kept[number] = {other: score if score >= threshold else 0.0 for other, score in scores.items()}
            else:
                kept[number] = {other: 0.0 for other, score in scores.items() if score < threshold}
    return kept


def yes_probability(model: Cafe, hidden: Float[Tensor, "questions dim"]) -> Float[Tensor, " questions"]:
    """The probability of "yes" against "no" as the next word, from the hidden state before it."""
    logits = compute_logits(model.lvlm, hidden)
    positive, negative = (_first_tokens(model.chat_processor, word) for word in ("yes", "no"))
    return torch.sigmoid(
        logits[:, sorted(positive - negative)].logsumexp(1) - logits[:, sorted(negative - positive)].logsumexp(1)
    )


def _first_tokens(chat_processor: ChatProcessor, word: str) -> set[int]:
    forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
    return {chat_processor.tokenizer(form, add_special_tokens=False)["input_ids"][0] for form in forms}


# 4. Write records that read back as they were.


def to_record(example: Example, output: Path) -> dict[str, Any]:
    """An example as a record of the format "pairs"; pictures without a file are written to `output`/images.

    Raises:
        CafeError: one of these is damaged, so far as is seen without decoding it; the record is named.
    """
    try:
        return _as_row(example, output)
    except CafeError as error:
        raise CafeError(f"{example.origin}: {error}") from None


def _as_row(example: Example, output: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"id": example.origin}
    if example.pair:
        for side, content in (("query", example.pair.query), ("positive", example.pair.target)):
            row[side], row[f"{side}_image"] = _marked(content, output)
        negatives = [_marked(negative, output) for negative in example.pair.negatives]
        row["negatives"] = [{"text": text, "images": images} for text, images in negatives]
        if example.pair.negative_scores:
            row["negative_scores"] = [round(score, 4) for score in example.pair.negative_scores]
    if example.dialogue:
        said = [(turn.role, *_marked(turn.content, output)) for turn in example.dialogue.turns]
        row["image"] = [image for _, _, images in said for image in images]
        row["conversations"] = [{"role": role, "content": text} for role, text, _ in said]
    return row


def _marked(content: Content, output: Path) -> tuple[str, list[str]]:
    """A content's text with marks where its pictures stand, and where those are kept."""
    # A user's words that look like a mark are broken up, as they are when they are rendered.
    texts = [part.replace(IMAGE_TOKEN, "< image>") if isinstance(part, str) else IMAGE_TOKEN for part in content.parts]
    return "".join(texts), [_kept(ref, output) for ref in content.images]


def _kept(ref: ImageRef, output: Path) -> str:
    if isinstance(ref.source, Path):
        return str(ref.source.absolute())
    data = ref.source
    if isinstance(data, Image.Image):
        out = io.BytesIO()
        data.save(out, "PNG")
        data = out.getvalue()
    with image_errors(ref), Image.open(io.BytesIO(data)) as image:
        suffix = (image.format or "image").lower()
    name = f"images/{hashlib.blake2b(data, digest_size=16).hexdigest()}.{suffix}"
    if not (output / name).is_file():
        (output / name).write_bytes(data)
    return name
