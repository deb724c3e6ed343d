"""Text from a record, a file name or a model, made safe to print on a terminal or to write to a log."""

import re

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
