"""What a search needs of a collection, in memory: exact vectors of up to 200,000 images, and what is known of all."""

import os
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from cafe.images.appearance import NUM_BYTES
from cafe.index.filters import Predicate, local_time
from cafe.index.store import Store, to_matrix

MAX_EXACT = 200_000  # images that are searched exactly; beyond, the vector index is
NANOSECONDS = 1_000_000_000
_IMAGE_COLUMNS = ("key", "caption", "text", "width", "height", "taken_at")


@dataclass(frozen=True)
class PlaceOfImage:
    """Hold where an image is; see `Place`."""

    id: str
    path: str
    page: int | None
    name: str
    mtime_ns: int
    columns: str | None


@dataclass(frozen=True)
class Snapshot:
    """Hold a collection as it was at one version. Images are known by their number.

    Attributes:
        store: the tables.
        version: of the tables.
        images: what is known of each image that has a place, without vectors.
        places: where each image is.
    """

    store: Store
    version: tuple[int, int]
    images: pa.Table
    places: list[list[PlaceOfImage]]

    @classmethod
    def read(cls, store: Store) -> "Snapshot":
        """Read a collection."""
        version = store.version
        places: dict[str, list[PlaceOfImage]] = defaultdict(list)
        for row in store.read_places(["key", *PlaceOfImage.__dataclass_fields__]).to_pylist():
            key = row.pop("key")
            if key is not None:
                places[key].append(PlaceOfImage(**row))
        images = store.read_images(_IMAGE_COLUMNS)
        # A kill may have left images without a place.
        placed = [key in places for key in images["key"].to_pylist()]
        images = images.filter(pa.array(placed, pa.bool_())).sort_by("key").combine_chunks()
        found = [sorted(places[key], key=lambda place: place.id) for key in images["key"].to_pylist()]
        return cls(store, version, images, found)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.places)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Return the number of each image by its key."""
        return {key: number for number, key in enumerate(self.images["key"].to_pylist())}

    @cached_property
    def _dates(self) -> list[datetime | None]:
        """Return when each image was taken; None if it does not say."""
        return self.images["taken_at"].to_pylist()

    @cached_property
    def _widths(self) -> Int32[np.ndarray, " images"]:
        """Return the width of each image, in pixels."""
        return self.images["width"].to_numpy()

    @cached_property
    def _heights(self) -> Int32[np.ndarray, " images"]:
        """Return the height of each image, in pixels."""
        return self.images["height"].to_numpy()

    @cached_property
    def appearances(self) -> UInt8[np.ndarray, "images bytes"]:
        """Return what each image looks like; see `cafe.images.appearance`."""
        table = self.store.read_images(["key", "appearance"])
        appearances = dict(zip(table["key"].to_pylist(), table["appearance"].to_pylist(), strict=True))
        joined = b"".join(appearances[key] for key in self.images["key"].to_pylist())
        return np.frombuffer(joined, np.uint8).reshape(len(self), NUM_BYTES)

    @cached_property
    def vectors(self) -> Float32[np.ndarray, "images dim"]:
        """Return the embeddings of all images."""
        # In the order of the images, which is not that of the table.
        vectors, numbers = self._read_vectors("vector")
        ordered = np.zeros((len(self), self.store.dim), np.float32)
        ordered[numbers] = vectors
        return ordered

    @cached_property
    def caption_vectors(self) -> tuple[Float32[np.ndarray, "captions dim"], Int64[np.ndarray, " captions"]]:
        """Return the embeddings of captions, and the number of the image of each."""
        return self._read_vectors("caption_vector")

    def vectors_of(self, numbers: Int64[np.ndarray, " images"]) -> Float32[np.ndarray, "images dim"]:
        """Return the embeddings of some images, without reading all."""
        if self.is_exact:
            return self.vectors[numbers]
        # The table returns them in an order of its own.
        keys = self.images["key"].take(pa.array(numbers)).to_pylist()
        vectors, found = self._vectors_in(self.store.read_images(["key", "vector"], keys), "vector")
        order = {number: row for row, number in enumerate(found.tolist())}
        return vectors[[order[number] for number in numbers.tolist()]]

    @property
    def is_exact(self) -> bool:
        """Return whether the collection is small enough to be searched exactly in memory."""
        return len(self) <= MAX_EXACT

    def _read_vectors(self, column: str) -> tuple[Float32[np.ndarray, "rows dim"], Int64[np.ndarray, " rows"]]:
        """Read a column of vectors, and the number of the image of each; images without one are left out."""
        return self._vectors_in(self.store.read_images(["key", column]), column)

    def _vectors_in(
        self, table: pa.Table, column: str
    ) -> tuple[Float32[np.ndarray, "rows dim"], Int64[np.ndarray, " rows"]]:
        """Return the vectors in a table of images, and the number of the image of each."""
        numbers = np.array([self.numbers.get(key, -1) for key in table["key"].to_pylist()], np.int64)
        present = (numbers >= 0) & table[column].is_valid().to_numpy()
        vectors = table[column].filter(pa.array(present)).combine_chunks()
        return to_matrix(vectors, self.store.dim), numbers[present]

    def place_of(self, number: int, predicate: Predicate) -> PlaceOfImage:
        """Return where to find an image: of its places that pass the filters, the first that is still there."""
        places = [place for place in self.places[number] if self._allows(predicate, number, place)]
        return next((place for place in places if os.path.exists(place.path)), places[0])

    def taken_at(self, number: int, place: PlaceOfImage) -> datetime:
        """Return when an image was taken: by its EXIF data, or else when its file was changed."""
        return self._dates[number] or local_time(place.mtime_ns / NANOSECONDS)

    def allowed(self, predicate: Predicate) -> Bool[np.ndarray, " images"] | None:
        """Return which images pass the filters at any of their places; None if nothing is filtered."""
        if predicate.allows_all:
            return None
        return np.array(
            [
                any(self._allows(predicate, number, place) for place in places)
                for number, places in enumerate(self.places)
            ],
            bool,
        )

    def _allows(self, predicate: Predicate, number: int, place: PlaceOfImage) -> bool:
        """Return whether an image at a place passes the filters."""
        return predicate.allows(
            place.path,
            self.taken_at(number, place),
            int(self._widths[number]),
            int(self._heights[number]),
            place.columns,
        )
