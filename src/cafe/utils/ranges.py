"""Declare the range of a number where its field is declared, and check it when the dataclass is made.

A range is metadata of the field's type: `rank: Annotated[int, Above(0)] = 16`. None is in every range. For a tuple, the
range holds for each of its values.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cafe.errors import RecipeError


@dataclass(frozen=True)
class Above:
    """Allow numbers greater than a limit."""

    limit: float

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
    """Check the numbers of a dataclass, and of the dataclasses in its fields, against the ranges declared there.

    Args:
        config: the dataclass instance.
        path: where a recipe has it, such as "optimizer"; errors name fields by it.

    Raises:
        RecipeError: a number is out of its range.
    """
    ranges = ranges_of(type(config))
    for field in fields(config):
        name = f"{path}.{field.name}".lstrip(".")
        for where, value in _flatten(getattr(config, field.name), name):
            # A nested dataclass has ranges of its own.
            if is_dataclass(value):
                check_ranges(value, where)
            else:
                _check_value(value, ranges.get(field.name, []), name)


def _check_value(value: Any, ranges: list[Range], name: str) -> None:
    """Check one number against all ranges of its field."""
    for allowed in ranges:
        if value not in allowed:
            raise RecipeError(f"{name} should be {allowed}, not {value}.")


def _flatten(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield a field's value, or the values of a tuple, each with its name; nothing for None."""
    if value is None:
        return
    if not isinstance(value, tuple):
        yield name, value
        return
    for index, item in enumerate(value):
        yield f"{name}[{index}]", item
