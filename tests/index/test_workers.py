"""Items are read in order, and one that ends its worker is bad alone."""

from collections import deque

import numpy as np
from collection_samples import CrashingReader, place, write_images

from cafe.content import ImageLimits
from cafe.index.reading import FileItem, RecordItem
from cafe.index.workers import _pop_images, _split, read_ahead
from cafe.lvlm.processing import with_fast_images


def make(tiny, folder, count):
    """Make a reader and items of some images, of which one is called so that reading it ends the process."""
    paths = write_images(folder, count)
    paths[2] = paths[2].rename(folder / "crash.png")
    reader = CrashingReader(with_fast_images(tiny.chat_processor)[0], np.array([b""]), "", ImageLimits())
    return reader, [FileItem(place(str(path), None)) for path in paths]


def test_an_image_that_ends_its_worker_is_bad_and_all_others_are_read(tiny, tmp_path, fast_start):
    reader, items = make(tiny, tmp_path / "photos", 6)
    counts, readings = zip(*read_ahead(reader, items, batch_size=2, num_workers=1), strict=True)
    assert sum(counts) == 6
    # This process read the last ones, while the worker started.
    flat = sorted((reading for batch in readings for reading in batch), key=lambda reading: reading.place.path)
    items.sort(key=lambda item: item.place.path)
    assert [reading.place.path for reading in flat] == [item.place.path for item in items]
    [bad] = [reading for reading in flat if reading.place.error]
    flat.remove(bad)
    assert bad.place.error == f"Reading {tmp_path / 'photos' / 'crash.png'} ended the process that did it."
    assert bad.place.key is None and bad.encoded is None
    assert all(reading.encoded and reading.place.error is None for reading in flat)


def test_items_are_split_by_the_images_that_they_may_have(tmp_path):
    image, pages = FileItem(place("/a", None)), FileItem(place("/b", None), first_page=9)
    split = _split([image, image, pages, image, pages, RecordItem(0)], 10)
    assert split == [[image, image, pages], [image, pages, RecordItem(0)]]
    assert _split([pages, pages], 2) == [[pages], [pages]] and _split([], 2) == []


def test_this_process_takes_images_alone_and_none_that_a_worker_took():
    images, pages = [FileItem(place("/a", None))], [FileItem(place("/b", None), first_page=1)]
    waiting = deque([images, pages])
    assert _pop_images(waiting) is images
    assert _pop_images(waiting) is None and list(waiting) == [pages]
    assert _pop_images(deque()) is None
