"""Bring a collection up to date with a folder or a source: what is new, changed, moved or gone, by content."""

import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace

import torch
from tqdm import tqdm

from cafe.content import ImageLimits
from cafe.data.records import OpenedSource
from cafe.errors import CafeError
from cafe.index.embedding import embed_rows
from cafe.index.known import Known
from cafe.index.manifest import Root
from cafe.index.pdf import has_pdfium
from cafe.index.reading import Encoded, FileItem, Item, Reader, Reading, RecordItem, is_text
from cafe.index.store import ImageRow, Place, Store
from cafe.index.walk import File, Walk, is_left_out, walk
from cafe.index.workers import read_ahead
from cafe.lvlm.processing import with_fast_images
from cafe.model import Cafe

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_COMMITS = 1.5
MIN_ITEMS_FOR_WORKERS = 256  # fewer are read in the time that it takes to start a process
MAX_WORKERS = 8


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Configure how images are read and embedded.

    Attributes:
        batch_size: images per forward pass.
        num_workers: processes that decode; 0 decodes in this one, None for one less than there are cores.
        max_new_tokens: the maximum length of a caption, in tokens.
        limits: on the bytes and pixels of an image.
        retry: read images again that could not be read before, although their files have not changed.
        allow_empty: drop all images of a folder in which nothing is found any more.
        progress: show a progress bar.
    """

    batch_size: int = 32
    num_workers: int | None = None
    max_new_tokens: int = 64
    limits: ImageLimits = field(default_factory=ImageLimits)
    retry: bool = False
    allow_empty: bool = False
    progress: bool = False


@dataclass
class IndexReport:
    """Report what a run changed, in images and pages.

    Attributes:
        added: new paths with new contents.
        updated: paths whose content changed.
        moved: new paths of contents that were known before: files that were moved, renamed or copied.
        removed: paths that are gone.
        failed: paths whose content cannot be read.
        unchanged: paths that are as they were.
        failures: the id of each place that could not be read in this run, with the reason.
        seconds: how long it took.
        seconds_waited: how much of that the model waited for images.
    """

    added: int = 0
    updated: int = 0
    moved: int = 0
    removed: int = 0
    failed: int = 0
    unchanged: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_waited: float = 0.0

    @property
    def has_changes(self) -> bool:
        """Return whether paths were added, updated, moved or removed."""
        return bool(self.added or self.updated or self.moved or self.removed)

    def counts(self) -> dict[str, int]:
        """Return the numbers of paths by what became of them."""
        return {name: value for name, value in asdict(self).items() if isinstance(value, int)}


def index_folder(store: Store, model: Cafe, root: Root, config: IndexConfig, others: Sequence[Root]) -> IndexReport:
    """Bring a collection up to date with a folder, or with one file.

    Args:
        store: the tables of the collection.
        model: embeds the images.
        root: the folder.
        config: how images are read and embedded.
        others: what else the collection was made of: images of a source are left to it, and so are those that this
            folder leaves out by their names and another one does not.

    Raises:
        CafeError: nothing is found in the folder, or it has vanished, although images of it are in the collection.
    """
    # What is there now, and what was there before.
    run = _Run(store, model, root, config)
    found = walk(root.path, root.hidden, root.exclude)
    sources = {other.path for other in others if other.is_source}
    folders = [other for other in others if not other.is_source]
    before = {
        place.id
        for place in run.known.places.values()
        if is_below(place.path, root.path)
        and place.root not in sources
        and (_covers(root, place.path) or not any(_covers(other, place.path) for other in folders))
    }
    if before and not found.files and not config.allow_empty:
        raise CafeError(
            f"Nothing is found in {root.path}, but {len(before):,} images of it are in the collection: if a drive is "
            "not mounted, mount it; to drop the images, index with --allow-empty."
        )
    # PDF files that are left out are not gone.
    paths = {file.path for file in found.files}
    _leave_out_pdf_files(found)
    for folder, reason in found.unreadable.items():
        run.fail(folder, reason)
    run.read([item for file in found.files for item in run.items_of(file, sources)])
    if before and not config.allow_empty and not os.path.exists(root.path):
        raise CafeError(f"{root.path} has vanished while it was read: index it again when it is back.")

    # What could not be listed may still be there.
    for id in before:
        path = run.known.places[id].path
        if path not in paths and not any(is_below(path, folder) for folder in found.unreadable):
            run.gone.add(id)
    return run.finish()


def index_source(store: Store, model: Cafe, root: Root, config: IndexConfig, source: OpenedSource) -> IndexReport:
    """Bring a collection up to date with a source of records, all of which are read.

    Args:
        store, model, root, config: see `index_folder`.
        source: the source.

    Raises:
        CafeError: no image can be read, although images of the source are in the collection.
    """
    run = _Run(store, model, root, config, source)
    before = {place.id for place in run.known.places.values() if place.root == root.path}
    run.read([RecordItem(number) for number in range(len(source))])
    if run.broken and not run.has_read and not config.allow_empty:
        raise CafeError(
            f"No image of {root.path} can be read any more: {next(iter(run.broken.values())).error} If a drive is not "
            "mounted, mount it; to drop the images, index with --allow-empty."
        )
    run.gone |= before - run.seen
    return run.finish()


def drop_source(store: Store, root: Root) -> IndexReport:
    """Remove the images of a source that does not exist any more, and return the report."""
    places = store.read_places(["id", "root"]).to_pylist()
    gone = [place["id"] for place in places if place["root"] == root.path]
    store.remove(gone)
    store.remove_images_without_places()
    return IndexReport(removed=len(gone))


class _Run:
    """Read, embed and write the items of one run, and count what became of them.

    Attributes:
        known: what was in the collection before.
        seen: the ids of the places that were read.
        has_read: whether an image was read.
        broken: places that had an image before and cannot be read now. They are written last, because the reason may
            be a drive that has gone.
        gone: the ids of the places to remove.
    """

    def __init__(
        self, store: Store, model: Cafe, root: Root, config: IndexConfig, source: OpenedSource | None = None
    ) -> None:
        self.store, self.model, self.root, self.config = store, model, root, config
        self.known = Known.read(store, captioned=root.describe)
        self.seen: set[str] = set()
        self.has_read = False
        self.broken: dict[str, Place] = {}
        self.gone: set[str] = set()
        self._report = IndexReport()
        self._started = self._last_commit = time.monotonic()

        # Images are read as bytes, as in training, and normalized beside the model.
        chat_processor, self._normalization = with_fast_images(model.chat_processor)
        prompt = root.describe_prompt if root.describe else ""
        self._reader = Reader(chat_processor, self.known.sorted_keys(), prompt, config.limits, source)

        self._new_keys: set[str] = set()  # of images embedded in this run
        self._moved_keys: set[str] = set()
        self._unusable_keys: set[str] = set()  # of images whose embedding is not finite
        # What is written with the next commit.
        self._images: dict[str, ImageRow] = {}
        self._places: dict[str, Place] = {}

    def items_of(self, file: File, sources: Collection[str]) -> Iterator[Item]:
        """Yield what is to be read of a file: nothing if it has not changed, or belongs to one of the sources."""
        if not is_text(file.path):
            self.fail(file.path, "Its name is not UTF-8: rename the file.")
            return
        known = self.known.places.get(file.path)
        if known and known.root in sources:
            self._report.unchanged += 1
            return
        if self.known.is_current(file) and not self._is_retried(file):
            ids = self.known.ids_of(file.path)
            num_failed = sum(self.known.places[id].error is not None for id in ids)
            self._report.failed += num_failed
            self._report.unchanged += len(ids) - num_failed
            return
        place = Place(file.path, file.path, None, self._name_of(file), self.root.path, file.size, file.mtime_ns)
        yield FileItem(place, first_page=1 if file.is_pdf else 0)

    def _is_retried(self, file: File) -> bool:
        """Return whether a file is read again because it, or one of its pages, could not be read before."""
        return self.config.retry and any(self.known.places[id].error for id in self.known.ids_of(file.path))

    def _name_of(self, file: File) -> str:
        """Return the part of a file's path whose words are searched."""
        if file.path == self.root.path:
            return os.path.basename(file.path)
        return os.path.relpath(file.path, self.root.path)

    def read(self, items: list[Item]) -> None:
        """Read items, embed those that are new, and write what became of each."""
        try:
            self._read(items)
        except BaseException:  # Ctrl-C too: what was embedded is kept
            with suppress(CafeError):  # such as a full disk, of which the first error says enough
                self._commit()
            raise
        self._commit()

    def _read(self, items: list[Item]) -> None:
        """Read items, and write every second or two."""
        with tqdm(total=len(items), desc="index", unit="image", disable=not self.config.progress, leave=False) as bar:
            while items:
                next_items: list[Item] = []
                for count, readings in self._read_ahead(items):
                    next_items += self._take(readings)
                    bar.update(count)
                    if time.monotonic() - self._last_commit > SECONDS_BETWEEN_COMMITS:
                        self._commit()
                # The next pages of PDF files: only their first ones say how many there are.
                items = next_items
                bar.total = bar.n + len(items)

    def _read_ahead(self, items: list[Item]) -> Iterator[tuple[int, list[Reading]]]:
        """Yield the readings of items, and measure how long the model waits for them."""
        num_workers = _num_workers(items, self.config.num_workers)
        stream = read_ahead(self._reader, items, self.config.batch_size, num_workers)
        with _leave_cores(num_workers if self.model.lvlm.device.type == "cpu" else 0):
            while True:
                asked = time.monotonic()
                readings = next(stream, None)
                self._report.seconds_waited += time.monotonic() - asked
                if readings is None:
                    return
                yield readings

    def _take(self, readings: list[Reading]) -> list[Item]:
        """Embed the new images of some readings and note all places; return what is to be read next."""
        # By key: the same content may come twice, here or in an earlier batch.
        images: dict[str, Encoded] = {}
        for reading in readings:
            key = reading.place.key
            if key and reading.encoded and key not in self._new_keys and key not in self._unusable_keys:
                images[key] = reading.encoded
        rows = embed_rows(self.model, images, self._normalization, self.config.max_new_tokens)
        self._images |= rows
        self._new_keys |= rows.keys()
        self._unusable_keys |= images.keys() - rows.keys()

        next_items: list[Item] = []
        for reading in readings:
            self._note(reading)
            next_items += [FileItem(reading.place, page) for page in reading.next_pages]
        return next_items

    def _note(self, reading: Reading) -> None:
        """Count a place, and have it written with the next commit."""
        place = reading.place
        if reading.next_pages:  # a PDF file counts as changed until its last page was read
            return
        if place.id in self.seen:  # several records of one image
            return
        before = self.known.places.get(place.id)
        if place.error and not self.root.is_source and not os.path.lexists(place.path):
            # Deleted since the folder was walked.
            ids = {place.id, *self.known.pages.get(place.path, ())}
            self.gone |= ids & self.known.places.keys()
            return
        if place.key in self._unusable_keys:
            place = replace(place, key=None, error="The model's embedding of it is not finite.")
        self.seen.add(place.id)
        self.has_read |= place.key is not None
        # Whatever became of it is written, but the loss of an image only at the end.
        if place.error and before and before.key:
            self.broken[place.id] = place
        else:
            self._places[place.id] = place
        # Counted by what it was before.
        if place.error:
            self.fail(place.id, place.error)
        elif place.key is None:  # a PDF file, whose pages are counted
            pass
        elif before and before.key == place.key:
            self._report.unchanged += 1
        elif before:
            self._report.updated += 1
        elif place.key in self.known.keys:
            self._report.moved += 1
            self._moved_keys.add(place.key)
        else:
            self._report.added += 1

    def fail(self, id: str, reason: str) -> None:
        """Count a place that cannot be read."""
        self._report.failed += 1
        self._report.failures[id] = reason

    def _commit(self) -> None:
        """Write what has come together since the last time."""
        if self._places or self._images:
            self.store.write(list(self._images.values()), list(self._places.values()))
        self._images, self._places = {}, {}
        self._last_commit = time.monotonic()

    def finish(self) -> IndexReport:
        """Write what cannot be read any more, remove what is gone, and return the report."""
        # Pages that a file had before and has no more.
        ended = self.seen & self.known.pages.keys()
        self.gone |= {id for path in ended for id in self.known.pages[path]} - self.seen
        self._places = self.broken
        self._commit()
        self.store.remove(self.gone)
        self.store.remove_images_without_places()
        # The old place of a content that was found at a new one was moved, not removed. PDF files have no key.
        for id in self.gone:
            place = self.known.places[id]
            if (place.key or place.error) and place.key not in self._moved_keys:
                self._report.removed += 1
        self._report.seconds = time.monotonic() - self._started
        return self._report


