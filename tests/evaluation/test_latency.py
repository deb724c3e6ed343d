"""Test that the table of modes holds the times of the clock, and that the modes do what their names say."""

import statistics
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from cafe import Cafe
from cafe.errors import CafeError
from cafe.evaluation.latency import MODES, format_timings, list_images, run, time_modes


class Watched:
    """Take a known time for every call."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = count()
        self.seen: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.now

    def _take(self, mode: str, size: int, seconds: float) -> None:
        self.seen.append((mode, size))
        self.now += seconds + 0.001 * next(self.calls)

    def embed(self, images, batch_size):
        self._take("embed", len(images), 1.0)

    def generate_batch(self, prompts, max_new_tokens, batch_size):
        self._take("generate", len(prompts), 2.0)

    def embed_and_generate_batch(self, images, prompt, max_new_tokens, batch_size):
        self._take("embed and generate", len(images), 2.5)
        return None, []


def test_median_and_tail_are_those_of_the_clock():
    model = Watched()
    timings = time_modes(model, [Path("a"), Path("b"), Path("c")], (1, 4), repeats=21, clock=model.clock)
    assert [(timing.mode, timing.batch_size) for timing in timings] == [(m, size) for size in (1, 4) for m in MODES]
    # Each round makes five calls; call number n takes n ms more. The first round does not count.
    embedding = [1.0 + 0.001 * (5 * number) for number in range(1, 22)]
    assert timings[0].p50 == pytest.approx(statistics.median(embedding))
    assert timings[0].p95 == pytest.approx(np.percentile(embedding, 95))
    assert timings[0].throughput == pytest.approx(1 / statistics.median(embedding))
    assert {size for _, size in model.seen} == {1, 4}
    assert timings[4].throughput == pytest.approx(4 / timings[4].p50)


def test_the_table_has_a_row_per_mode_and_batch_size():
    model = Watched()
    lines = format_timings(time_modes(model, [Path("a")], (1, 2), repeats=1, clock=model.clock)).splitlines()
    assert len(lines) == 2 + 2 * len(MODES)
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_one_prefill_gives_the_vectors_and_answers_of_both_modes(random_base, scenes):
    model = Cafe.load(random_base)
    images = list_images(scenes / "images" / "test", 3)
    vectors, answers = run(model, "both in one prefill", images, 4)
    separate, separate_answers = run(model, "embed, then generate", images, 4)
    assert answers == separate_answers and np.allclose(vectors, separate, atol=1e-4)
    assert run(model, "embed", images, 4)[1] == [] and run(model, "generate", images, 4)[0] is None


def test_images_in_every_supported_format_are_listed(tmp_path):
    for name in ("a.bmp", "b.GIF", "c.png", "d.txt", "e.tiff"):
        (tmp_path / name).touch()
    assert [image.name for image in list_images(tmp_path)] == ["a.bmp", "b.GIF", "c.png", "e.tiff"]


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(CafeError, match="no images in"):
        list_images(tmp_path)
