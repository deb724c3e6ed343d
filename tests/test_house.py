"""Imports run downwards only."""

import ast
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "cafe"
# Lower rooms first; a room may import those below it and itself.
FLOORS = [
    {"errors", "disk", "masks", "workers"},
    {"content", "pixels", "resizing", "last_layer"},
    {"instructions", "packing", "objectives"},
    {"families", "processing", "image_limits", "tree_attention"},
    {"adapters", "export", "reading"},
    {"model"},
    {"data"},
    {"training"},
    {"evaluation"},
    {"cli"},
]
SCENES_MAY_IMPORT = {
    "errors",
    "content",
    "instructions",
    "packing",
    "objectives",
    "processing",
    "reading",
    "model",
    "training",
    "workers",
    "scenes",
}


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("cafe."):
            rooms.add(node.module.split(".")[1])
    return rooms


def room_of(file: Path) -> str:
    return file.relative_to(SRC).parts[0].removesuffix(".py")


def test_imports_run_downwards_only():
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    wrong = []
    for file in SRC.rglob("*.py"):
        room = room_of(file)
        if room in ("scenes", "__init__", "__main__"):
            continue
        for other in imported_rooms(file):
            if room != "cli" and (other == "scenes" or (other != room and floor[other] >= floor[room])):
                wrong.append(f"{file.relative_to(SRC)} imports {other}")
    assert not wrong


def test_scenes_stand_apart():
    wrong = {str(file): imported_rooms(file) - SCENES_MAY_IMPORT for file in (SRC / "scenes").glob("*.py")}
    assert not any(wrong.values()), wrong
