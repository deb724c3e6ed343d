"""Which record comes when: sources mixed by weight, batches of one source, an order fixed by the seed alone."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Int64

from cafe.errors import CafeError


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How several sources make one stream.

    Attributes:
        temperature: a source's share is weight * size ** (1 / temperature): 1 draws each record as often as any other,
            more evens out large and small sources, and in the limit all are drawn alike.
        sub_batch: records in a row that come from the same source. 1 mixes record by record; 0 draws every contrastive
            batch, over all processes, from one source, as MMEB needs; a number between interleaves sub-batches of one
            source each in a batch, as VLM2Vec does. It has to divide the contrastive batch.
    """

    temperature: float = 1.0
    sub_batch: int = 1


PROPORTIONAL = Mixture()


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's records in their order: of which source, and its which record."""

    sources: Int64[np.ndarray, " records"]
    records: Int64[np.ndarray, " records"]


def epoch_order(
    sizes: Sequence[Sequence[int]],
    windows: Sequence[int],
    weights: Sequence[float],
    mixture: Mixture,
    batch: int,
    rng: Random,
) -> EpochOrder:
    """The order of an epoch, which is as many whole batches as there are records for in the sources with a weight.

    A source is gone through without repetition; one that is drawn more often than it has records starts again, in
    another order.

    Args:
        sizes: for each source the lengths of its chunks, which are read best together.
        windows: for each source, how many chunks are shuffled together.
        weights: of each source.
        mixture: how they are mixed.
        batch: records of a contrastive batch over all processes.
        rng: of the epoch; all of it is used here.

    Raises:
        CafeError: there are fewer records than a batch has, the sub-batches do not fill it, or a share is no share.
    """
    if mixture.temperature <= 0 or min(weights) < 0 or not any(weights):
        raise CafeError(
            "data.mixture.temperature and the sum of the sources' weights have to be above 0, no weight below."
        )
    run = mixture.sub_batch or batch
    if run < 1 or batch % run:
        raise CafeError(f"data.mixture.sub_batch is {run}, which does not divide the contrastive batch of {batch}.")
    totals = [sum(chunks) for chunks in sizes]
    there = sum(total for total, weight in zip(totals, weights, strict=True) if weight)
    epoch = there // batch * batch
    if not epoch:
        raise CafeError(f"The data holds {there} records, fewer than one batch of {batch}.")
    parts = mixing_weights(totals, weights, mixture.temperature)
    counts = largest_remainder(parts, epoch // run)
    for source, (part, count) in enumerate(zip(parts, counts, strict=True)):
        if part and not count:
            raise CafeError(
                f"data.sources[{source}] is {part:.2%} of the mixture, too little for one of an epoch's {epoch // run} "
                f"runs of {run} records: raise its weight or data.mixture.temperature, or leave it out."
            )
    drawn = []
    for chunks, window, total, count in zip(sizes, windows, totals, counts, strict=True):
        passes = [windowed_shuffle(chunks, window, rng) for _ in range(-(-count * run // total))]
        drawn.append(np.concatenate([np.empty(0, np.int64), *passes])[: count * run])
    schedule = array("q", [source for source, count in enumerate(counts) for _ in range(count)])
    rng.shuffle(schedule)
    sources = np.repeat(np.frombuffer(schedule, np.int64), run)
    records = np.empty_like(sources)
    for source, own in enumerate(drawn):
        records[sources == source] = own
    return EpochOrder(sources, records)


def mixing_weights(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """The part of the stream (0 to 1) that each source has."""
    pairs = list(zip(sizes, weights, strict=True))
    largest = max(size for size, weight in pairs if weight)  # beside it no power is too large a number
    raw = [weight * (size / largest) ** (1 / temperature) if weight else 0.0 for size, weight in pairs]
    return [part / sum(raw) for part in raw]


def largest_remainder(parts: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to some parts, which add up to a total: the largest remainders are rounded up."""
    exact = [part * total for part in parts]
    counts = [int(number + 1e-9) for number in exact]
    short = total - sum(counts)
    for index in sorted(range(len(parts)), key=lambda index: counts[index] - exact[index])[:short]:
        counts[index] += 1
    return counts


def windowed_shuffle(chunks: Sequence[int], window: int, rng: Random) -> Int64[np.ndarray, " records"]:
    """All records of a source by lot: its chunks in any order, and those of a window mixed with each other."""
    starts = np.cumsum([0, *chunks]).tolist()
    order = list(range(len(chunks)))
    rng.shuffle(order)
    parts = []
    for first in range(0, len(order), window):
        together = array("q")
        for chunk in order[first : first + window]:
            together.extend(range(starts[chunk], starts[chunk + 1]))
        rng.shuffle(together)
        parts.append(np.frombuffer(together, np.int64))
    return np.concatenate(parts)
