"""Read recipes from YAML files, apply overrides from the command line, and convert values to the fields' types.

The whole tree is checked before anything is loaded, and an error names the key that is wrong, with its nearest or its
new name.
"""

import builtins
import difflib
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from cafe.data.source import Source
from cafe.errors import RecipeError
from cafe.lvlm.prompts import Prompts
from cafe.training.recipe import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Recipe,
)
from cafe.utils.ranges import check_ranges

# Fields that were called otherwise before the first release: the old name, and the name today.
OLD_NAMES: dict[type, dict[str, str]] = {
    Recipe: {
        "memory": "memory_limit_gib",
        "epochs": "num_train_epochs",
        "steps": "max_steps",
        "log_every": "logging_steps",
        "save_every": "save_steps",
        "keep_last": "save_total_limit",
        "keep_best": "metric_for_best_model",
        "max_skipped": "max_nonfinite_steps",
    },
    ModelConfig: {
        "frozen": "freeze",
        "frozen_weights": "frozen_weights_dtype",
        "max_tokens": "max_length",
        "row_tokens": "max_row_tokens",
        "max_pixels": "max_image_pixels",
        "grids": "image_grids",
    },
    DataConfig: {"max_bad_share": "max_bad_fraction", "workers": "num_workers"},
    Source: {
        "ask": "answer_prompt",
        "contrast": "use_pairs",
        "window": "shuffle_window",
        "frames": "max_frames",
    },
    Prompts: {"frame": "assistant_frame"},
    ObjectiveConfig: {
        "compat": "gradient_scaling",
        "hardness": "hardness_weight",
        "margin": "false_negative_margin",
        "matryoshka": "matryoshka_dims",
    },
    OptimizerConfig: {
        "clip": "max_grad_norm",
        "accumulate": "gradient_accumulation_steps",
        "warm_up": "warmup_ratio",
    },
    EvaluationConfig: {"every": "eval_steps", "samples": "num_samples"},
}

# What a person calls the types that a value can have.
SCALAR_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: The YAML file.
        overrides: Values that replace the file's, as `key=value`, e.g. `optimizer.learning_rate=1e-4`.

    Raises:
        RecipeError: The file is missing or not YAML, a key is unknown or missing, or a value has the wrong type or is
            out of range.
    """
    path = Path(path)
    tree = _read_yaml(path)
    # Overrides change the tree before it is checked: they may mend what the file says.
    for override in overrides:
        _apply_override(tree, override)
    return _build(Recipe, tree, "", str(path))


def read_source(path: str, overrides: Sequence[str] = ()) -> Source:
    """Read a data source from the command line.

    Args:
        path: The path of the source.
        overrides: Its other fields, as `key=value`, e.g. `format=mmeb`.

    Raises:
        RecipeError: A key is unknown, or a value has the wrong type or is out of range.
    """
    tree: dict[str, Any] = {"path": path}
    for override in overrides:
        _apply_override(tree, override)
    source: Source = _build(Source, tree, "", "The command line")
    check_ranges(source)  # in a recipe, the class that holds the sources does this
    return source


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping."""
    if not path.is_file():
        raise RecipeError(f"The recipe {path} does not exist.")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"The recipe {path} is not UTF-8 text: {error}.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {path} is not valid YAML: {_first_line(error)}.") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"The recipe {path} is not a mapping of keys to values.")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the value that an override of the form `key=value` names; dots in the key separate levels."""
    key, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"The override {override!r} is not of the form key=value.")
    # Levels that the file does not have are made.
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"The override {override!r} goes into {parent}, which is a value and holds no keys.")
    try:
        tree[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"The override {override!r} is not valid YAML: {_first_line(error)}.") from None


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message: YAML's go on with a copy of the text."""
    return str(error).splitlines()[0]


def _build(cls: type, tree: Any, where: str, file: str) -> Any:
    """Make a dataclass from a mapping.

    Args:
        cls: The dataclass.
        tree: Its fields by name.
        where: The path of the mapping in the recipe, empty or ending with a dot.
        file: The recipe's file, for errors.
    """
    if not isinstance(tree, dict):
        raise RecipeError(f"{file}: {where.rstrip('.')} should be a mapping, not {tree!r}.")
    _check_keys(cls, tree, where, file)
    hints = get_type_hints(cls)  # without the ranges, which the class checks itself
    values = {key: _convert(hints[key], value, where + key, file) for key, value in tree.items()}
    return cls(**values)


