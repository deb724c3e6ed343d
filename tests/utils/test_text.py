"""Text that strangers wrote, printed."""

import pytest

from cafe.utils.text import escape_controls


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\nb\tc\rd", r"a\nb\tc\rd"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("photo\u202egnp.exe\u2066", r"photo\u202egnp.exe\u2066"),
        ("a\u2028b", r"a\u2028b"),
        ("\ud83d.png", r"\ud83d.png"),
    ],
)
def test_escapes_what_a_terminal_obeys_or_cannot_write(text: str, printed: str) -> None:
    assert escape_controls(text) == printed
    printed.encode()


@pytest.mark.parametrize("text", ["café.png", "写真/犬.jpg", "\U0001f431 cat", "C:\\images", "a 'quoted' \"name\""])
def test_leaves_other_text_as_it_is(text: str) -> None:
    assert escape_controls(text) == text


def test_keeps_what_it_is_told_to() -> None:
    assert escape_controls("one\ntwo\x1b", keep="\n") == "one\ntwo\\x1b"
