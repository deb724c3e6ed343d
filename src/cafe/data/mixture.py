"""The order of an epoch: sources mixed by weight, runs of records from one source, fixed by the seed alone."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from random import Random

import numpy as np
from jaxtyping import Int64

from cafe.errors import RecipeError


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How several sources are mixed into one stream.

    Attributes:
        temperature: a source's share is proportional to weight * size ** (1 / temperature). 1 draws every record
            equally often; larger values even out large and small sources, in the limit to equal shares.
        sub_batch: records in a row that come from the same source. 1 mixes record by record; 0 draws every contrastive
            batch, over all processes, from one source, as MMEB needs; a number between interleaves sub-batches of one
            source each within a batch, as VLM2Vec does. It has to divide the contrastive batch.
    """

    temperature: float = 1.0
    sub_batch: int = 1


PROPORTIONAL = Mixture()


@dataclass(frozen=True)
class EpochOrder:
    """One epoch's records in order: for each the source, and the record within it."""

    sources: Int64[np.ndarray, " records"]
    records: Int64[np.ndarray, " records"]


def epoch_order(
    sizes: Sequence[Sequence[int]],
    windows: Sequence[int],
    weights: Sequence[float],
    mixture: Mixture,
    batch_size: int,
    rng: Random,
) -> EpochOrder:
    """Draw the order of an epoch: as many whole batches as the sources that have a weight hold records for.

    A source is used up without repetition. One that is drawn more often than it has records starts again, in another
    order.

    Args:
        sizes: for each source the lengths of its chunks, which are best read together.
        windows: for each source the number of chunks that are shuffled together.
        weights: of each source.
        mixture: how the sources are mixed.
        batch_size: records of a contrastive batch over all processes.
        rng: the epoch's generator, which is used up here.

    Raises:
        RecipeError: there are fewer records than a batch has, sub-batches do not divide a batch, a weight or the
            temperature is out of range, or a source's share is too small.
    """
    totals = [sum(chunks) for chunks in sizes]
    run = mixture.sub_batch or batch_size
    num_batches = _check_mixture(totals, weights, mixture, batch_size)
    counts = _runs_per_source(totals, weights, mixture.temperature, num_batches * batch_size // run, run)

    # The records of each source in an order of its own, drawn anew for each pass over it.
    drawn = []
    for chunks, window, total, count in zip(sizes, windows, totals, counts, strict=True):
        num_passes = -(-count * run // total)  # rounded up: the last pass may be used in part
        passes = [windowed_shuffle(chunks, window, rng) for _ in range(num_passes)]
        drawn.append(np.concatenate([np.empty(0, np.int64), *passes])[: count * run])

    # Which source each run comes from. An `array` is shuffled as a list is, in less memory.
    schedule = array("q", np.repeat(np.arange(len(counts)), counts).tolist())
    rng.shuffle(schedule)
    sources = np.repeat(np.frombuffer(schedule, np.int64), run)
    # Each source's records fill its own places, in their order.
    records = np.empty_like(sources)
    for source, source_records in enumerate(drawn):
        records[sources == source] = source_records
    return EpochOrder(sources, records)


def _check_mixture(totals: Sequence[int], weights: Sequence[float], mixture: Mixture, batch_size: int) -> int:
    """Return the number of batches in an epoch.

    Raises:
        RecipeError: as `epoch_order` says.
    """
    if mixture.temperature <= 0 or min(weights) < 0 or not any(weights):
        raise RecipeError(
            "data.mixture.temperature and the sum of the sources' weights should be above 0, and no weight below."
        )
    # A run must not reach over the end of a batch, or that batch would mix sources.
    run = mixture.sub_batch or batch_size
    if run < 1 or batch_size % run:
        raise RecipeError(
            f"data.mixture.sub_batch is {run}, which does not divide the contrastive batch of {batch_size}."
        )
    # A source with weight 0 is not read, so its records do not make an epoch longer.
    num_records = sum(compress(totals, weights))
    if num_records < batch_size:
        raise RecipeError(f"The data holds {num_records} records, fewer than one batch of {batch_size}.")
    return num_records // batch_size


def _runs_per_source(
    totals: Sequence[int], weights: Sequence[float], temperature: float, num_runs: int, run: int
) -> list[int]:
    """Return how many of an epoch's runs of records come from each source.

    Args:
        totals: the number of records of each source.
        weights: of each source.
        temperature: see `Mixture`.
        num_runs: runs of an epoch.
        run: records of a run, for messages.

    Raises:
        RecipeError: a source that has a share gets no run.
    """
    shares = mixing_weights(totals, weights, temperature)
    # In whole runs, so that a batch never mixes sources where it should not.
    counts = largest_remainder(shares, num_runs)
    for source, (share, count) in enumerate(zip(shares, counts, strict=True)):
        if share and not count:
            raise RecipeError(
                f"data.sources[{source}] is {share:.2%} of the mixture, too little for one of an epoch's {num_runs} "
                f"runs of {run} records: raise its weight or data.mixture.temperature, or remove it."
            )
    return counts


def mixing_weights(sizes: Sequence[int], weights: Sequence[float], temperature: float) -> list[float]:
    """Return the share of the stream (0 to 1) that comes from each source.

    Args:
        sizes: the number of records of each source.
        weights: of each source.
        temperature: see `Mixture`.
    """
    largest = max(compress(sizes, weights))  # relative to it, no power overflows
    raw = []
    for size, weight in zip(sizes, weights, strict=True):
        # A source that is not drawn may be larger than `largest`, and would overflow.
        raw.append(weight * (size / largest) ** (1 / temperature) if weight else 0.0)
    total = sum(raw)
    return [part / total for part in raw]


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Round shares of a total to whole numbers that add up to it; the largest remainders are rounded up.

    Args:
        shares: from 0 to 1; they add up to 1.
        total: to be divided.
    """
    exact = [share * total for share in shares]
    counts = [int(number + 1e-9) for number in exact]  # a whole number may come out as 2.9999999
    missing = total - sum(counts)
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[:missing]:
        counts[index] += 1
    return counts


def windowed_shuffle(chunks: Sequence[int], window: int, rng: Random) -> Int64[np.ndarray, " records"]:
    """Shuffle all records of a source: the order of its chunks, then the records of some chunks at a time.

    Args:
        chunks: the lengths of its chunks.
        window: the number of chunks whose records are mixed with each other.
        rng: the generator.
    """
    starts = np.cumsum([0, *chunks]).tolist()
    order = list(range(len(chunks)))
    rng.shuffle(order)
    # Only a window's chunks are open at a time, so that reading stays near to sequential.
    parts = []
    for first in range(0, len(order), window):
        records = array("q")
        for chunk in order[first : first + window]:
            records.extend(range(starts[chunk], starts[chunk + 1]))
        rng.shuffle(records)
        parts.append(np.frombuffer(records, np.int64))
    return np.concatenate(parts)
