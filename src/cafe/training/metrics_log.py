"""The log of a run: one JSON line a measured step, and the trackers that the recipe names."""

import json
import math
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cafe.errors import CafeError
from cafe.utils.atomic import atomic_write_text

FILE = "log.jsonl"


class MetricsLogger:
    """Writes each measured step to `log.jsonl` and to trackers.

    Args:
        directory: of the run.
        accelerator: holds the trackers, which the recipe chose.
        name: of the run among others; it goes on under it when it is resumed.
        after: the last step that is already done; what the file tells of later ones, from before a run broke off, is
            dropped.
    """

    def __init__(self, directory: Path, accelerator: Accelerator, name: str, after: int = 0) -> None:
        kept = truncate_jsonl(directory / FILE, lambda number, record: record["step"] <= after)
        self.file = (directory / FILE).open("a", buffering=1)
        self.started = time.monotonic() - (kept[-1]["seconds"] if kept else 0.0)
        settings = {
            "tensorboard": {"purge_step": after + 1},
            "wandb": {"name": name, "id": name, "resume": "allow", "dir": str(directory)},
            "trackio": {"name": name, "resume": "allow"},
        }
        accelerator.init_trackers("cafe", init_kwargs=settings)
        self.trackers = accelerator.trackers

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One record. Numbers that are not finite become null; trackers take lists as text."""
        seconds = round(time.monotonic() - self.started, 2)
        plain = {name: _plain(value) for name, value in values.items()}
        self.file.write(json.dumps({"step": step, "seconds": seconds, **plain}) + "\n")
        shown = {name: json.dumps(value) if isinstance(value, list) else value for name, value in plain.items()}
        for tracker in self.trackers:
            tracker.log({name: value for name, value in shown.items() if value is not None}, step=step)

    def close(self) -> None:
        """Ends the log."""
        self.file.close()
        for tracker in self.trackers:
            tracker.finish()


def require_trackers(trackers: Sequence[str]) -> list[str] | None:
    """The trackers that a recipe names; None for none, as accelerate wants it.

    Raises:
        CafeError: one of them is not installed.
    """
    for tracker in trackers:
        found = find_spec(tracker)
        if found is None or found.origin is None:  # a folder of that name, as wandb leaves one where it runs
            raise CafeError(f"The recipe's tracker {tracker} is not installed: pip install 'cafe-lvlm[{tracker}]'.")
    return list(trackers) or None


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate_jsonl(path: Path, wanted: Callable[[int, dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Keeps of a file of JSON lines the wanted records, by number and content; a line that broke off is dropped.

    Returns the records that are kept.
    """
    kept: list[tuple[str, dict[str, Any]]] = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if wanted(len(kept), record):
            kept.append((line, record))
    atomic_write_text(path, "".join(line + "\n" for line, _ in kept))
    return [record for _, record in kept]
