"""Where a scene's image is, and how annotations are written."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cafe.scenes.world import Scene


def image_path(scene: Scene) -> str:
    """Return the path of a scene's image, relative to the folder of all data."""
    return f"images/{scene.split}/{scene.name}.png"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and the folder it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=0) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON lines, and the folder it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines))
