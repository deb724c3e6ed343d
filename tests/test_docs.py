"""What the pages point to is there: a table that names the test of each claim is worth as much as its links."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_links_that_a_page_names_are_there(page):
    text = page.read_text()
    files = re.findall(r"(?<![/\w.-])(?:src/cafe|tests|benchmarks|recipes|docs)/[\w./-]+\.(?:py|yaml|md|jinja)\b", text)
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert [name for name in files if not (ROOT / name).exists() and name != "recipes/my.yaml"] == []  # the reader's
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert set(re.findall(r"\]\[([\w-]+)\]", text)) <= set(re.findall(r"^\[([\w-]+)\]:", text, re.M))
