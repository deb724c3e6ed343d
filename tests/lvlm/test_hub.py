"""A model's name that leads nowhere is told at once or within seconds, with the nearest name."""

import os
import subprocess
import sys
import time

import pytest

from cafe.errors import CheckpointError
from cafe.lvlm.hub import ensure_exists

# Each in a process of its own: the Hub's client reads the environment when it is imported.
LOAD = """
import sys, time
from cafe.cli.main import main
import cafe.model
start = time.monotonic()
status = main(sys.argv[1:])
print(status, time.monotonic() - start)
"""


def run(*words: str, **environment: str) -> tuple[int, float, str]:
    """The exit status of a command, how many seconds it took behind its imports, and what it said."""
    names = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"}
    kept = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *words], env=kept | environment, capture_output=True, text=True, timeout=120
    )
    status, seconds = done.stdout.split()[-2:]
    return int(status), float(seconds), done.stderr


@pytest.mark.parametrize("base", ["owner/mistyped", "mistyped"])
def test_a_mistyped_base_is_told_at_once_offline(base, tmp_path):
    images = tmp_path / "0.jpg"
    images.touch()
    status, seconds, said = run("bench-modes", base, "--data", str(tmp_path), HF_HUB_OFFLINE="1")
    assert status == 1 and seconds < 5
    assert f"cafe: There is no directory {base}, the Hub's cache holds no model of that name" in said
    assert "HF_HUB_OFFLINE" in said and said.count("\n") == 1


def test_a_mistyped_base_is_told_within_10_seconds_where_the_hub_cannot_be_reached(tmp_path):
    (tmp_path / "0.jpg").touch()
    refusing = "http://127.0.0.1:9"
    status, seconds, said = run("bench-modes", "owner/mistyped", "--data", str(tmp_path), HF_ENDPOINT=refusing)
    assert status == 1 and seconds < 10
    assert "There is no directory owner/mistyped, and the Hugging Face Hub could not be reached: " in said
    assert said.count("\n") == 1


def test_a_name_among_runs_is_a_path_and_the_nearest_is_suggested(tmp_path, monkeypatch):
    def asked(*args: object, **options: object) -> None:
        raise AssertionError("the Hub is asked")

    monkeypatch.setattr("cafe.lvlm.hub.HfApi.model_info", asked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "scenes").mkdir(parents=True)
    (tmp_path / "runs" / "scenes" / "run.json").touch()
    start = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        ensure_exists("runs/scens")
    assert str(error.value) == "There is no directory runs/scens (did you mean runs/scenes?)."
    assert time.monotonic() - start < 1
    with pytest.raises(AssertionError, match="the Hub is asked"):  # where no run is beside it, it may be a Hub id
        ensure_exists("owner/model")


def test_a_directory_and_a_cached_model_ask_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("cafe.lvlm.hub.HfApi.model_info", None)
    monkeypatch.setattr("cafe.lvlm.hub.try_to_load_from_cache", lambda name, file: f"/cache/{file}")
    ensure_exists(tmp_path)
    ensure_exists("owner/cached")
