"""Find the names of concepts in texts."""

import re
from collections.abc import Callable, Iterable


def mentions(text: str, names: Iterable[str]) -> list[str]:
    """List the names that a text contains as whole words, in its order; "fire engine" does not contain "fire"."""
    known = {name.lower(): name for name in names}
    found = [known[name.lower()] for name in _pattern(known).findall(text)]
    return list(dict.fromkeys(found))


def replace(text: str, names: Iterable[str], change: Callable[[str], str]) -> str:
    """Replace the names in a text by what `change` makes of them as the text writes them."""
    return _pattern(names).sub(lambda match: change(match[0]), text)


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Match names as whole words, in upper or lower case: the longest of those that begin at one place."""
    alternatives = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"\b(?:{alternatives})\b" if alternatives else r"(?!)", re.IGNORECASE)
