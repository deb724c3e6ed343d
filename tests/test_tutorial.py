"""The tutorial: its commands run in their order, from a folder of images to an answer, with smaller numbers."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from cafe.cli.main import main

PAGE = (Path(__file__).parents[1] / "docs" / "tutorial.md").read_text()
# As the page says, three steps are enough to see everything work.
SMALLER = {
    "--train 8000 --test 500": "--train 24 --test 24",
    "--sample 1000": "--sample 4",
    "max_steps: 230": "max_steps: 3",
    "batch_size: 48": "batch_size: 4",
}


def make_smaller(code):
    """Replace the numbers of the page by those of a quick run."""
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    return code


def run_shell(code):
    """Run the commands of a block: those of `cafe` in this process, because others take long to start."""
    lines = make_smaller(code).splitlines(keepends=True)
    others = "".join(line for line in lines if not line.startswith("cafe "))
    if others:
        subprocess.run(others, shell=True, check=True)
    for line in lines:
        if line.startswith("cafe "):
            assert main(shlex.split(line)[1:]) == 0, line


def test_the_tutorials_commands_run_in_their_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lancedb")
    assert all(number in PAGE for number in SMALLER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    outputs = []
    for language, code in blocks:
        if language == "sh":
            run_shell(code)
        else:
            exec(code, {"__name__": "tutorial"})
        outputs.append(capsys.readouterr().out)

    [written, _, checked, _, indexed, found, answered, in_python] = outputs
    assert "24 test images" in written
    assert re.search(r"records +24\n", checked) and re.search(r"bad +0\n", checked)
    assert (tmp_path / "runs" / "shapes" / "checkpoint" / "cafe.json").is_file()
    assert "24 added" in indexed and "24 images in" in indexed
    assert len(re.findall(r"test-0-\d+\.png", found)) == 6
    assert re.search(r"^\[3\] ", answered, re.MULTILINE)
    assert in_python.count(".png") == 4
