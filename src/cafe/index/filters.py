"""Which images a search may show: by date, folder, size, and what came along with a record."""

import json
import operator
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Any

from cafe.errors import CafeError

_DATE = re.compile(r"(\d{4})(?:-(\d{1,2})(?:-(\d{1,2}))?)?")
_CONDITION = re.compile(r"([^=!<>]+)(!=|<=|>=|==?|<|>)(.*)", re.DOTALL)
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


_BOOLS = ("true", "false")


@dataclass(frozen=True)
class Condition:
    """Compare a column that came along with a record, as in `license=cc-by` or `year>=2020`."""

    column: str
    comparison: str
    value: str

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Parse a condition.

        Raises:
            CafeError: it is none.
        """
        parts = _CONDITION.fullmatch(text)
        # White space is removed afterwards, because a pattern would take the square of its length to find it.
        if not parts or not parts[1].strip():
            raise CafeError(f"The condition {text!r} is not of the form COLUMN=VALUE, with one of = != < > <= >=.")
        column, comparison, value = parts.groups()
        return cls(column.strip(), comparison, value.strip())

    def holds(self, columns: dict[str, Any]) -> bool:
        """Return whether it holds; for an image without the column, no condition does."""
        if self.column not in columns:
            return False
        actual, value = columns[self.column], self.value
        if isinstance(actual, bool) and value.lower() in _BOOLS:
            value = str(value.lower() == "true")
        # As numbers where both are, otherwise as text.
        try:
            return _OPERATORS[self.comparison](float(actual), float(value))
        except (TypeError, ValueError, OverflowError):
            return _OPERATORS[self.comparison](str(actual), value)


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Limit a search.

    Attributes:
        after: taken at this time or later: a year, a month, a day (2024, 2024-05, 2024-05-31) or a time in ISO format.
        before: taken before the beginning of this year, month or day, or before this time.
        folder: in a folder whose name has this in it, in any case; or below this path, if it has a slash in it or is
            "." or "~".
        min_width, min_height: at least so many pixels.
        where: conditions on the columns of records, all of which hold.
    """

    after: str | date | None = None
    before: str | date | None = None
    folder: str | None = None
    min_width: int = 0
    min_height: int = 0
    where: tuple[str, ...] = ()

    def compile(self) -> "Predicate":
        """Return the filters in the form that images are compared with.

        Raises:
            CafeError: a date or a condition cannot be read.
        """
        return Predicate(
            after=_parse_date(self.after),
            before=_parse_date(self.before),
            folder=self.folder,
            min_width=self.min_width,
            min_height=self.min_height,
            conditions=tuple(map(Condition.parse, self.where)),
        )


@dataclass(frozen=True)
class Predicate:
    """Tell whether a search may show an image at a place."""

    after: datetime | None
    before: datetime | None
    folder: str | None
    min_width: int
    min_height: int
    conditions: tuple[Condition, ...]

    @property
    def allows_all(self) -> bool:
        """Return whether nothing is filtered."""
        return not any((self.after, self.before, self.folder, self.min_width, self.min_height, self.conditions))

    def allows(self, path: str, taken_at: datetime, width: int, height: int, columns: str | None) -> bool:
        """Return whether an image passes all filters.

        Args:
            path: where it is.
            taken_at: when it was taken.
            width, height: its size in pixels.
            columns: what came along with it, as a JSON object.
        """
        # The cheap ones first: the columns have to be parsed.
        if self.after and taken_at < self.after:
            return False
        if self.before and taken_at >= self.before:
            return False
        if width < self.min_width or height < self.min_height:
            return False
        if self.folder and not _is_in(path, self.folder):
            return False
        if not self.conditions:
            return True
        values = json.loads(columns) if columns else {}
        return all(condition.holds(values) for condition in self.conditions)


def _is_in(path: str, folder: str) -> bool:
    """Return whether a file is in a folder, by a part of the folder's name or by its path."""
    if os.sep in folder or folder in (".", "..", "~"):
        below = os.path.abspath(os.path.expanduser(folder))
        return path.startswith(below.rstrip(os.sep) + os.sep)
    return is_part_of_any(folder, Path(path).parent.parts)


def is_part_of_any(part: str, names: Iterable[str]) -> bool:
    """Return whether a text is a part of any name, in any case."""
    # Names are composed, because macOS writes "é" as two characters where keyboards give one.
    composed = unicodedata.normalize("NFC", part).casefold()
    return any(composed in unicodedata.normalize("NFC", name).casefold() for name in names)


def _parse_date(value: str | date | None) -> datetime | None:
    """Return the beginning of a year, a month or a day, or a point in time, in local time."""
    if value is None:
        return None
    try:
        point = value if isinstance(value, datetime) else _parse_day_or_time(value)
        # Dates of images have no time zone: they are in local time.
        return point.astimezone().replace(tzinfo=None) if point.tzinfo else point
    except (ValueError, OverflowError):
        raise CafeError(
            f"The date {str(value)!r} is not of the form 2024, 2024-05, 2024-05-31 or 2024-05-31T18:00."
        ) from None


def _parse_day_or_time(value: str | date) -> datetime:
    """Return the beginning of a year, a month or a day, or a point in time.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)
    parts = _DATE.fullmatch(value.strip())
    if not parts:
        return datetime.fromisoformat(value.strip())
    year, month, day = parts.groups()
    return datetime(int(year), int(month or 1), int(day or 1))


def local_time(seconds: float) -> datetime:
    """Return a point in time, in seconds since 1970, as local time; also one before 1970."""
    try:
        return datetime.fromtimestamp(seconds)
    except (OverflowError, OSError, ValueError):
        return datetime(1970, 1, 1) + timedelta(seconds=max(min(seconds, 1e11), -6e10))
