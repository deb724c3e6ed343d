"""The table of modes says what a clock said, and the modes do what they say."""

import statistics
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from cafe import Cafe
from cafe.errors import CafeError
from cafe.evaluation.latency import MODES, format_timings, list_images, run, time_modes


class Watched:
    """A model whose every call takes a time that a test can know."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = count()
        self.seen: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.now

    def _take(self, mode: str, size: int, seconds: float) -> None:
        self.seen.append((mode, size))
        self.now += seconds + 0.001 * next(self.calls)

    def embed(self, pictures, batch_size):
        self._take("embed", len(pictures), 1.0)

    def generate_batch(self, prompts, max_new_tokens, batch_size):
        self._take("generate", len(prompts), 2.0)

    def describe(self, pictures, prompt, max_new_tokens, batch_size):
        self._take("describe", len(pictures), 2.5)
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


def test_the_table_has_a_row_a_mode_and_batch_size():
    model = Watched()
    lines = format_timings(time_modes(model, [Path("a")], (1, 2), repeats=1, clock=model.clock)).splitlines()
    assert len(lines) == 2 + 2 * len(MODES)
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_one_prefill_gives_the_vectors_and_answers_of_both_modes(random_base, scenes):
    model = Cafe.load(random_base)
    pictures = list_images(scenes / "images" / "test", 3)
    vectors, answers = run(model, "both in one prefill", pictures, 4)
    apart, said = run(model, "embed, then generate", pictures, 4)
    assert answers == said and np.allclose(vectors, apart, atol=1e-4)
    assert run(model, "embed", pictures, 4)[1] == [] and run(model, "generate", pictures, 4)[0] is None


def test_pictures_of_every_kind_that_is_read_are_found(tmp_path):
    for name in ("a.bmp", "b.GIF", "c.png", "d.txt", "e.tiff"):
        (tmp_path / name).touch()
    assert [picture.name for picture in list_images(tmp_path)] == ["a.bmp", "b.GIF", "c.png", "e.tiff"]


def test_a_folder_without_pictures_is_one_sentence(tmp_path):
    with pytest.raises(CafeError, match="no pictures under"):
        list_images(tmp_path)
