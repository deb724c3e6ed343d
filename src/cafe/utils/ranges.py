"""Declare the range of a number where its field is declared, and check it when the dataclass is made.

The words of a `Literal` and text are checked too: a dataclass that is made in Python is held to what one is held to
that is read from a file.

A range is metadata of the field's type: `rank: Annotated[int, Above(0)] = 16`. None is in every range. For a tuple, the
range holds for each of its values.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cafe.errors import RecipeError
from cafe.utils.text import format_value


@dataclass(frozen=True)
class Above:
    """Allow numbers greater than a limit; infinity only if it means something there."""

    limit: float
    finite: bool = True

    def __contains__(self, value: float) -> bool:
        return value > self.limit

    def __str__(self) -> str:
        return f"above {self.limit:,}"


@dataclass(frozen=True)
class AtLeast:
    """Allow a limit and all numbers greater than it."""

    limit: float

    def __contains__(self, value: float) -> bool:
        return value >= self.limit

    def __str__(self) -> str:
        return f"{self.limit:,} or more"


@dataclass(frozen=True)
class Below:
    """Allow numbers less than a limit."""

    limit: float

    def __contains__(self, value: float) -> bool:
        return value < self.limit

    def __str__(self) -> str:
        return f"below {self.limit:,}"


@dataclass(frozen=True)
class Between:
    """Allow the numbers between two limits, both of which are allowed themselves."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"between {self.low:,} and {self.high:,}"


@dataclass(frozen=True)
class HalfOpen:
    """Allow the numbers from a lower limit, which is allowed itself, to an upper one, which is not."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high

    def __str__(self) -> str:
        return f"{self.low:,} or more and below {self.high:,}"


# What `check_ranges` looks for among the metadata of a type.
Range = Above | AtLeast | Below | Between | HalfOpen


def ranges_of(cls: type) -> dict[str, list[Range]]:
    """Return the ranges that a dataclass declares, by the name of the field."""
    ranges: dict[str, list[Range]] = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if get_origin(hint) is Annotated:
            _, *metadata = get_args(hint)
            ranges[name] = [item for item in metadata if isinstance(item, Range)]
    return ranges


def check_ranges(config: Any, path: str = "") -> None:
    """Check the values of a dataclass, and of the dataclasses in its fields, against what is declared there.

    Args:
        config: the dataclass instance.
        path: where a recipe has it, such as "optimizer"; errors name fields by it.

    Raises:
        RecipeError: a number is out of its range or not finite, a word is none of those allowed, or a text is none.
    """
    ranges = ranges_of(type(config))
    hints = get_type_hints(type(config))
    for field in fields(config):
        name = f"{path}.{field.name}".lstrip(".")
        value = getattr(config, field.name)
        _check_kind(value, hints[field.name], name)
        for where, item in _flatten(value, name):
            # A nested dataclass has ranges of its own.
            if is_dataclass(item):
                check_ranges(item, where)
            else:
                _check_value(item, ranges.get(field.name, []), name)


def _check_value(value: Any, ranges: list[Range], name: str) -> None:
    """Check one number against all ranges of its field."""
    if ranges and not isinstance(value, (int, float)):
        raise RecipeError(f"{name} should be a number, not {format_value(value)}.")
    for allowed in ranges:
        if value not in allowed:
            raise RecipeError(f"{name} should be {allowed}, not {value}.")
    may_be_infinite = any(isinstance(allowed, Above) and not allowed.finite for allowed in ranges)
    if isinstance(value, float) and not math.isfinite(value) and not may_be_infinite:
        raise RecipeError(f"{name} should be finite, not {value}.")


def _check_kind(value: Any, hint: Any, name: str) -> None:
    """Check a value against a type that is text or words, or a tuple of words; others are left to who reads it."""
    if hint is str and not isinstance(value, str):
        raise RecipeError(f"{name} should be text, not {format_value(value)}.")
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise RecipeError(f"{name} should be one of {', '.join(get_args(hint))}, not {format_value(value)}.")
    if get_origin(hint) is tuple and isinstance(value, tuple):
        item_hint, *_ = get_args(hint)
        for index, item in enumerate(value):
            _check_kind(item, item_hint, f"{name}[{index}]")


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield a field's value, or the values of a tuple, each with its name; nothing for None."""
    if value is None:
        return
    if not isinstance(value, tuple):
        yield name, value
        return
    for index, item in enumerate(value):
        yield f"{name}[{index}]", item
