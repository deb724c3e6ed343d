"""Kill processes that index at random instants, and look at what they leave.

Most kills hit a process that writes straight into a collection's tables, which starts fast: it adds, replaces and
removes rows, compacts every few commits, and builds indices every few dozen. Every fifth kill hits `Collection.add` on
a folder, as `cafe index` calls it, with its compaction and its vector index as frequent. Both say what is committed by
a line in a file that is flushed to the disk. After each kill the tables are opened: no key and no id may be there
twice, no place may lack its image, and nothing that was committed may be missing or older. At the end two processes
index one folder at once: one is refused, and the other's collection has to be complete.

python benchmarks/index_kills.py [--kills 40] [--seed 0]
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cafe.index import store as store_module
from cafe.index.store import ImageRow, Place, Store

DIM, ROWS, IMAGES = 64, 40, 1500
COMPACTION, INDEX = 3, 25  # commits between two
KINDS = ("writing", "compaction", "index", "writing", "folder")
DELAYS = {"writing": 1.5, "compaction": 0.03, "index": 0.3, "folder": 5.0}  # the most seconds until the kill


def open_log(path: Path) -> Callable[..., None]:
    """Return a function that writes a line and waits until it is on the disk."""
    file = path.open("a")

    def say(*words: object) -> None:
        """Write a line."""
        print(*words, file=file, flush=True)
        os.fsync(file.fileno())

    return say


def write_rows(directory: Path, log: Path, first: int) -> None:
    """Write batches of rows without end, from a number on. The text of an image is the number of its batch."""
    store_module.COMMITS_BETWEEN_COMPACTIONS = COMPACTION
    store, say = Store(directory, DIM), open_log(log)
    rng = np.random.default_rng(first)
    say("ready")
    for batch in range(first, sys.maxsize):
        vectors = rng.normal(size=(ROWS, DIM)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        # Half of the keys are those of the batch before, whose rows are replaced.
        keys = [f"{number:032x}" for number in range(batch * ROWS // 2, batch * ROWS // 2 + ROWS)]
        images = [
            ImageRow(key, vector, f"some words {batch}", vector, str(batch), 1, 1, None, b"")
            for key, vector in zip(keys, vectors, strict=True)
        ]
        say("compaction" if (batch - first + 1) % COMPACTION == 0 else "writing")
        store.write(images, [Place(key, f"/{key}.jpg", None, key, "/", 1, 1, key) for key in keys])
        say("added", batch, *keys)
        if batch % 4 == 3:
            say("removing", keys[0])
            store.remove(keys[:1])
        if (batch - first) % INDEX == INDEX - 1:
            say("index")
            store.index_words()
            store.index_vectors(4)


def index_folder(directory: Path, log: Path, folder: Path) -> None:
    """Index a folder by `Collection.add`, with commits, compactions and a vector index as a large one would have."""
    import lancedb  # noqa: F401 - takes seconds, before the clock runs

    from cafe import Collection  # imports PyTorch, which the other processes do without
    from cafe.errors import CafeError
    from cafe.index import generation, indexing, snapshot

    say = open_log(log)
    store_module.COMMITS_BETWEEN_COMPACTIONS = COMPACTION
    indexing.SECONDS_BETWEEN_COMMITS = 0.1
    snapshot.MAX_EXACT = generation.MAX_EXACT = IMAGES // 2
    write = Store.write

    def logged(store: Store, images: list[ImageRow], places: list[Place]) -> None:
        """Write rows, and log the places."""
        write(store, images, places)
        say("added", 0, *(place.id for place in places))

    Store.write = logged  # type: ignore[assignment,method-assign]
    collection = Collection.open(directory, "scenes")
    _ = collection.model
    say("ready")
    try:
        collection.add(folder, config=indexing.IndexConfig(num_workers=0))
    except CafeError as error:
        sys.exit(str(error))


def start(*words: object) -> "subprocess.Popen[str]":
    """Start one of the functions above in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill(process: "subprocess.Popen[str]", log: Path, begin: int, kind: str, chance: random.Random) -> bool:
    """Kill a process some time after it says that it does something, and return whether it had not ended before."""
    awaited = kind if kind in ("compaction", "index") else "ready"
    while process.poll() is None and awaited not in log.read_text()[begin:].split():
        time.sleep(0.001)
    deadline = time.monotonic() + chance.random() * DELAYS[kind]
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.kill()
    _, error = process.communicate()
    if process.returncode > 0:
        raise SystemExit(f"The process failed:\n{error}")
    return process.returncode < 0


