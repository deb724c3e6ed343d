"""A process that indexes is killed at random instants: what was acknowledged stays, and nothing is there twice."""

import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

from collection_samples import FAST, images_of, keys_of, write_images

from cafe.index import indexing
from cafe.index import store as store_module
from cafe.index.collection import Collection

KILLS = 3
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["cafe.index.collection", "cafe.training.loop"])


def index_slowly(directory: Path, photos: Path, base: Path, acknowledged: Path) -> None:
    """Index with many small commits and compactions, and write down each file as soon as it is committed."""
    indexing.SECONDS_BETWEEN_COMMITS = 0
    store_module.COMMITS_BETWEEN_COMPACTIONS = 3
    write = store_module.Store.write

    def write_and_acknowledge(self, images, places):
        write(self, images, places)
        with acknowledged.open("a") as file:
            file.writelines(f"{place.id}\n" for place in places)
        time.sleep(0.01)

    store_module.Store.write = write_and_acknowledge  # type: ignore[method-assign]
    Collection.open(directory, base).add(photos, config=replace(FAST, batch_size=2))


def test_nothing_is_lost_or_doubled_by_kills_at_random_instants(tmp_path, tiny, random_base):
    photos, directory, acknowledged = tmp_path / "photos", tmp_path / "collection", tmp_path / "acknowledged"
    paths = write_images(photos, 60)
    seed = time.time_ns()
    chance = random.Random(seed)
    print(f"The instants are those of seed {seed}.")  # shown if it fails
    acknowledged.touch()
    for kill in range(KILLS):
        process = PROCESSES.Process(target=index_slowly, args=(directory, photos, random_base, acknowledged))
        process.start()
        before = len(acknowledged.read_text().splitlines())
        # Not before it indexes: after the first commit of this process or somewhat later.
        while process.is_alive() and len(acknowledged.read_text().splitlines()) == before and kill < KILLS - 1:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
        if process.is_alive() and process.pid:
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)

        lines = acknowledged.read_text().splitlines()
        assert len(set(lines)) == len(lines), "a file was read again after it was acknowledged"
        if (directory / "current").exists():
            collection = Collection.open(directory, tiny)
            assert set(lines) <= keys_of(collection).keys() and set(keys_of(collection).values()) <= set(
                images_of(collection)["key"].to_pylist()
            )
    collection = Collection.open(directory, tiny)
    report = collection.add(photos, config=FAST)
    assert (report.added + report.unchanged, report.failed) == (60, 0) and report.unchanged >= len(lines) > 0
    assert keys_of(collection).keys() == set(map(str, paths)) and len(images_of(collection)) == 60
    assert collection.verify() == []
