"""The directory of a run: which recipe it belongs to, and whether the run is finished."""

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from cafe.checkpoint import ensure_overwritable, read_metadata
from cafe.data.identity import diff_identities, identify_source
from cafe.data.records import OpenedSource
from cafe.errors import CafeError, CheckpointError, RecipeError
from cafe.training.recipe import Recipe, recipe_dict
from cafe.utils.atomic import atomic_write_text

RUN, LOCK = "run.json", "run.lock"
STATE, CHECKPOINT, BEST = "state", "checkpoint", "best"
# What may differ when a run is resumed: it changes no step, or only by rounding.
RESUMABLE_FIELDS = (
    "output",
    "save_steps",
    "save_total_limit",
    "metric_for_best_model",
    "logging_steps",
    "trackers",
    "max_nonfinite_steps",
    "micro_batch",
    "memory_limit_gib",
    "evaluation",
    "data.num_workers",
    "data.max_bad_fraction",
    "data.allow_changes",
)


def claim_run_directory(recipe: Recipe) -> str:
    """Make the output directory this recipe's and, until it ends, this process's; return the name of the run in it.

    Raises:
        CafeError: it holds the run of another recipe or something else, or another process trains into it.
    """
    output = Path(recipe.output)
    ensure_overwritable(output / CHECKPOINT)
    output.mkdir(parents=True, exist_ok=True)
    _lock(output)
    file = output / RUN  # it says which recipe the directory's state and checkpoint are of
    plain = as_json(recipe)
    name = f"{output.resolve().name}-{uuid4().hex[:8]}"
    data = None  # what identifies it, see `check_data`
    # Where nothing was saved yet there is nothing to lose: another recipe may take the directory over.
    has_results = (output / STATE).exists() or (output / CHECKPOINT).exists()
    if has_results and file.is_file():
        run = _read_run(file)
        if changed := diff_recipes(run["recipe"], plain):
            raise RecipeError(
                f"{output} holds a run of another recipe ({'; '.join(changed[:3])}): set another output, "
                "or remove that directory to start over."
            )
        name = run["name"]  # trackers continue the run of this name
        data = run.get("data")
    # Written in any case: what may differ when a run is resumed may have changed.
    atomic_write_text(file, json.dumps({"name": name, "recipe": plain, "data": data}, indent=2) + "\n")
    return name


def check_data(recipe: Recipe, sources: Sequence[OpenedSource]) -> None:
    """Make sure that a resumed run reads the data that it began with, and record what identifies it.

    Raises:
        RecipeError: a source has changed, and `data.allow_changes` is not set.
    """
    file = Path(recipe.output) / RUN
    run = _read_run(file)
    identities = list(map(identify_source, sources))
    recorded = run.get("data")
    changed = diff_identities(recorded, identities) if recorded else []
    if changed and not recipe.data.allow_changes:
        raise RecipeError(
            f"The data of {recipe.output} has changed since the run was saved ({'; '.join(changed[:3])}): put it back, "
            "set another output, or resume with data.allow_changes=true."
        )
    atomic_write_text(file, json.dumps({**run, "data": identities}, indent=2) + "\n")


def _read_run(file: Path) -> dict[str, Any]:
    """Read the name and the recipe of the run that a directory holds.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        run = None
    match run:
        case {"name": str(), "recipe": dict(), **rest} if isinstance(rest.get("data"), list | None):
            return run
    raise CheckpointError(
        f"{file} is damaged, so it does not say which recipe the run in {file.parent} has: set another output, or "
        "remove that directory to start over."
    )


def _lock(output: Path) -> None:
    """Lock the directory until this process ends.

    It is a POSIX lock, which ends with the process however that ends and is not inherited by loader workers, which may
    outlive it.
    """
    # Never closed: closing any handle of the file would end the lock.
    handle = os.open(output / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        other = os.read(handle, 20).decode()
        raise CafeError(
            f"Process {other} is training into {output}: wait until it ends, or set another output."
        ) from None
    except OSError:
        return  # a file system without locks
    os.truncate(handle, 0)
    os.write(handle, str(os.getpid()).encode())


def is_finished(recipe: Recipe) -> bool:
    """Return whether the output directory holds the recipe's final checkpoint."""
    metadata = read_metadata(Path(recipe.output) / CHECKPOINT)
    if "recipe" not in metadata:
        return False
    return not diff_recipes(metadata["recipe"], as_json(recipe))


def as_json(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as a JSON file holds it, with lists for tuples."""
    return json.loads(json.dumps(recipe_dict(recipe)))


def diff_recipes(old: Any, new: Any, where: str = "") -> list[str]:
    """List what differs and would change the result, as "field was this and is that"."""
    if where in RESUMABLE_FIELDS:
        return []
    if old == new:
        return []
    both_have_fields = isinstance(old, dict) and isinstance(new, dict)
    if not both_have_fields:
        return [f"{where} was {old!r} and is {new!r}"]
    differences = []
    for name in new | old:  # the fields of either: a recipe written by another version may have others
        differences += diff_recipes(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))
    return differences
