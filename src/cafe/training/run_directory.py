"""The directory of a run: which run it holds, and whether that is done."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from cafe.checkpoint import ensure_overwritable, read_metadata
from cafe.errors import CafeError
from cafe.training.recipe import Recipe, recipe_dict
from cafe.utils.atomic import atomic_write_text

RUN, LOCK = "run.json", "run.lock"
STATE, CHECKPOINT, BEST = "state", "checkpoint", "best"
# What may change between a run and its continuation: it changes no step, or by rounding alone.
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
)


def claim_run_directory(recipe: Recipe) -> str:
    """Makes the output directory this recipe's and, until it ends, this process's; returns the name of the run in it.

    Raises:
        CafeError: it holds the run of another recipe or something else, or another process trains into it.
    """
    output = Path(recipe.output)
    ensure_overwritable(output / CHECKPOINT)
    output.mkdir(parents=True, exist_ok=True)
    _lock(output)
    file = output / RUN
    mine = as_json(recipe)
    name = f"{output.resolve().name}-{uuid4().hex[:8]}"
    if file.is_file() and any((output / part).exists() for part in (STATE, CHECKPOINT)):
        run = json.loads(file.read_text())
        if changed := diff_recipes(run["recipe"], mine):
            raise CafeError(
                f"{output} holds a run of another recipe ({'; '.join(changed[:3])}): give another output, "
                "or remove that directory to start anew."
            )
        name = run["name"]
    atomic_write_text(file, json.dumps({"name": name, "recipe": mine}, indent=2) + "\n")
    return name


def _lock(output: Path) -> None:
    # A POSIX lock: it goes with the process however that ends, and loader workers, which may outlive it, have no part.
    opened = os.open(output / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        other = os.read(opened, 20).decode()
        raise CafeError(f"Process {other} trains into {output}: wait until it ends, or give another output.") from None
    except OSError:
        return  # a file system without locks
    os.truncate(opened, 0)
    os.write(opened, str(os.getpid()).encode())


def is_finished(recipe: Recipe) -> bool:
    """Whether the output directory holds the checkpoint that the recipe ends with."""
    record = read_metadata(Path(recipe.output) / CHECKPOINT)
    return "recipe" in record and not diff_recipes(record["recipe"], as_json(recipe))


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a file gives it back: lists for tuples."""
    return json.loads(json.dumps(recipe_dict(recipe)))


def diff_recipes(old: Any, new: Any, where: str = "") -> list[str]:
    """What would change the result, as "field was this and is that"."""
    if where in RESUMABLE_FIELDS:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*new, *(name for name in old if name not in new)]
        below = ((old.get(name), new.get(name), f"{where}.{name}".lstrip(".")) for name in names)
        return [line for before, now, name in below for line in diff_recipes(before, now, name)]
    return [] if old == new else [f"{where} was {old!r} and is {new!r}"]