def _check_keys(cls: type, tree: dict[str, Any], where: str, file: str) -> None:
    """Check that a mapping has the keys of a dataclass: none that it does not know, and all that have no default."""
    names = {entry.name for entry in fields(cls)}
    for key in tree:
        if key not in names:
            raise RecipeError(f"{file}: {_explain_unknown_key(cls, key, where)}")
    for name in _required_fields(cls):
        if name not in tree:
            raise RecipeError(f"{file}: the key {where}{name} is missing.")


def _required_fields(cls: type) -> list[str]:
    """Return the names of a dataclass's fields that have neither a default nor a factory of one."""
    required = []
    for entry in fields(cls):
        if entry.default is MISSING and entry.default_factory is MISSING:
            required.append(entry.name)
    return required


def _explain_unknown_key(cls: type, key: Any, where: str) -> str:
    """Return the new name of a key that was renamed, or the nearest name to a key that never was."""
    renamed = OLD_NAMES.get(cls, {})
    if key in renamed:
        return f"{where}{key} is now called {where}{renamed[key]}."
    names = {entry.name for entry in fields(cls)}
    # With a cutoff of 0 there is always a nearest one.
    [nearest] = difflib.get_close_matches(str(key), names, n=1, cutoff=0.0)
    return f"the key {where}{key} is unknown; the nearest is {where}{nearest}."


def _convert(kind: Any, value: Any, where: str, file: str) -> Any:
    """Convert a value from YAML to the type of its field."""
    if is_dataclass(kind):
        return _build(kind, value, where + ".", file)  # type: ignore[arg-type]
    match get_origin(kind):
        case builtins.tuple:
            return _convert_list(get_args(kind)[0], value, where, file)
        case types.UnionType | typing.Union:
            return _convert_union(get_args(kind), value, where, file)
        case typing.Literal:
            return _convert_choice(get_args(kind), value, where, file)
        case _:
            return _convert_scalar(kind, value, where, file)


def _convert_list(kind: Any, value: Any, where: str, file: str) -> tuple[Any, ...]:
    """Convert a list to a tuple of values of one type."""
    if not isinstance(value, list):
        raise RecipeError(f"{file}: {where} should be a list, not {value!r}.")
    return tuple(_convert(kind, item, f"{where}[{index}]", file) for index, item in enumerate(value))


def _convert_union(kinds: tuple[Any, ...], value: Any, where: str, file: str) -> Any:
    """Convert a value to the first of several types, unless it is null or one of the words that another one allows."""
    if value is None and types.NoneType in kinds:
        return None
    # A word such as "auto" is written in the place of a mapping. Every other value has the first type.
    literals = [kind for kind in kinds if get_origin(kind) is typing.Literal]
    if any(value in get_args(literal) for literal in literals):
        return value
    return _convert(kinds[0], value, where, file)


def _convert_choice(choices: tuple[Any, ...], value: Any, where: str, file: str) -> Any:
    """Check that a value is one of the choices."""
    if value not in choices:
        raise RecipeError(f"{file}: {where} should be one of {', '.join(map(str, choices))}, not {value!r}.")
    return value


def _convert_scalar(kind: type, value: Any, where: str, file: str) -> Any:
    """Convert a number, a text or a truth value."""
    if kind is float:
        value = _as_float(value)
    # Not by isinstance: True is an int to Python, but no number to a person.
    if type(value) is not kind:
        raise RecipeError(f"{file}: {where} should be {SCALAR_NAMES[kind]}, not {value!r}.")
    return value


def _as_float(value: Any) -> Any:
    """Convert whole numbers and texts that are numbers to float; YAML reads 1e-5, which has no point, as text."""
    if type(value) not in (int, str):  # bool is an int by inheritance
        return value
    try:
        return float(value)
    except ValueError:
        return value
