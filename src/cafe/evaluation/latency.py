"""Time embedding, generation and both together, at several batch sizes.

The times run from image files to vectors and text, as a user waits for them: decoding and processing are included. Both
together are measured twice, as two calls and in one prefill (`Cafe.embed_and_generate_batch`).
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cafe.content import Content, ImageRef
from cafe.data.image_fields import is_image_name
from cafe.errors import CafeError
from cafe.lvlm.prompts import DESCRIBE_PROMPT

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
MODES = ("embed", "generate", "embed, then generate", "both in one prefill")


@dataclass(frozen=True)
class Timing:
    """Hold one row of the table: a mode at a batch size; times in seconds for the whole batch."""

    mode: str
    batch_size: int
    p50: float
    p95: float

    @property
    def throughput(self) -> float:
        """Images per second, at the median."""
        return self.batch_size / self.p50


def time_modes(
    model: Any,
    images: Sequence[Path],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = 20,
    max_new_tokens: int = 32,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
) -> list[Timing]:
    """Time every mode at every batch size `repeats` times, after one untimed warm-up.

    Args:
        model: a `Cafe`.
        images: the files to measure with; used again from the first one where there are too few.
        batch_sizes: the batch sizes.
        repeats: number of timings per mode and batch size.
        max_new_tokens: maximum number of tokens in an answer.
        clock: returns the time in seconds.
        progress: show a progress bar.

    Raises:
        CafeError: there are no images.
    """
    if not images:
        raise CafeError("There are no images to measure with.")
    timings = []
    bar = tqdm(total=len(batch_sizes) * (repeats + 1) * len(MODES), desc="modes", unit="run", disable=not progress)
    with bar:
        for size in batch_sizes:
            seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
            for repeat in range(repeats + 1):
                # Each repeat reads other images, so that no cache of files or features makes the later ones faster.
                batch = [images[(repeat * size + number) % len(images)] for number in range(size)]
                # The modes alternate, so that other load on the machine affects all of them alike.
                for mode in MODES:
                    start = clock()
                    run(model, mode, batch, max_new_tokens)
                    seconds[mode].append(clock() - start)
                    bar.update()
            # The first run of each mode is the warm-up: it allocates memory and compiles kernels.
            timings += [_summarize(mode, size, times[1:]) for mode, times in seconds.items()]
    return timings


def _summarize(mode: str, batch_size: int, seconds: Sequence[float]) -> Timing:
    """Summarize the times of one mode by their median and their 95th percentile."""
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return Timing(mode, batch_size, float(p50), float(p95))


def run(model: Any, mode: str, images: Sequence[Path], max_new_tokens: int) -> tuple[Any, list[str]]:
    """Run one batch in one mode.

    Returns:
        the embeddings, None if the mode gives none; and the answers, empty if it gives none.
    """
    size = len(images)  # everything in one batch
    if mode == "both in one prefill":
        vectors, answers = model.embed_and_generate_batch(images, DESCRIBE_PROMPT, max_new_tokens, batch_size=size)
        return vectors, answers
    # "embed, then generate" makes both calls, each of which encodes the images anew.
    vectors, answers = None, []
    if mode.startswith("embed"):
        vectors = model.embed(images, batch_size=size)
    if "generate" in mode:
        prompts = [Content((ImageRef(image), DESCRIBE_PROMPT)) for image in images]
        answers = model.generate_batch(prompts, max_new_tokens, batch_size=size)
    return vectors, answers


def format_timings(timings: Iterable[Timing]) -> str:
    """Format a Markdown table with a row per mode and batch size."""
    lines = ["| mode | batch size | p50, ms | p95, ms | images per second |", "|---|---|---|---|---|"]
    for timing in timings:
        # Seconds become milliseconds.
        p50, p95 = 1000 * timing.p50, 1000 * timing.p95
        lines.append(f"| {timing.mode} | {timing.batch_size} | {p50:.1f} | {p95:.1f} | {timing.throughput:.1f} |")
    return "\n".join(lines)


def list_images(folder: Path, limit: int = 512) -> list[Path]:
    """List up to `limit` images in a folder and its subfolders, in the order of their names.

    Raises:
        CafeError: there is none.
    """
    images = sorted(path for path in folder.rglob("*") if is_image_name(path.name))[:limit]
    if not images:
        raise CafeError(f"There are no images in {folder}.")
    return images
