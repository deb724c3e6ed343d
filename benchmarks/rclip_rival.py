"""Indexing and searching a folder beside rclip, in an environment of its own.

The folder holds scenes as JPEG files of 256 x 256 pixels. The first run of each indexes it and finds something; the
second one finds that nothing has changed and searches. rclip's model (CLIP ViT-B/32 at 256 pixels) has many times the
weights of the one that comes with this package, so that the times say how long users of each wait, and nothing about
which is faster with the same model. Give a model of your own by `--model`.

rclip downloads its model from the Hub. Where that cannot be reached, its time to start is measured, and ours alone.

python benchmarks/rclip_rival.py [--images 1000] [--model scenes] [--rclip PATH]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import machine
from indexing import SIDE, write_images

QUERY = "a large yellow star"


def install(directory: Path) -> Path | str:
    """Install rclip into a new environment, and return its command, or why there is none."""
    subprocess.run([sys.executable, "-m", "venv", directory], check=True)
    done = subprocess.run([directory / "bin" / "pip", "install", "-q", "rclip"], capture_output=True, text=True)
    if done.returncode:
        return f"rclip cannot be installed: {_last_line(done.stderr)}"
    return directory / "bin" / "rclip"


def timed(command: Sequence[str | Path], folder: Path, **environment: str) -> float | str:
    """Run a command in a folder, and return the seconds, or why it failed."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)
    return _last_line(done.stderr) if done.returncode else time.perf_counter() - began


def _last_line(text: str) -> str:
    """Return the last line with words in it."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def measure_rclip(command: Path | str, folder: Path, scratch: Path) -> list[str]:
    """Return what can be said about rclip's times."""
    if isinstance(command, str):
        return [command]
    data = {"RCLIP_DATADIR": str(scratch / "rclip")}
    lines = [f"rclip: its command starts in {_shown(timed([command, '--version'], folder))}"]
    # The model comes first, so that its download is not measured.
    (scratch / "empty").mkdir()
    ready = timed([command, QUERY], scratch / "empty", **data)
    if isinstance(ready, str):
        return [*lines, f"rclip cannot be measured here, because its model cannot be loaded: {ready}"]
    first, second = timed([command, QUERY], folder, **data), timed([command, QUERY], folder, **data)
    return [*lines, f"rclip: indexed and searched in {_shown(first)}, searched again in {_shown(second)}"]


def measure_ours(model: str, folder: Path, scratch: Path) -> list[str]:
    """Return our times, of the same steps."""
    cafe = [sys.executable, "-m", "cafe"]
    data = {"XDG_DATA_HOME": str(scratch / "data")}
    index = timed([*cafe, "index", folder, "--model", model], folder, **data)
    search = timed([*cafe, "search", *QUERY.split()], folder, **data)
    again, second = (
        timed([*cafe, "index", folder], folder, **data),
        timed([*cafe, "search", *QUERY.split()], folder, **data),
    )
    return [
        f"cafe: its command starts in {_shown(timed([*cafe, '--help'], folder))}",
        f"cafe: indexed in {_shown(index)}, then searched in {_shown(search)}",
        f"cafe: indexed again, with nothing changed, in {_shown(again)}, then searched in {_shown(second)}",
    ]


def _shown(result: float | str) -> str:
    """Return seconds, or why there are none, as text."""
    return f"no time ({result})" if isinstance(result, str) else f"{result:.1f} s"


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--model", default="scenes", help="of ours")
    parser.add_argument("--rclip", type=Path, help="the command of an installed rclip")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        folder = scratch / "images"
        write_images(folder, options.images)
        print(f"{options.images} images of {SIDE} x {SIDE} pixels, on {machine()}", flush=True)
        for line in measure_ours(options.model, folder, scratch):
            print(line, flush=True)
        command = options.rclip.absolute() if options.rclip else install(scratch / "venv")
        for line in measure_rclip(command, folder, scratch):
            print(line, flush=True)


if __name__ == "__main__":
    main()
