"""Read recipes from YAML files, and apply overrides from the command line.

The whole tree is checked before anything is loaded, see `cafe.utils.schema`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cafe.data.source import Source
from cafe.errors import RecipeError, first_line
from cafe.lvlm.prompts import RENAMED_PROMPTS, Prompts
from cafe.training.recipe import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Recipe,
)
from cafe.utils.ranges import check_ranges
from cafe.utils.schema import Schema
from cafe.utils.text import format_value

# Fields that were called otherwise before the first release: the old name, and the name today.
OLD_NAMES: dict[type, Mapping[str, str]] = {
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
    Prompts: RENAMED_PROMPTS,
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


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: The YAML file.
        overrides: Values that replace the file's, as `key=value`, e.g. `optimizer.learning_rate=1e-4`.

    Raises:
        RecipeError: The file is missing or not YAML, a key is unknown or missing, or a value has the wrong type or is
            out of range.
    """
    path = Path(path).expanduser()
    tree = _read_yaml(path)
    # Overrides change the tree before it is checked: they may mend what the file says.
    for override in overrides:
        _apply_override(tree, override)
    recipe: Recipe = Schema(str(path), OLD_NAMES).build(Recipe, tree)
    return recipe


@dataclass(frozen=True)
class Sweep:
    """Hold recipes that differ in one field.

    Attributes:
        field: Its key, e.g. `objective.temperature`.
        recipes: By value, as it was written, the recipe with that value.
    """

    field: str
    recipes: dict[str, Recipe]


def read_sweep(path: str | Path, overrides: Sequence[str], sweep: str) -> Sweep:
    """Read a recipe once with each of several values of a field.

    Args:
        path: The YAML file.
        overrides: Values that replace the file's, as in `read_recipe`.
        sweep: The field and its values, as `key=a,b,c`. A value is what an override may have, a list too: commas
            within brackets or quotes separate no values.

    Raises:
        RecipeError: There is no value, or one of the recipes cannot be read.
    """
    field, equals, values = sweep.partition("=")
    if not equals or not values.strip():
        raise RecipeError(f"The sweep {format_value(sweep)} is not of the form key=a,b,c.")
    recipes = {value: read_recipe(path, [*overrides, f"{field}={value}"]) for value in _split_values(sweep, values)}
    return Sweep(field, recipes)


def _split_values(sweep: str, values: str) -> list[str]:
    """Split the values of a sweep, as YAML would split a list of them, but leave them unparsed."""
    text = f"[{values}]"
    with _yaml_errors(f"The sweep {format_value(sweep)}"):
        node = yaml.compose(text, yaml.SafeLoader)
    # A bracket or a comment among the values may end the list early.
    if not isinstance(node, yaml.SequenceNode) or node.end_mark.index < len(text):
        raise RecipeError(f"The sweep {format_value(sweep)} is not of the form key=a,b,c.")
    # Parsed here, a value could differ from that of an override: each is parsed as one, on its own.
    return [text[item.start_mark.index : item.end_mark.index].strip() for item in node.value]


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
    source: Source = Schema("The command line", OLD_NAMES).build(Source, tree)
    check_ranges(source)  # in a recipe, the class that holds the sources does this
    return source


def _read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping."""
    if not path.is_file():
        raise RecipeError(f"The recipe {path} does not exist.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"The recipe {path} is not UTF-8 text: {error}.") from None
    tree = _parse_yaml(text, f"The recipe {path}")
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
    tree[last] = _parse_yaml(value, f"The override {format_value(override)}")


def _parse_yaml(text: str, name: str) -> Any:
    """Parse YAML; errors begin with `name`."""
    with _yaml_errors(name):
        return yaml.safe_load(text)


@contextmanager
def _yaml_errors(name: str) -> Iterator[None]:
    """Report errors of the YAML parser in one line that begins with `name`."""
    try:
        yield
    except RecursionError:
        raise RecipeError(f"{name} is nested too deeply.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that is none, such as 2026-13-01
        # YAML's messages go on with a copy of the text.
        raise RecipeError(f"{name} is not valid YAML: {first_line(error)}.") from None
