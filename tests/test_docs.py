"""The documentation: files and links that pages name exist, the site builds, and the worked examples run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {"recipe.md", "commands.md"}  # by docs/hooks.py
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", EXTENDING, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_links_that_a_page_names_exist(page):
    text = re.sub(r"```diff\n.*?```", "", page.read_text(), flags=re.DOTALL)  # a diff may name a file that it adds
    files = re.findall(r"(?<![/\w.-])(?:src/cafe|tests|benchmarks|recipes|docs)/[\w./-]+\.(?:py|yaml|md|jinja)\b", text)
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert [name for name in files if not (ROOT / name).exists() and name != "recipes/my.yaml"] == []  # the reader's
    missing = [link for link in links if not (page.parent / link).exists() and Path(link).name not in GENERATED]
    assert missing == []
    assert set(re.findall(r"\]\[([\w-]+)\]", text)) <= set(re.findall(r"^\[([\w-]+)\]:", text, re.M))


def test_every_line_on_robustness_names_tests_that_exist():
    rows = [row for row in (ROOT / "docs" / "robustness.md").read_text().splitlines() if row.startswith("| ")]
    lines = [row for row in rows if not row.endswith("| test |")]
    assert len(lines) > 50
    for line in lines:
        names = re.findall(r"`([\w/.]*)::(test_\w+)`", line)
        assert names, line
        file = ""
        for named, test in names:
            file = named or file  # a name without a file is of the one before it
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"


def test_site_builds_without_warnings(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)], cwd=ROOT, check=True
    )
    recipe = (tmp_path / "reference" / "recipe" / "index.html").read_text()
    assert "optimizer.max_grad_norm" in recipe
    commands = (tmp_path / "reference" / "commands" / "index.html").read_text()
    assert "--max-positive-ratio" in commands
    assert "cafe collections reindex" in commands  # a command of a group
    api = (tmp_path / "reference" / "api" / "index.html").read_text()
    assert "embed_and_generate_batch" in api and "cafe.index.collection.Collection.search" in api


def test_every_worked_example_has_diffs_and_something_to_run():
    assert len(EXAMPLES) == 4
    for text in EXAMPLES.values():
        assert "```diff\n" in text
        assert "```python\n" in text or "```sh\n" in text


@pytest.mark.parametrize("example", EXAMPLES)
def test_worked_example_applies_and_runs(example, tmp_path):
    for folder in ("src", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    # The copy is no repository: git apply must not look for one above it.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src"), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    run = {"cwd": tmp_path, "env": environment, "check": True, "text": True}
    for language, code in re.findall(r"```(\w+)\n(.*?)```", EXAMPLES[example], re.DOTALL):
        if language == "diff":
            subprocess.run(["git", "apply", "-"], input=code, **run)
        elif language == "python":
            subprocess.run([sys.executable, "-c", code], **run)
        else:
            subprocess.run(code.replace("python ", f"{sys.executable} "), shell=True, **run)
