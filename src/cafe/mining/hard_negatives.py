"""Mine hard negatives with a checkpoint: targets that it takes for a match and that are none.

Every query is compared with every target. The nearest targets other than its own become its negatives, except those so
near to the positive that they may be matches themselves (positive-aware filtering, NV-Retriever, arXiv 2407.15831). The
same model's generative half may then judge each candidate: what it calls a match is dropped, or becomes a soft target.
The result is written as a new source.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cafe.data.records import OpenedSource
from cafe.errors import CafeError, RecipeError
from cafe.mining.config import MiningConfig
from cafe.mining.embed import EmbeddedPairs, Examples, embed_pairs
from cafe.mining.judge import select_negatives
from cafe.mining.write import write_source
from cafe.model import Cafe
from cafe.search import search


def mine(
    model: Cafe,
    sources: Sequence[OpenedSource],
    output: Path,
    config: MiningConfig,
    seed: int = 0,
    max_tokens: int | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Write the sources' records with mined hard negatives as one new source, of the format "pairs".

    Mined negatives replace those that the records had. Where a record has several captions, the one chosen now remains
    its target.

    Args:
        model: embeds, and judges.
        sources: the opened sources.
        output: a folder for `records.jsonl`, `quarantine.jsonl`, and `images/` for images that have no file.
        config: how negatives are mined.
        seed: of choices within records.
        max_tokens: the longest sequence.
        report: prints a line.

    Returns:
        The path of the new source.

    Raises:
        RecipeError: the new source would overwrite one that is read.
        CafeError: no record holds a pair.
    """
    # The new source is written while the old ones are read.
    path = output / "records.jsonl"
    if path.resolve() in {Path(file.name).resolve() for opened in sources for file in opened.files}:
        raise RecipeError(f"The new source would overwrite {path}, which is mined: name another output.")
    (output / "images").mkdir(parents=True, exist_ok=True)  # fails before the work if it cannot be written

    examples = Examples(sources, seed)
    record_keys = examples.keys()
    embedded = embed_pairs(model, examples, record_keys, config, max_tokens)
    if not embedded.record_keys:
        raise CafeError("No record of these sources holds a pair that can be read: there is nothing to mine.")
    candidates = find_candidates(embedded, config)
    negatives = select_negatives(model, examples, embedded, candidates, config)
    bad_records = write_source(output, examples, embedded, negatives, config.soft)

    counts = list(map(len, negatives))
    report(
        f"{sum(counts):,} hard negatives for {sum(map(bool, counts)):,} of {len(counts):,} pairs; "
        f"{len(bad_records):,} of {len(record_keys):,} records are bad. The new source: {{path: {path}, format: pairs}}"
    )
    return path


def find_candidates(embedded: EmbeddedPairs, config: MiningConfig) -> list[list[int]]:
    """Return for each pair the numbers of pairs whose targets may be its hard negatives, the hardest first.

    A target equal to the pair's own, or paired elsewhere with an equal query, is a match and not a negative.
    """
    # Equal targets are one row of the corpus, or the nearest `top` would be copies of each other.
    target_ids, first_pair = np.unique(embedded.target_ids, return_index=True)
    matches: dict[int, set[int]] = defaultdict(set)
    for query, target in zip(embedded.query_ids.tolist(), embedded.target_ids.tolist(), strict=True):
        matches[query].add(target)

    # Matches are near and will be passed over, so as many more are searched for.
    most_matches = min(max(map(len, matches.values())), config.top)
    top = min(config.top + most_matches, len(target_ids))
    similarities, nearest = search(embedded.queries, embedded.targets[first_pair], top)
    # The embeddings are unit vectors, so inner products are cosine similarities.
    positives = np.einsum("nd,nd->n", embedded.queries, embedded.targets)
    limits = [max_negative_similarity(float(positive), config) for positive in positives]

    candidates = []
    for number, query in enumerate(embedded.query_ids.tolist()):
        row = [
            int(first_pair[index])
            for index, similarity in zip(nearest[number], similarities[number], strict=True)
            if int(target_ids[index]) not in matches[query] and similarity < limits[number]
        ]
        candidates.append(row[: config.top])
    return candidates


def max_negative_similarity(positive: float, config: MiningConfig) -> float:
    """Return the similarity that a negative must not reach, given the positive's (arXiv 2407.15831)."""
    limits = [math.inf]
    if config.max_positive_ratio is not None:
        # A fraction of a negative similarity would lie above it.
        limits.append(min(config.max_positive_ratio * positive, positive))
    # With both limits, a negative has to keep both.
    if config.margin is not None:
        limits.append(positive - config.margin)
    return min(limits)
