"""Make dataclasses from what a YAML or JSON file holds, and convert its values to the fields' types.

Whatever the file holds, an error names the key that is wrong, with its nearest or its new name.
"""

import builtins
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from cafe.errors import RecipeError
from cafe.utils.text import format_value

# What a person calls the types that a value can have.
SCALAR_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Schema:
    """Make dataclasses from the mappings in a file.

    Attributes:
        file: the file, for errors.
        renamed: fields that once had another name: for each class, the old name and the name today.
    """

    file: str
    renamed: Mapping[type, Mapping[str, str]]

    def build(self, cls: type, tree: Any, where: str = "") -> Any:
        """Make a dataclass from a mapping.

        Args:
            cls: the dataclass.
            tree: its fields by name.
            where: the path of the mapping in the file, empty or ending with a dot.

        Raises:
            RecipeError: a key is unknown or missing, or a value has the wrong type or is out of range.
        """
        if not isinstance(tree, dict):
            raise RecipeError(
                f"{self.file}: {where.rstrip('.') or 'it'} should be a mapping, not {format_value(tree)}."
            )
        self._check_keys(cls, tree, where)
        hints = get_type_hints(cls)  # without the ranges, which the class checks itself
        values = {key: self._convert(hints[key], value, where + key) for key, value in tree.items()}
        return cls(**values)

    def _check_keys(self, cls: type, tree: dict[str, Any], where: str) -> None:
        """Check that a mapping has a dataclass's keys: none that it does not know, and all that have no default."""
        names = {entry.name for entry in fields(cls)}
        for key in tree:
            if key not in names:
                raise RecipeError(f"{self.file}: {self._explain_unknown_key(cls, key, where)}")
        for name in _required_fields(cls):
            if name not in tree:
                raise RecipeError(f"{self.file}: the key {where}{name} is missing.")

    def _explain_unknown_key(self, cls: type, key: Any, where: str) -> str:
        """Return the new name of a key that was renamed, or the nearest name to a key that never was."""
        renamed = self.renamed.get(cls, {})
        if key in renamed:
            return f"{where}{key} is now called {where}{renamed[key]}."
        names = {entry.name for entry in fields(cls)}
        # With a cutoff of 0 there is always a nearest one.
        [nearest] = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
        return f"the key {where}{key} is unknown; the nearest is {where}{nearest}."

    def _convert(self, kind: Any, value: Any, where: str) -> Any:
        """Convert a value to the type of its field."""
        if is_dataclass(kind):
            return self.build(kind, value, where + ".")  # type: ignore[arg-type]
        match get_origin(kind):
            case builtins.tuple:
                return self._convert_list(get_args(kind)[0], value, where)
            case types.UnionType | typing.Union:
                return self._convert_union(get_args(kind), value, where)
            case typing.Literal:
                return self._convert_choice(get_args(kind), value, where)
            case _:
                return self._convert_scalar(kind, value, where)

    def _convert_list(self, kind: Any, value: Any, where: str) -> tuple[Any, ...]:
        """Convert a list to a tuple of values of one type."""
        if not isinstance(value, list):
            raise RecipeError(f"{self.file}: {where} should be a list, not {format_value(value)}.")
        return tuple(self._convert(kind, item, f"{where}[{index}]") for index, item in enumerate(value))

    def _convert_union(self, kinds: tuple[Any, ...], value: Any, where: str) -> Any:
        """Convert a value to the first of several types, unless it is null or a word that another one allows."""
        if value is None and types.NoneType in kinds:
            return None
        # A word such as "auto" is written in the place of a mapping. Every other value has the first type.
        literals = [kind for kind in kinds if get_origin(kind) is typing.Literal]
        if any(value in get_args(literal) for literal in literals):
            return value
        return self._convert(kinds[0], value, where)

    def _convert_choice(self, choices: tuple[Any, ...], value: Any, where: str) -> Any:
        """Check that a value is one of the choices."""
        if value not in choices:
            known = ", ".join(map(str, choices))
            raise RecipeError(f"{self.file}: {where} should be one of {known}, not {format_value(value)}.")
        return value

    def _convert_scalar(self, kind: type, value: Any, where: str) -> Any:
        """Convert a number, a text or a truth value."""
        if kind is float:
            value = _as_float(value)
        # Not by isinstance: True is an int to Python, but no number to a person.
        if type(value) is not kind:
            raise RecipeError(f"{self.file}: {where} should be {SCALAR_NAMES[kind]}, not {format_value(value)}.")
        if kind is str and not _is_plain_text(str(value)):
            raise RecipeError(f"{self.file}: {where} holds half of a character, or a null: {value!a:.80}.")
        return value


def _required_fields(cls: type) -> list[str]:
    """Return the names of a dataclass's fields that have neither a default nor a factory of one."""
    required = []
    for entry in fields(cls):
        if entry.default is MISSING and entry.default_factory is MISSING:
            required.append(entry.name)
    return required


def _as_float(value: Any) -> Any:
    """Convert whole numbers and texts that are numbers to float; YAML reads 1e-5, which has no point, as text."""
    if type(value) not in (int, str):  # bool is an int by inheritance
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _is_plain_text(text: str) -> bool:
    """Tell whether a text can be encoded, and named by a file: JSON and YAML can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text
