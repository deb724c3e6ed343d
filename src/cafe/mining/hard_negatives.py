"""Hard negatives, found by a checkpoint: what it takes for a match and is none.

Every query is compared with every target. The closest targets that are not its own become its negatives, save those so
close to the positive that they may be matches themselves (positive-aware filtering, NV-Retriever, arXiv 2407.15831).
The same model's generative half may then judge each: what it says "yes" to is dropped, or becomes a soft target. The
result is a new source.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cafe.data.records import OpenedSource
from cafe.errors import CafeError
from cafe.mining.config import MiningConfig
from cafe.mining.embed import EmbeddedPairs, Examples, embed_pairs
from cafe.mining.judge import filter_by_judge
from cafe.mining.write import to_record
from cafe.model import Cafe
from cafe.search import search


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
