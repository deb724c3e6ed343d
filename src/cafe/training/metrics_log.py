"""The log of a run: one JSON line per logged step, and the trackers that the recipe names."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cafe.errors import MissingPackageError
from cafe.utils.atomic import atomic_write_text

FILE = "log.jsonl"


class MetricsLogger:
    """Writes logged steps to `log.jsonl` and to trackers.

    Args:
        directory: of the run.
        accelerator: holds the trackers.
        name: of the run in the trackers, kept when it is resumed.
        after: the last step already taken; lines of later steps, written before an interruption, are dropped.
    """

    def __init__(self, directory: Path, accelerator: Accelerator, name: str, after: int = 0) -> None:
        kept = truncate_jsonl(directory / FILE, lambda number, record: record["step"] <= after)
        self.file = (directory / FILE).open("a", buffering=1)  # line by line
        # Seconds count the time trained, without that between an interruption and its resumption.
        seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.started = time.monotonic() - seconds_before
        # Resumed, each tracker continues the run: TensorBoard without the steps that are taken again.
        settings = {
            "tensorboard": {"purge_step": after + 1},
            "wandb": {"name": name, "id": name, "resume": "allow", "dir": str(directory)},
            "trackio": {"name": name, "resume": "allow"},
        }
        accelerator.init_trackers("cafe", init_kwargs=settings)
        self.trackers = accelerator.trackers

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write one record. Numbers that are not finite become null; trackers get lists as text."""
        seconds = round(time.monotonic() - self.started, 2)
        record = {name: _finite_or_none(value) for name, value in values.items()}
        self.file.write(json.dumps({"step": step, "seconds": seconds, **record}) + "\n")
        for tracker in self.trackers:
            tracker.log(_for_trackers(record), step=step)

    def close(self) -> None:
        """Close the file and the trackers."""
        self.file.close()
        for tracker in self.trackers:
            tracker.finish()


def require_trackers(trackers: Sequence[str]) -> list[str] | None:
    """Return the trackers that a recipe names, or None for none, as accelerate wants it.

    Raises:
        MissingPackageError: one of them is not installed.
    """
    for tracker in trackers:
        spec = find_spec(tracker)
        # A folder of that name is no package, such as wandb leaves where it runs.
        if spec is None or spec.origin is None:
            raise MissingPackageError(
                f"The recipe's tracker {tracker} is not installed: pip install 'cafe-lvlm[{tracker}]'."
            )
    return list(trackers) or None


def _finite_or_none(value: Any) -> Any:
    """Replace a number that is not finite, for which JSON has no word, by None."""
    is_number = isinstance(value, float)
    if is_number and not math.isfinite(value):
        return None
    return value


def _for_trackers(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record as trackers take it: lists as text, and no values that are None."""
    tracked = {}
    for name, value in record.items():
        if isinstance(value, list):
            tracked[name] = json.dumps(value)
        elif value is not None:
            tracked[name] = value
    return tracked


def truncate_jsonl(path: Path, keep: Callable[[int, dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrite a JSON Lines file with the records to keep, chosen by index among them and by content; return them.

    A line that was cut off is dropped too.
    """
    lines: list[str] = []
    records: list[dict[str, Any]] = []
    for line, record in _read_jsonl(path):
        if keep(len(records), record):
            lines.append(line + "\n")
            records.append(record)
    atomic_write_text(path, "".join(lines))
    return records


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a JSON Lines file with their records, except for lines that were cut off."""
    if not path.is_file():
        return
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        yield line, record
