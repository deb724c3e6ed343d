"""Types and arguments that several commands share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

# Counts and fractions, of which click prints the range in the help and in errors.
POSITIVE = click.IntRange(min=1)
NON_NEGATIVE = click.IntRange(min=0)
FRACTION = click.FloatRange(0, 1)


class HomePath(click.Path):
    """Convert to a path, with a leading `~` or `~user` expanded, which a shell leaves as it is after `--option=`.

    Whether the path exists is checked by what reads it, which knows what it should be.
    """

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        """Convert a word of the command line."""
        return super().convert(os.path.expanduser(value), parameter, context)


PATH = HomePath()


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
