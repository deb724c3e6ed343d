"""Types and arguments that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

# Counts and fractions, of which click prints the range in the help and in errors.
POSITIVE = click.IntRange(min=1)
NON_NEGATIVE = click.IntRange(min=0)
FRACTION = click.FloatRange(0, 1)
# Whether a path exists is checked by what reads it, which knows what it should be.
PATH = click.Path(path_type=Path)


def _check_overrides(context: click.Context, parameter: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse words without an equals sign, which are no overrides."""
    for word in words:
        if "=" not in word:
            raise click.UsageError(f"{word!r} is not of the form key=value.", context)
    return words


override_arguments = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", callback=_check_overrides)


def recipe_arguments(command: Command) -> Command:
    """Add a recipe and its overrides as arguments, which may stand before, between and after options."""
    # The decorator that is applied last adds the first argument.
    recipe = click.argument("recipe", type=PATH)
    return recipe(override_arguments(command))


def split_names(text: str) -> list[str]:
    """Split names that are separated by commas."""
    names = [name.strip() for name in text.split(",")]
    return [name for name in names if name]
