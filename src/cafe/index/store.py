"""The two tables of a collection, in LanceDB: images by their content, and the places where they were found.

`images` has a row for each content: its vector, and what is known about it. `places` has a row for each file, page or
record: where it is, and which content it has, or why it has none. A move or a copy therefore touches places alone.

Images are written before the places that name them, so that a kill in between leaves at most an image without a place,
which no search shows and the next run finds again.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from cafe.errors import MissingPackageError
from cafe.index.faults import storage_errors

IMAGES, PLACES = "images", "places"
KEYS_PER_CONDITION = 500  # of SQL
COMMITS_BETWEEN_COMPACTIONS = 100
MIN_ROWS_FOR_KEY_INDEX = 10_000  # with fewer, a scan is as fast
# What is searched by words: the table and its column.
WORD_COLUMNS = ((IMAGES, "caption"), (IMAGES, "text"), (PLACES, "name"))
CJK_SAMPLE = 100  # texts among which Chinese, Japanese or Korean is looked for
ROWS_PER_BATCH = 4096  # of vectors that are compared at once
REFINE_FACTOR = 10  # so many times as many candidates of the vector index are compared exactly
_CJK = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
# What a reader may still be using is not cleaned up.
KEPT_VERSIONS = timedelta(hours=1)


@dataclass(frozen=True)
class ImageRow:
    """Hold what is known about one content.

    Attributes:
        key: the digest of the file's bytes; of a page, followed by "#" and its number.
        vector: its embedding.
        caption: what the model says about it; None if it was not asked.
        caption_vector: the embedding of the caption.
        text: the words on a page, or those that came with a record.
        width, height: in pixels, upright.
        taken_at: when it was taken, by its EXIF data, in the local time of the camera.
        appearance: what it looks like, see `cafe.images.appearance`.
    """

    key: str
    vector: Float32[np.ndarray, " dim"]
    caption: str | None
    caption_vector: Float32[np.ndarray, " dim"] | None
    text: str
    width: int
    height: int
    taken_at: datetime | None
    appearance: bytes


@dataclass(frozen=True)
class Place:
    """Hold where a content was found.

    Attributes:
        id: names the place: the path, for a page followed by "#page=" and its number, for a record without a file by
            "#record=" and its number.
        path: the absolute path of the file, or of the source.
        page: the number of the page, from 1; None for an image.
        name: the path within what was indexed, whose words are searched.
        root: what was indexed, see `Root`.
        size: of the file, in bytes; 0 for a record that holds its image.
        mtime_ns: when the file was changed, or the source that the record is in, in nanoseconds.
        key: of the image; None if it could not be read.
        error: why it could not be read.
        columns: what came along with a record, as a JSON object.
    """

    id: str
    path: str
    page: int | None
    name: str
    root: str
    size: int
    mtime_ns: int
    key: str | None = None
    error: str | None = None
    columns: str | None = None


def _images_schema(dim: int) -> pa.Schema:
    """Return the columns of the table of images."""
    vector = pa.list_(pa.float16(), dim)
    return pa.schema(
        {
            "key": pa.string(),
            "vector": vector,
            "caption": pa.string(),
            "caption_vector": vector,
            "text": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "taken_at": pa.timestamp("us"),
            "appearance": pa.binary(),
        }
    )


_PLACES_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "path": pa.string(),
        "page": pa.int32(),
        "name": pa.string(),
        "root": pa.string(),
        "size": pa.int64(),
        "mtime_ns": pa.int64(),
        "key": pa.string(),
        "error": pa.string(),
        "columns": pa.string(),
    }
)


class Store:
    """Read and write the tables of one generation of a collection.

    Args:
        directory: the generation.
        dim: the number of dimensions of a vector.

    Raises:
        CafeError: the tables are missing or damaged.
    """

    def __init__(self, directory: Path, dim: int) -> None:
        self.directory, self.dim = directory, dim
        self._commits = 0
        with storage_errors(directory.parent):
            database = _connect(directory)
            self.images, self.places = database.open_table(IMAGES), database.open_table(PLACES)

    @classmethod
    def create(cls, directory: Path, dim: int) -> "Store":
        """Create empty tables; those that are there already are kept."""
        with storage_errors(directory.parent):
            database = _connect(directory)
            database.create_table(IMAGES, schema=_images_schema(dim), exist_ok=True)
            database.create_table(PLACES, schema=_PLACES_SCHEMA, exist_ok=True)
        return cls(directory, dim)

    @property
    def version(self) -> tuple[int, int]:
        """Return numbers that change with every write, also by another process."""
        with storage_errors(self.directory.parent):
            # Places first: images are written before the places that name them, so that all of these are there.
            for table in (self.places, self.images):
                table.checkout_latest()
            return self.images.version, self.places.version

    def read_images(self, columns: Sequence[str], keys: Iterable[str] | None = None) -> pa.Table:
        """Read some columns of all images, or of those with some keys."""
        with storage_errors(self.directory.parent):
            if keys is None:
                return self.images.search().select(list(columns)).to_arrow()
            parts = [
                self.images.search().where(condition).select(list(columns)).limit(KEYS_PER_CONDITION).to_arrow()
                for condition in _conditions("key", keys)
            ]
        return pa.concat_tables(parts) if parts else _images_schema(self.dim).empty_table().select(list(columns))

    def read_places(self, columns: Sequence[str] = tuple(_PLACES_SCHEMA.names)) -> pa.Table:
        """Read some columns of all places."""
        with storage_errors(self.directory.parent):
            return self.places.search().select(list(columns)).to_arrow()

    def write(self, images: Sequence[ImageRow], places: Sequence[Place]) -> None:
        """Write images and places; those with the same key or id are replaced. No key and no id may come twice."""
        with storage_errors(self.directory.parent):
            if images:
                _upsert(self.images, "key", _images_table(images, self.dim))
            if places:
                rows = [{**asdict(place), "error": _replace_surrogates(place.error)} for place in places]
                _upsert(self.places, "id", pa.Table.from_pylist(rows, schema=_PLACES_SCHEMA))
            self._commits += 1
            if self._commits % COMMITS_BETWEEN_COMPACTIONS == 0:
                self.compact()

    def remove(self, ids: Iterable[str]) -> None:
        """Delete places."""
        with storage_errors(self.directory.parent):
            for condition in _conditions("id", ids):
                self.places.delete(condition)

    def remove_images_without_places(self) -> int:
        """Delete the images that no place names, and return how many there were."""
        # Compared here, because LanceDB has no joins.
        placed = set(self.read_places(["key"])["key"].to_pylist())
        orphans = [key for key in self.read_images(["key"])["key"].to_pylist() if key not in placed]
        with storage_errors(self.directory.parent):
            for condition in _conditions("key", orphans):
                self.images.delete(condition)
        return len(orphans)

    def search_words(self, words: str, count: int) -> list[dict[str, float]]:
        """Search images by words: in captions, in texts, and in the names of their files.

        Args:
            words: what is searched for; in quotes, it is a phrase.
            count: the most images to find in each of these.

        Returns:
            For each column of words in which something was found, the relevance of each image by its key, the most
            relevant first.
        """
        found = []
        with storage_errors(self.directory.parent):
            for table, column in WORD_COLUMNS:
                relevances: dict[str, float] = {}
                for key, relevance in _search_words(getattr(self, table), column, words, count):
                    if key is not None:
                        relevances.setdefault(key, relevance)
                found.append(relevances)
        return [relevances for relevances in found if relevances]

    def index_words(self) -> None:
        """Build the indices of words that are missing; `compact` brings the others up to date."""
        with storage_errors(self.directory.parent):
            for table, column in WORD_COLUMNS:
                _index_words(getattr(self, table), column)

    def nearest(
        self, vector: Float32[np.ndarray, " dim"], count: int, num_probes: int | None = None, exact: bool = False
    ) -> list[str]:
        """Return the keys of the images nearest to a vector, the nearest first.

        Args:
            vector: a unit vector.
            count: the number of images.
            num_probes: the number of partitions of the vector index to read.
            exact: compare all vectors, without the index.
        """
        with storage_errors(self.directory.parent):
            query = self.images.search(vector, vector_column_name="vector").distance_type("cosine")
            if exact:
                query = query.bypass_vector_index()
            elif num_probes is not None:
                query = query.nprobes(num_probes).refine_factor(REFINE_FACTOR)
            keys: list[str] = query.select(["key", "_distance"]).limit(count).to_arrow()["key"].to_pylist()
            return keys

    def nearest_of_all(self, queries: Float32[np.ndarray, "queries dim"], count: int) -> list[list[str]]:
        """Return the keys of the images nearest to each of several vectors, exactly, from one pass over the table."""
        best_scores = np.empty((len(queries), 0), np.float32)
        best_keys = np.empty((len(queries), 0), object)
        with storage_errors(self.directory.parent):
            for batch in self.images.search().select(["key", "vector"]).to_batches(ROWS_PER_BATCH):
                scores = queries @ to_matrix(batch["vector"], self.dim).T
                keys = np.array(batch["key"].to_pylist(), object)
                # The best of this batch compete with the best so far, so that memory does not grow.
                columns = np.argpartition(-scores, min(count, scores.shape[1]) - 1, axis=1)[:, :count]
                best_scores = np.concatenate([best_scores, np.take_along_axis(scores, columns, axis=1)], axis=1)
                best_keys = np.concatenate([best_keys, keys[columns]], axis=1)
                order = np.argsort(-best_scores, axis=1, kind="stable")[:, :count]
                best_scores = np.take_along_axis(best_scores, order, axis=1)
                best_keys = np.take_along_axis(best_keys, order, axis=1)
        return best_keys.tolist()

    def index_vectors(self, num_partitions: int) -> None:
        """Build the index of vectors, in place of an older one."""
        with storage_errors(self.directory.parent):
            from lancedb.index import IvfSq

            self.images.create_index("vector", config=IvfSq("cosine", num_partitions=num_partitions))

    def read_sample_vectors(self, count: int) -> Float32[np.ndarray, "images dim"]:
        """Return the embeddings of some images, evenly spaced."""
        with storage_errors(self.directory.parent):
            num_rows = self.images.count_rows()
            rows = np.unique(np.linspace(0, num_rows - 1, min(count, num_rows)).astype(int)).tolist()
            table = self.images.take_offsets(rows).select(["vector"]).to_arrow()
            return to_matrix(table["vector"].combine_chunks(), self.dim)

    def compact(self) -> None:
        """Merge small files, bring the indices up to date, and drop old versions."""
        with storage_errors(self.directory.parent):
            for table, key in ((self.images, "key"), (self.places, "id")):
                _index_key(table, key)
                table.optimize(cleanup_older_than=KEPT_VERSIONS)


def _connect(directory: Path) -> Any:
    """Open a LanceDB database.

    Raises:
        MissingPackageError: LanceDB is not installed.
    """
    os.environ.setdefault("LANCEDB_LOG", "error")  # before the import; its warnings are about its own future
    try:
        import lancedb  # an optional dependency
    except ImportError:
        raise MissingPackageError("Collections need the package lancedb: pip install 'cafe-lvlm[index]'.") from None
    return lancedb.connect(str(directory))


def _upsert(table: Any, key: str, rows: pa.Table) -> None:
    """Insert rows, in place of those with the same key."""
    merge = table.merge_insert(key).when_matched_update_all().when_not_matched_insert_all()
    merge.execute(rows, on_bad_vectors="null")  # LanceDB takes the vector of a caption that is missing for a bad one


def _index_key(table: Any, key: str) -> None:
    """Index a large table's key, which makes an upsert several times as fast."""
    if not _has_index(table, key) and table.count_rows() >= MIN_ROWS_FOR_KEY_INDEX:
        from lancedb.index import BTree

        table.create_index(key, config=BTree())