def committed(log: Path) -> dict[str, int]:
    """Return what was added and not removed since, with the number of the batch that it was added by last."""
    batches: dict[str, int] = {}
    # The last line may be cut off.
    for line in log.read_text().split("\n")[:-1]:
        what, *words = line.split(" ")
        if what == "added":
            batches |= dict.fromkeys(words[1:], int(words[0]))
        elif what == "removing":  # and perhaps not removed yet
            batches.pop(words[0], None)
    return batches


def problems(store: Store, log: Path) -> list[str]:
    """List what is wrong with the tables."""
    images: list[dict[str, Any]] = store.read_images(["key", "text", "vector"]).to_pylist()
    places: list[dict[str, Any]] = store.read_places(["id", "key"]).to_pylist()
    found = [f"image {key} {n} times" for key, n in Counter(row["key"] for row in images).items() if n > 1]
    found += [f"place {id} {n} times" for id, n in Counter(row["id"] for row in places).items() if n > 1]
    batch_of = {row["key"]: int(row["text"] or 0) for row in images}
    key_of = {row["id"]: row["key"] for row in places}
    found += [f"the image of {id} is missing" for id, key in key_of.items() if key not in batch_of]
    for id, batch in committed(log).items():
        if id not in key_of:
            found.append(f"{id} is lost")
        elif batch_of.get(key_of[id], batch) < batch:
            found.append(f"{id} is older than what was committed")
    if images:  # both searches work
        vector = np.array(images[0]["vector"], np.float32)
        assert store.nearest(vector, 1), "nothing is found"
        store.search_words("some words", 5)
    return found


def write_images(folder: Path) -> None:
    """Write small images of which no two are equal."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")


def check_folder(directory: Path, folder: Path) -> list[str]:
    """List what is wrong with a collection of the whole folder."""
    from cafe import Collection

    collection = Collection.open(directory)
    found = collection.verify()
    return found if len(collection) == IMAGES else [*found, f"{len(collection)} images instead of {IMAGES}"]


def index_twice(scratch: Path, folder: Path) -> list[str]:
    """Index a folder by two processes at once, and list what is wrong afterwards."""
    directory, logs = scratch / "twice", [scratch / "one.log", scratch / "other.log"]
    processes = [start("folder", directory, log, folder) for log in logs]
    errors = [process.communicate()[1].strip().split("\n")[-1] for process in processes]
    codes = sorted(process.returncode for process in processes)
    print(f"two at once ended with {codes}: {' '.join(error for error in errors if 'another process' in error)}")
    found = check_folder(directory, folder)
    return found if codes == [0, 1] else [*found, f"two indexers ended with {codes}"]


def main() -> None:
    """Print a line for each kill, and the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, found, kills, began = random.Random(options.seed), [], 0, time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        rows, rows_log, folder = scratch / "rows" / "1", scratch / "rows.log", scratch / "images"
        rows.mkdir(parents=True)
        Store.create(rows, DIM)
        write_images(folder)
        collections = 0
        while kills < options.kills:
            kind = KINDS[kills % len(KINDS)]
            tables, log = rows, rows_log
            if kind == "folder":
                log = scratch / f"folder{collections}.log"
                tables = scratch / f"folder{collections}" / "1"
            log.touch()
            begin = log.stat().st_size
            first = 1 + max(committed(log).values(), default=-1)
            words = ("rows", tables, log, first) if kind != "folder" else ("folder", tables.parent, log, folder)
            was_killed = kill(start(*words), log, begin, kind, chance)
            wrong = []
            if (tables.parent / "current").exists() or kind != "folder":
                wrong = problems(Store(tables, DIM if kind != "folder" else _dim(tables)), log)
            if was_killed:
                kills += 1
                left = ", ".join(wrong[:3]) or "all there"
                print(f"kill {kills:2}, {kind}: {len(committed(log)):6,} rows committed, {left}", flush=True)
            else:  # the folder is indexed: begin another collection
                wrong += check_folder(tables.parent, folder)
                collections += 1
            found += wrong
        last = start("folder", scratch / f"folder{collections}", scratch / f"folder{collections}.log", folder)
        assert last.wait() == 0
        found += check_folder(scratch / f"folder{collections}", folder)
        found += index_twice(scratch, folder)
    print(f"{kills} kills and two indexers at once in {time.monotonic() - began:.0f} s: {len(found)} problems")
    sys.exit(1 if found else 0)


def _dim(generation: Path) -> int:
    """Return the number of dimensions of a generation's vectors."""
    from cafe.index.manifest import read_manifest

    return read_manifest(generation).dim


if __name__ == "__main__":
    if sys.argv[1:2] == ["rows"]:
        write_rows(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["folder"]:
        index_folder(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
