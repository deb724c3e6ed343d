"""The whole of examples/another_hand, a hundredth of it: what it writes, and that the same command resumes."""

import shutil

import pytest

from another_hand.__main__ import CUT, run
from cafe.model import Cafe

pytestmark = pytest.mark.skipif(
    shutil.which("npm") is None, reason="the drawings come from npm, which is not installed"
)


def test_runs_from_packages_to_tables_and_resumes(tmp_path, capsys):
    directory = tmp_path / "another-hand"
    run(directory, CUT)
    for name in ("tables.md", "ablation/report.html", "ablation/ablation.json", "pictures/another-hand-queries.png"):
        assert (directory / name).stat().st_size > 0, name
    assert "| gate |" in capsys.readouterr().out
    # The joint run is a checkpoint like any other.
    model = Cafe.load(str(directory / "ablation" / "joint-0" / "checkpoint"))
    assert model.embed(["a tiger"]).shape == (1, 160)

    weights = directory / "base" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    (directory / "tables.md").unlink()
    run(directory, CUT)
    assert weights.stat().st_mtime_ns == written
    assert (directory / "tables.md").is_file()
