"""What a collection holds already, before a run: which files need not be read, and which contents not be embedded."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from cafe.index.reading import KnownKeys
from cafe.index.store import Store
from cafe.index.walk import File


@dataclass(frozen=True)
class KnownPlace:
    """Hold what is known about a place; see `Place`."""

    id: str
    path: str
    page: int | None
    root: str
    size: int
    mtime_ns: int
    key: str | None
    error: str | None


@dataclass(frozen=True)
class Known:
    """Hold what is in a collection.

    Attributes:
        places: by their ids.
        pages: the ids of the pages of each PDF file, by its path.
        keys: of all images that have a place.
        complete_keys: of those that need not be read again: all, or where captions are wanted those that have one.
    """

    places: dict[str, KnownPlace]
    pages: dict[str, list[str]]
    keys: frozenset[str]
    complete_keys: frozenset[str]

    @classmethod
    def read(cls, store: Store, captioned: bool) -> "Known":
        """Read what is in a collection; `captioned` says whether captions are wanted."""
        columns = [name for name in KnownPlace.__dataclass_fields__]
        rows = store.read_places(columns).to_pylist()
        places = {row["id"]: KnownPlace(**row) for row in rows}
        pages: dict[str, list[str]] = defaultdict(list)
        for place in places.values():
            if place.page:
                pages[place.path].append(place.id)

        images = store.read_images(["key", "caption"])
        if captioned:
            images = images.filter(images["caption"].is_valid())
        keys = frozenset(place.key for place in places.values() if place.key)
        return cls(places, pages, keys, frozenset(images["key"].to_pylist()))

    def is_current(self, file: File) -> bool:
        """Return whether a file is as it was when it was read, successfully or not."""
        place = self.places.get(file.path)
        if place is None or (place.size, place.mtime_ns) != (file.size, file.mtime_ns):
            return False
        if place.error:
            return True
        # A PDF file has no key, but its pages do.
        keys = [self.places[id].key for id in self.ids_of(file.path)]
        return all(key is None or key in self.complete_keys for key in keys)

    def ids_of(self, path: str) -> list[str]:
        """Return the ids of a file's places: its own, or those of its pages, with its own if it has an error."""
        pages, own = self.pages.get(path, []), self.places.get(path)
        return [path, *pages] if not pages or (own and own.error) else pages

    def sorted_keys(self) -> KnownKeys:
        """Return the keys that need not be read again, as a `Reader` takes them."""
        return np.sort(np.array([key.encode() for key in self.complete_keys] or [b""]))
