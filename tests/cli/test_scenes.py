"""The quickstart: what it makes, that it resumes, and that the commands it ends with run."""

import shlex
import shutil
import sys

import pytest

from cafe.cli.main import main


@pytest.fixture
def quickstart(random_base, scenes, tmp_path, monkeypatch):
    """Return the words of a small quickstart in a directory that has its data; evaluations are left out."""
    pytest.importorskip("lancedb")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(scenes, tmp_path / "quick" / "scenes")
    # Those of `cafe evaluate` and `cafe report` have tests of their own, and take most of the time.
    monkeypatch.setattr("cafe.evaluation.runner.measure", lambda model, data, output: None)
    monkeypatch.setattr("cafe.evaluation.report.page.write_report", lambda output, runs: None)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        f"output: x\nmodel: {{base: {random_base}}}\nmax_steps: 1\nbatch_size: 4\n"
        "data: {num_workers: 0, sources: [{path: scenes/llava_train.json}]}\n"
    )
    return ["quickstart", "--directory", "quick", "--recipe", str(recipe)]


def commands_in(output):
    """Return the words after `cafe` of each command that was printed."""
    lines = [line for line in output.splitlines() if line.startswith("  ")]
    return [shlex.split(line.partition("cafe ")[2]) for line in lines]


def test_the_quickstart_indexes_its_test_images_and_its_commands_run(quickstart, capsys):
    assert main(quickstart) == 0
    commands = commands_in(capsys.readouterr().out)
    assert [words[0] for words in commands] == ["search", "search", "ask", "serve"]
    *commands, serve = commands
    assert serve[1:] == ["--collection", commands[0][-1]]  # it would run until it is stopped
    for words in commands:
        assert main(words) == 0
        assert "test-0-0000" in capsys.readouterr().out
    assert main(["collections", "info", "quick/collection"]) == 0
    assert "images        24\n" in capsys.readouterr().out


def test_a_quickstart_that_is_run_again_has_nothing_left_to_do(quickstart, tmp_path, capsys):
    assert main(quickstart) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "quick" / "collection").rglob("*.lance")}
    first = capsys.readouterr().out.splitlines()[-6:]
    assert main(quickstart) == 0
    assert capsys.readouterr().out.splitlines()[-6:] == first
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "quick" / "collection").rglob("data/*.lance")}
    assert files.items() <= before.items()


def test_without_lancedb_the_quickstart_says_how_to_get_it(quickstart, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lancedb", None)
    assert main(quickstart) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "The test images can also be searched and asked about. Collections need the package lancedb: "
        "pip install 'cafe-lvlm[index]'."
    )