def _search_words(table: Any, column: str, words: str, count: int) -> list[tuple[str | None, float]]:
    """Return the keys and relevances of the rows in which words occur, the best first; none without an index."""
    if not _has_index(table, column):
        return []
    # What cannot be read as a query, as with a quote that is not closed, is searched as plain words.
    for text in (words, re.sub(r"\W+", " ", words)):
        try:
            rows = table.search(text, query_type="fts", fts_columns=column).select(["key", "_score"])
            found = rows.limit(count).to_arrow()
            return list(zip(found["key"].to_pylist(), found["_score"].to_pylist(), strict=True))
        except (RuntimeError, ValueError):
            continue
    return []


def _index_words(table: Any, column: str) -> None:
    """Index the words of a column; that of an existing index is updated by `compact`."""
    sample = table.search().where(f"{column} != ''").select([column]).limit(CJK_SAMPLE).to_arrow()[column].to_pylist()
    if not sample or _has_index(table, column):
        return
    from lancedb.index import FTS

    # The default tokenizer finds nothing in Chinese or Japanese; the other one finds no number in IMG_3551.
    is_cjk = column != "name" and any(_CJK.search(text) for text in sample)
    tokenizer = "icu" if is_cjk else "simple"
    stems = not is_cjk and column != "name"
    config = FTS(with_position=True, base_tokenizer=tokenizer, stem=stems, remove_stop_words=stems)
    table.create_index(column, config=config)


