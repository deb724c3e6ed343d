"""What a server tells about a collection: its images by opaque ids, and names of folders, but no path."""

import json
import os
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from cafe.index.collection import Collection
from cafe.index.filters import Filters, Predicate
from cafe.index.manifest import Root
from cafe.index.searching import Hit, Sort, make_hit, sort_hits
from cafe.index.snapshot import Snapshot
from cafe.serving.search_schemas import FoundImage

_ANYWHERE = Filters().compile()


@dataclass(frozen=True)
class Gallery:
    """Hold a collection as it was at one version.

    Images are known by the digest of their content, which tells nothing about where they are, and with which no other
    file can be asked for.

    Attributes:
        snapshot: its images.
        roots: what it was made of.
    """

    snapshot: Snapshot
    roots: tuple[Root, ...]

    def hit(self, id: str) -> Hit | None:
        """Return an image by its id; None if it is not in the collection."""
        # The key of a page of a document has a "#", where the path of an address ends.
        number = self.snapshot.numbers.get(id.replace("-", "#"))
        if number is None:
            return None
        return make_hit(self.snapshot, number, self.snapshot.place_of(number, _ANYWHERE), 0.0, 0.0)

    def latest(self, predicate: Predicate, k: int, sort: Sort) -> list[Hit]:
        """Return images without a search: the latest that pass the filters, in the order that is wanted."""
        snapshot = self.snapshot
        allowed = snapshot.allowed(predicate)
        numbers = range(len(snapshot)) if allowed is None else np.flatnonzero(allowed).tolist()
        # Where each of them is looks at the disk, so only for those that are shown.
        ordered = sorted(
            numbers,
            key=lambda number: snapshot.taken_at(number, snapshot.places[number][0]),
            reverse=sort != "oldest",
        )
        hits = [make_hit(snapshot, number, snapshot.place_of(number, predicate), 0.0, 0.0) for number in ordered[:k]]
        return sort_hits(hits, sort)

    @cached_property
    def columns(self) -> list[str]:
        """Return the names of the columns that came along with records, in order, without those that name files."""
        names: set[str] = set()
        locations: set[str] = set()
        for place in chain.from_iterable(self.snapshot.places):
            for name, value in (json.loads(place.columns) if place.columns else {}).items():
                (locations if _is_location(value) else names).add(name)
        return sorted(map(printable, names - locations))

    @cached_property
    def folders(self) -> list[str]:
        """Return the names of all folders, in order."""
        places = list(chain.from_iterable(self.snapshot.places))
        files = {place.path for place in places}
        # What was indexed is a folder, unless it is a source or a file.
        names = {os.path.basename(root.path) for root in self.roots if not root.is_source and root.path not in files}
        for place in places:
            names.update(Path(self._name(place.path, place.id)).parent.parts)
        return sorted(map(printable, names - {""}), key=str.casefold)

    @cached_property
    def dates(self) -> tuple[date, date] | None:
        """Return the days of the oldest and of the newest image; None if there are no images."""
        # The day of its first place; the others are copies of the same image.
        snapshot = self.snapshot
        times = [snapshot.taken_at(number, places[0]) for number, places in enumerate(snapshot.places)]
        return (min(times).date(), max(times).date()) if times else None

    def describe(self, hit: Hit, score: float | None) -> FoundImage:
        """Return what a client is told about an image."""
        name = Path(self._name(hit.path, hit.id))
        # A column may name the file that a record was made of, and paths are not told.
        columns = {
            printable(column): printable(value) if isinstance(value, str) else value
            for column, value in hit.columns.items()
            if not _is_location(value)
        }
        return FoundImage(
            id=hit.key.replace("#", "-"),
            name=printable(name.name),
            folder=printable("" if name.parent == Path() else str(name.parent)),
            page=hit.page,
            score=score,
            taken_at=hit.taken_at.isoformat(),
            width=hit.width,
            height=hit.height,
            caption=printable(hit.caption or ""),
            columns=columns,
        )

    def _name(self, path: str, id: str) -> str:
        """Return the path of an image within what was indexed; without a file, the source and the record's number."""
        # A record of a table has no file of its own; of a file outside what was indexed, no folder is told.
        if "#record=" in id and id != path:
            return os.path.basename(path) + id[id.rindex("#record=") :]
        for root in self.roots:
            if path.startswith(root.path.rstrip(os.sep) + os.sep):
                return os.path.relpath(path, root.path)
        return os.path.basename(path)


def printable(text: str) -> str:
    """Return a text that can be sent: file names may hold bytes that are none."""
    return text.encode("utf-8", "replace").decode()


def _is_location(value: Any) -> bool:
    """Return whether a column's value tells where a file is on this machine."""
    return isinstance(value, str) and (os.path.isabs(value) or value.startswith("file:"))


class GalleryReader:
    """Read a collection for many requests at once, and keep what was worked out for its version."""

    def __init__(self) -> None:
        self._gallery: Gallery | None = None
        self._reading = Lock()

    def read(self, collection: Collection) -> Gallery:
        """Return the collection as it is now; quick where nothing was written since the last time."""
        # One at a time: a page of thumbnails would have it read by all threads at first.
        with self._reading:
            # A collection that was written meanwhile has another snapshot, and what is kept is of the old one.
            snapshot, roots = collection.read_snapshot(), collection.manifest.roots
            gallery = self._gallery
            if gallery is None or gallery.snapshot is not snapshot or gallery.roots != roots:
                self._gallery = gallery = Gallery(snapshot, roots)
            return gallery
