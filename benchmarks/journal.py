"""What a benchmark measures, written to a file figure by figure: nothing is lost if it is stopped."""

import json
from pathlib import Path
from typing import Any

from cafe.utils.atomic import atomic_write_text


class Journal:
    """Collects rows of figures by name.

    Args:
        path: a JSON file that holds all rows after each that is added; None for no file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.rows = path, list[dict[str, Any]]()

    def add(self, row: dict[str, Any]) -> None:
        """Print a row and write it; its first entry says what was measured."""
        self.rows.append(row)
        title, *figures = row.items()
        print(f"{title[1]}: " + ", ".join(f"{name} {format_value(value)}" for name, value in figures), flush=True)
        if self.path:
            atomic_write_text(self.path, json.dumps(self.rows, indent=2) + "\n")

    def add_failure(self, title: str, error: Exception) -> None:
        """Write that something could not be measured, and why."""
        self.add({"figure": title, "failed": f"{type(error).__name__}: {str(error).strip()[:300]}"})


def format_value(value: Any) -> str:
    """Format a figure for a table."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    if isinstance(value, list):
        return ", ".join(map(format_value, value))
    return str(value)
