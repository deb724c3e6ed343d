"""The metrics log: lines after the last saved step are dropped on resume, and trackers get what the file gets."""

import json
import math
import time

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cafe.errors import CafeError
from cafe.training.metrics_log import MetricsLogger, require_trackers


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state(True)


def lines(directory):
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_resume_drops_later_and_broken_log_lines(tmp_path):
    log = MetricsLogger(tmp_path, Accelerator(cpu=True), "run")
    for step in (1, 2, 3, 4):
        log.write(step, {"loss": float(step)})
    log.write(4, {"samples": [{"said": "a line\u2028break"}]})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "los')  # killed while writing
    log = MetricsLogger(tmp_path, Accelerator(cpu=True), "run", after=2)
    log.write(3, {"loss": 3.5, "grad_norm": math.nan})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.5)]
    assert lines(tmp_path)[-1]["grad_norm"] is None
    assert lines(tmp_path)[-1]["seconds"] >= lines(tmp_path)[1]["seconds"]


def test_tensorboard_gets_numbers_and_samples_and_purges_unsaved_steps(tmp_path):
    def accelerator() -> Accelerator:
        return Accelerator(cpu=True, log_with=require_trackers(["tensorboard"]), project_dir=tmp_path / "trackers")

    for after, loss in ((0, 1.0), (1, 2.0)):
        log = MetricsLogger(tmp_path, accelerator(), "run", after)
        for step in range(after + 1, 4):
            log.write(step, {"loss": loss * step, "samples": [{"said": "red"}]})
        log.close()
        time.sleep(1)  # files of one second are told apart by a count in their names, and 10 is read before 9
    board = EventAccumulator(str(tmp_path / "trackers" / "cafe")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.0), (2, 4.0), (3, 6.0)]
    assert any(tag.startswith("samples") for tag in board.Tags()["tensors"])


def test_missing_tracker_is_named():
    with pytest.raises(CafeError, match="tracker nowhere_installed is not installed"):
        require_trackers(["nowhere_installed"])


def test_folder_with_a_trackers_name_is_no_tracker(tmp_path, monkeypatch):
    (tmp_path / "nowhere_installed").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CafeError, match="tracker nowhere_installed is not installed"):
        require_trackers(["nowhere_installed"])
