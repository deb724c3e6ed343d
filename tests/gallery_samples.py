"""A small collection behind a running server, for the tests of its routes and of its page."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from collection_samples import add
from PIL import Image

from cafe.index.collection import Collection
from cafe.model import Cafe
from cafe.serving.config import RequestLimits, ServingConfig
from cafe.serving.server import running_services
from cafe.serving.services import Services

CONFIG = ServingConfig(port=0, limits=RequestLimits(timeout=60))
COLORS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (230, 200, 40)}
SCRIPT_NAME = "<img src=x onerror=alert(1)>.png"
SECONDS_A_DAY = 86_400
FIRST = 1_700_000_000  # seconds since 1970, in November 2023


def write_gallery(folder: Path) -> Path:
    """Write images of different colors, shapes and days, in two folders, one with a name that is a script."""
    for number, (name, color) in enumerate(COLORS.items()):
        path = folder / ("beach" if number % 2 else "town") / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new("RGB", (120 + 40 * number, 120), color)
        image.paste((255, 255, 255), (20, 20, 50 + 10 * number, 60))
        image.save(path)
        _set_day(path, number)
    path = folder / "beach" / SCRIPT_NAME
    Image.new("RGB", (64, 96), (90, 90, 90)).save(path)
    _set_day(path, len(COLORS))
    return folder


def _set_day(path: Path, number: int) -> None:
    """Let a file be of a certain day."""
    seconds = FIRST + 100 * SECONDS_A_DAY * number
    os.utime(path, (seconds, seconds))


@contextmanager
def gallery_services(directory: Path, base: Path) -> Iterator[Services]:
    """Run the parts of a server with a new collection of the images in `directory`/photos."""
    collection = Collection.open(directory / "gallery", Cafe.load(base))
    assert add(collection, write_gallery(directory / "photos")) == {"added": len(COLORS) + 1}
    with running_services(CONFIG, Cafe.load(base), directory / "gallery") as services:
        yield services
