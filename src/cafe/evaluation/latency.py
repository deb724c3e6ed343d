"""Mode switching: how long embedding, generation and both take, at several batch sizes.

From pictures on disk to vectors and text, as a user waits for them: decoding and processing are inside. Both together
are measured twice, one after the other and in one prefill (`Cafe.describe`).
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

PROMPT = "Describe the image."
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
MODES = ("embed", "generate", "embed, then generate", "both in one prefill")


@dataclass(frozen=True)
class Timing:
    """One row of the table: a mode at a batch size; times in seconds for the whole batch."""

    mode: str
    batch_size: int
    p50: float
    p95: float

    @property
    def throughput(self) -> float:
        """Pictures a second, at the median."""
        return self.batch_size / self.p50


def time_modes(
    model: Any,
    pictures: Sequence[Path],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = 20,
    max_new_tokens: int = 32,
    clock: Callable[[], float] = time.perf_counter,
    progress: bool = False,
) -> list[Timing]:
    """Times every mode at every batch size, `repeats` times each, in turn, after one try that does not count.

    The modes alternate, so that what else the machine does falls on all alike.

    Raises:
        CafeError: there are no pictures.
    """
    if not pictures:
        raise CafeError("There are no pictures to measure with.")
    timings = []
    bar = tqdm(total=len(batch_sizes) * (repeats + 1) * len(MODES), desc="modes", unit="run", disable=not progress)
    with bar:
        for size in batch_sizes:
            seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
            for repeat in range(repeats + 1):
                # Other pictures each time, in a circle where there are too few.
                chosen = [pictures[(repeat * size + number) % len(pictures)] for number in range(size)]
                for mode in MODES:
                    start = clock()
                    run(model, mode, chosen, max_new_tokens)
                    seconds[mode].append(clock() - start)
                    bar.update()
            for mode, times in seconds.items():
                p50, p95 = np.quantile(times[1:], [0.5, 0.95])
                timings.append(Timing(mode, size, float(p50), float(p95)))
    return timings


def run(model: Any, mode: str, pictures: Sequence[Path], max_new_tokens: int) -> tuple[Any, list[str]]:
    """One batch in one mode; its vectors and answers, None and empty where the mode gives none."""
    size = len(pictures)
    prompts = [Content((ImageRef(picture), PROMPT)) for picture in pictures]
    if mode == "both in one prefill":
        vectors, answers = model.describe(pictures, PROMPT, max_new_tokens, batch_size=size)
        return vectors, answers
    vectors = model.embed(pictures, batch_size=size) if mode.startswith("embed") else None
    said = model.generate_batch(prompts, max_new_tokens, batch_size=size) if "generate" in mode else []
    return vectors, said


def format_timings(timings: Iterable[Timing]) -> str:
    """A Markdown table, a row a mode and batch size."""
    lines = ["| mode | batch size | p50, ms | p95, ms | pictures a second |", "|---|---|---|---|---|"]
    lines += [
        f"| {t.mode} | {t.batch_size} | {1000 * t.p50:.1f} | {1000 * t.p95:.1f} | {t.throughput:.1f} |" for t in timings
    ]
    return "\n".join(lines)


def list_images(folder: Path, most: int = 512) -> list[Path]:
    """Up to `most` pictures under a folder, in the order of their names.

    Raises:
        CafeError: there is none.
    """
    found = sorted(path for path in folder.rglob("*") if is_image_name(path.name))[:most]
    if not found:
        raise CafeError(f"There are no pictures under {folder}.")
    return found
