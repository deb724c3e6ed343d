"""Texts of records, file names and models in messages: short, and safe to print on a terminal or to write to a log."""

import re
from typing import Any

MAX_SHOWN = 80  # characters of a value in an error

# C0 and C1 controls with DEL; line and paragraph separators; marks that reorder text; lone surrogates, which no
# terminal's encoding can write.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_controls(text: str, keep: str = "") -> str:
    r"""Write the control characters of a text as Python would in a string: `\x1b`, `\u202e`, `\n`.

    Terminals obey them: an id or a path with such characters could clear the screen, set the window's title or show
    other words than it holds. Other text, in any language, stays as it is.

    Args:
        text: the text.
        keep: the characters to leave as they are, such as "\n" in a text of several lines.
    """
    return _CONTROLS.sub(lambda match: match[0] if match[0] in keep else repr(match[0])[1:-1], text)


def shorten(text: str, length: int = 300) -> str:
    """Shorten a long text to its beginning and its end, as for a path or an image's base64 in an error."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}...{text[-20:]}"


def format_value(value: Any) -> str:
    """Return a value as an error shows it, however large or deep it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: a whole number of thousands of digits
        return f"a {type(value).__name__}"
    if len(text) <= MAX_SHOWN:
        return text
    return f"{text[:MAX_SHOWN]}..."
