"""`Collection`: images that can be searched and asked, by the model that made their vectors."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from cafe.errors import CafeError
from cafe.index.asking import Answer, ask
from cafe.index.duplicates import MIN_SIMILARITY, find_duplicates
from cafe.index.faults import storage_errors
from cafe.index.filters import Filters
from cafe.index.generation import index_root, make_generation, make_root, open_store, record_model
from cafe.index.golden import (
    MIN_COSINE,
    check_model,
    golden_vectors,
    load_model,
    load_recorded_model,
    lowest_cosine,
    model_name,
)
from cafe.index.indexing import IndexConfig, IndexReport
from cafe.index.locations import DEFAULT_NAME, collection_argument, locate_collection, no_collection
from cafe.index.lock import writer_lock
from cafe.index.manifest import (
    CURRENT_FILE,
    Manifest,
    current_generation,
    delete_collection,
    ensure_usable,
    next_generation,
    read_manifest,
    switch_generation,
)
from cafe.index.pixels import load_image
from cafe.index.query import Query
from cafe.index.reranking import NUM_RERANKED, rerank_hits
from cafe.index.searching import Hit, Sort, search, sort_hits
from cafe.index.snapshot import Snapshot
from cafe.index.summary import summarize
from cafe.index.verification import verify_files, verify_tables
from cafe.model import Cafe

MAX_SOURCES = 4  # images that one question is asked about


class Collection:
    """Index images, and search and ask what was indexed.

    One process at a time may write to a collection; any number may read it meanwhile. Collections are opened by
    `Collection.open`.

    Attributes:
        directory: where it is.
    """

    def __init__(self, directory: Path, model: Cafe | str | Path | None = None) -> None:
        self.directory = directory
        self._given_model = model
        self._model: Cafe | None = None
        self._model_generation: Path | None = None  # the one that the model was compared with
        self._snapshot: Snapshot | None = None
        self._loading = Lock()

    @classmethod
    def open(cls, name: str | Path = DEFAULT_NAME, model: Cafe | str | Path | None = None) -> "Collection":
        """Open a collection, or prepare a new one, which is made when something is added.

        Args:
            name: a name, or the path of a directory, which is a `Path` or has a slash in it.
            model: a model, or what it is called: a run, a directory or a Hub id. By default the model that the
                collection records. A name is loaded when the model is first needed.

        Raises:
            CafeError: there is no such collection and no model to make one with, or it is damaged or of a newer format.
        """
        collection = cls(locate_collection(name), model)
        if collection.exists:
            read_manifest(collection._generation())
        elif model is None:
            raise no_collection(collection.directory)
        return collection

    @property
    def exists(self) -> bool:
        """Return whether the collection was made already."""
        return current_generation(self.directory) is not None

    @property
    def name(self) -> str:
        """Return the last part of the collection's path."""
        return self.directory.name

    @property
    def argument(self) -> str:
        """Return what commands call the collection: its name, or the path of a directory elsewhere."""
        return collection_argument(self.directory)

    @property
    def manifest(self) -> Manifest:
        """Return what the collection records about itself."""
        return read_manifest(self._generation())

    @property
    def model(self) -> Cafe:
        """Return the model, loaded when it is first needed.

        Raises:
            CafeError: it is not the one that made the collection.
        """
        # Transformers cannot load two models at once, as threads that search would have it do.
        with self._loading:
            generation = current_generation(self.directory)
            if self._model is None or self._model_generation != generation:
                # Another process may have put another model's vectors into use meanwhile.
                manifest = read_manifest(generation) if generation else None
                model = self._load_model(manifest)
                if manifest is not None:
                    check_model(model, model_name(self._given_model or manifest.model), manifest, self.argument)
                self._model, self._model_generation = model, generation
            return self._model

    def _load_model(self, manifest: Manifest | None) -> Cafe:
        """Load the model that was given, or else the one that a manifest names; it need not fit the collection."""
        if self._model is not None and self._given_model is not None:
            return self._model
        return load_recorded_model(self._given_model, manifest, self.name)

    def __len__(self) -> int:
        """Return the number of images, each content once."""
        store, _ = open_store(self._generation())
        return len(store.read_places(["key"])["key"].drop_null().unique())

    def add(
        self,
        what: str | Path,
        *,
        describe: bool | None = None,
        describe_prompt: str | None = None,
        hidden: bool | None = None,
        exclude: Sequence[str] | None = None,
        overrides: Sequence[str] = (),
        config: IndexConfig | None = None,
    ) -> IndexReport:
        """Index a folder, a file or a source of records: what is new, changed, moved or gone, by content.

        An option that is not given is as it was when the same was indexed before.

        Args:
            what: a folder; an image or a PDF file; or a source of records, as training takes it.
            describe: caption each image, from the same prefill that embeds it.
            describe_prompt: what the model is asked for a caption.
            hidden: index hidden files and folders too.
            exclude: names of files and folders to leave out.
            overrides: other fields of a source, as `key=value`.
            config: how images are read and embedded.

        Raises:
            CafeError: there is nothing at the path, or another process writes to the collection.
        """
        root = make_root(what, overrides)
        # What is not said now is as it was. A folder that has gone is still known by its absolute path.
        paths = (root.path, os.path.abspath(os.path.expanduser(what)))
        known = self.manifest.roots if self.exists else ()
        root = next((known_root for known_root in known if known_root.path in paths), root)
        changes = {
            "describe": describe,
            "describe_prompt": describe_prompt,
            "hidden": hidden,
            "exclude": None if exclude is None else tuple(exclude),
            "overrides": tuple(overrides) or None,
        }
        root = replace(root, **{name: value for name, value in changes.items() if value is not None})  # type: ignore[arg-type]
        with self._writing() as generation:
            return index_root(generation, self.model, root, config or IndexConfig())

    def refresh(self, config: IndexConfig | None = None) -> dict[str, IndexReport]:
        """Index again all that was indexed, and return the report of each path.

        Raises:
            CafeError: there is no collection yet; or one of the paths cannot be indexed, which is said after the
                others were.
        """
        reports: dict[str, IndexReport] = {}
        errors: list[CafeError] = []
        self._generation()  # of a collection that exists
        with self._writing() as generation:
            for root in self.manifest.roots:
                try:
                    reports[root.path] = index_root(generation, self.model, root, config or IndexConfig())
                except CafeError as error:
                    errors.append(error)
        if errors:
            raise errors[0]
        return reports

    def search(
        self,
        query: Any,
        k: int = 20,
        *,
        after: str | date | None = None,
        before: str | date | None = None,
        folder: str | None = None,
        min_width: int = 0,
        min_height: int = 0,
        where: Sequence[str] = (),
        min_score: float | None = None,
        sort: Sort = "score",
        rerank: bool = False,
    ) -> list[Hit]:
        """Find the images that match a query best.

        Args:
            query: words (`str`), an image (`Path` or Pillow), a mapping of "image" and "text" that are read together,
                or a `Query`, a weighted sum.
            k: the most images to return.
            after, before, folder, min_width, min_height, where: see `Filters`.
            min_score: the least score of an image; None for any.
            sort: the order of the images found.
            rerank: put those of the best images first that the model would most likely describe in the query's words.

        Raises:
            CafeError: the query or a filter cannot be read, or the model is not the one that made the collection.
        """
        # All that can be wrong with a query is said before the model is loaded.
        parsed = Query.of(query)
        predicate = Filters(
            after=after,
            before=before,
            folder=folder,
            min_width=min_width,
            min_height=min_height,
            where=tuple(where),
        ).compile()
        snapshot, model = self._read_with_model()
        manifest = read_manifest(snapshot.store.directory)
        vector = parsed.embed(model)
        # Reranking a few would leave out the best of those behind them.
        count = max(k, NUM_RERANKED) if rerank else k
        hits = search(
            snapshot, parsed, vector, count, predicate, min_score, manifest.calibration, manifest.vector_index
        )
        if rerank:
            hits = rerank_hits(model, parsed.words, hits, manifest.roots)
        return sort_hits(hits[:k], sort)

    def ask(
        self,
        question: str,
        *,
        find: Any = None,
        k: int = MAX_SOURCES,
        each: bool = False,
        min_score: float | None = None,
        max_new_tokens: int = 256,
        stream: bool = False,
        **filters: Any,
    ) -> Answer:
        """Answer a question from the pixels of the images that are found for it.

        Args:
            question: the question.
            find: what to search for, as `search` takes it; by default the question.
            k: the most images to ask about.
            each: ask about each image by itself, and answer in a line for each, instead of once about all.
            min_score: the least score of an image; None for any.
            max_new_tokens: the maximum length of an answer, in tokens.
            stream: return before the answer is there, which is iterated over as it comes.
            **filters: as `search` takes them.
        """
        hits = self.search(question if find is None else find, k, min_score=min_score, **filters)
        return ask(self.model, question, hits, self.manifest.roots, each, max_new_tokens, stream)

    def duplicates(self, min_similarity: float = MIN_SIMILARITY) -> list[list[Hit]]:
        """Find groups of images that look the same: copies, and what was resized, compressed or retouched.

        Args:
            min_similarity: the least cosine similarity of two images in a group.
        """
        return find_duplicates(self.read_snapshot(), min_similarity)

    def load_image(self, hit: Hit) -> Image.Image:
        """Load the image of a hit, upright and in RGB.

        Raises:
            CafeError: it is gone or cannot be read.
        """
        return load_image(hit.id, hit.path, hit.page, self.manifest.roots)

    def read_snapshot(self) -> Snapshot:
        """Return what searching needs, read again if another process has written since."""
        generation = self._generation()
        snapshot = self._snapshot
        try:
            if snapshot is None or snapshot.store.directory != generation or snapshot.version != snapshot.store.version:
                store, _ = open_store(generation)
                self._snapshot = snapshot = Snapshot.read(store)
        except CafeError:
            if self._generation() == generation:
                raise
            # Another process has just put another generation into use, and deleted this one.
            return self.read_snapshot()
        return snapshot

    def failures(self) -> dict[str, str]:
        """Return the places whose content cannot be read, each with the reason."""
        store, _ = open_store(self._generation())
        rows = store.read_places(["id", "error"]).to_pylist()
        return {row["id"]: row["error"] for row in rows if row["error"]}

    def info(self) -> dict[str, Any]:
        """Return what there is to know about the collection."""
        return summarize(self.directory, self.manifest, self.read_snapshot(), len(self.failures()))

    def verify(self, progress: bool = False) -> list[str]:
        """Check rows, hashes of files and golden vectors, and return a message for each problem."""
        store, manifest = open_store(self._generation())
        problems = verify_tables(store)
        problems += verify_files(store, progress)
        cosine = lowest_cosine(golden_vectors(self._load_model(manifest)), np.array(manifest.golden))
        if not cosine >= MIN_COSINE:  # also of NaN
            problems.append(f"The model {manifest.model} gives other embeddings now (cosine {cosine:.3f}).")
        return problems

    def reindex(self, model: Cafe | str | Path, config: IndexConfig | None = None) -> dict[str, IndexReport]:
        """Build the collection anew with another model, beside the one in use, and then put it in its place.

        Searches continue meanwhile. The same call resumes an interrupted one.

        Args:
            model: the other model, or what it is called.
            config: how images are read and embedded.

        Raises:
            CafeError: something that was indexed does not exist any more, or another process writes to the collection.
        """
        self._generation()  # of a collection that exists
        # Loaded before the lock is taken, because it takes time and may fail.
        other = load_model(model)
        with writer_lock(self.directory):
            roots, generation = self.manifest.roots, next_generation(self.directory)
            make_generation(generation, other, model_name(model))
            reports = {root.path: index_root(generation, other, root, config or IndexConfig()) for root in roots}
            switch_generation(self.directory, generation)
        self._given_model, self._snapshot = model, None
        self._model, self._model_generation = other, generation
        return reports

    def remove(self) -> None:
        """Delete the collection; the images that were indexed, and other files in its directory, are not touched.

        Raises:
            CafeError: there is none, or another process writes to it.
        """
        if not (self.directory / CURRENT_FILE).is_file():
            raise no_collection(self.directory)
        with writer_lock(self.directory):
            delete_collection(self.directory)
        self._snapshot = None

    @contextmanager
    def _writing(self) -> Iterator[Path]:
        """Hold the lock, and make the collection if there is none; give the generation in use."""
        model = self.model  # first, because loading it takes time and may fail
        ensure_usable(self.directory)
        with storage_errors(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        with writer_lock(self.directory):
            if not self.exists:
                generation = next_generation(self.directory)
                make_generation(generation, model, model_name(self._given_model or model))
                switch_generation(self.directory, generation)
                self._model_generation = generation
            if self._given_model:
                record_model(self._generation(), self._given_model)
            yield self._generation()

    def _generation(self) -> Path:
        """Return the directory of the generation in use."""
        generation = current_generation(self.directory)
        if generation is None:
            raise no_collection(self.directory)
        return generation

    def _read_with_model(self) -> tuple[Snapshot, Cafe]:
        """Return what searching needs, and the model that made it."""
        while True:
            snapshot, model = self.read_snapshot(), self.model
            # While the model is loaded, another process may put another generation into use, and delete this one.
            if snapshot.store.directory == self._model_generation == self._generation():
                return snapshot, model