def _has_index(table: Any, column: str) -> bool:
    """Return whether a column has an index."""
    return any(index.columns == [column] for index in table.list_indices())


def _conditions(column: str, values: Iterable[str]) -> Iterator[str]:
    """Yield SQL conditions that together hold for all rows with one of the values."""
    quoted = ["'" + value.replace("'", "''") + "'" for value in values]
    for start in range(0, len(quoted), KEYS_PER_CONDITION):
        yield f"{column} IN ({', '.join(quoted[start : start + KEYS_PER_CONDITION])})"


def _images_table(images: Sequence[ImageRow], dim: int) -> pa.Table:
    """Make rows of the table of images."""
    schema = _images_schema(dim)
    columns: dict[str, pa.Array] = {}
    for column in schema:
        values = [getattr(image, column.name) for image in images]
        if column.type == pa.string():
            values = [_replace_surrogates(value) for value in values]
        is_vector = column.name in ("vector", "caption_vector")
        columns[column.name] = _vectors(values, dim) if is_vector else pa.array(values, column.type)
    return pa.table(columns, schema=schema)


def _replace_surrogates(text: str | None) -> str | None:
    """Replace half characters, which a record may hold and no table can."""
    return None if text is None else text.encode(errors="replace").decode()


def to_matrix(vectors: pa.Array, dim: int) -> Float32[np.ndarray, "rows dim"]:
    """Return a column of vectors, none of them null, as a matrix in single precision."""
    return vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, dim)


def _vectors(vectors: Sequence[Float32[np.ndarray, " dim"] | None], dim: int) -> pa.Array:
    """Make a column of vectors in half precision, null where there is none."""
    missing = [vector is None for vector in vectors]
    values = np.zeros((len(vectors), dim), np.float16)
    for row, vector in enumerate(vectors):
        if vector is not None:
            values[row] = vector
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), dim, mask=pa.array(missing))
