"""The whole of examples/another_hand, a hundredth of it: what it writes, and that the same command resumes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cafe.model import Cafe

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="npm, which has the drawings, is not installed")


def run(directory: Path) -> str:
    """Run the command as a user does, and return what it prints."""
    command = [sys.executable, "-m", "another_hand", str(directory), "--cut"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def test_runs_from_packages_to_tables_and_resumes(tmp_path):
    directory = tmp_path / "another-hand"
    assert "| on the development hand |" in run(directory)
    for name in ("tables.md", "ablation/report.html", "ablation/ablation.json", "pictures/another-hand-queries.png"):
        assert (directory / name).stat().st_size > 0, name
    # The joint run is a checkpoint like any other.
    model = Cafe.load(str(directory / "ablation" / "joint-0" / "checkpoint"))
    assert model.embed(["a tiger"]).shape == (1, 160)

    weights = directory / "base" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    (directory / "tables.md").unlink()
    run(directory)
    assert weights.stat().st_mtime_ns == written
    assert (directory / "tables.md").is_file()