def is_below(path: str, folder: str) -> bool:
    """Return whether a path is a folder or in it, by their names."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _covers(root: Root, path: str) -> bool:
    """Return whether a path is in a folder and not left out of it by a name."""
    if not is_below(path, root.path):
        return False
    names = path[len(root.path) :].split(os.sep)
    return not any(is_left_out(name, root.hidden, root.exclude) for name in names)


def _leave_out_pdf_files(found: Walk) -> None:
    """Leave PDF files out if the package that reads them is not installed, and say so."""
    if has_pdfium():
        return
    others = [file for file in found.files if not file.is_pdf]
    num_left_out = len(found.files) - len(others)
    if num_left_out:
        logger.warning("%d PDF files are left out: to index their pages, pip install 'cafe-lvlm[pdf]'.", num_left_out)
    found.files = others


@contextmanager
def _leave_cores(num_workers: int) -> Iterator[None]:
    """Leave a core to each worker: a model on the CPU takes all, and threads that share one wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(max(1, min(num_threads, (os.cpu_count() or 1) - num_workers)))
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _num_workers(items: Sequence[Item], wanted: int | None) -> int:
    """Return the number of processes that read items, of which PDF files need at least one."""
    if wanted is None:
        wanted = 0
        if len(items) >= MIN_ITEMS_FOR_WORKERS:
            wanted = min(MAX_WORKERS, max(1, (os.cpu_count() or 1) - 1))
    return max(wanted, int(any(item.is_pdf for item in items)))
