"""Make and fill one generation of a collection: its tables, and its manifest."""

import glob
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from PIL import Image

from cafe.data.records import open_source
from cafe.errors import CafeError
from cafe.index.calibration import NUM_SAMPLES, calibrate, needs_calibration
from cafe.index.faults import storage_errors
from cafe.index.golden import MIN_COSINE, golden_vectors, lowest_cosine, model_name
from cafe.index.indexing import IndexConfig, IndexReport, drop_source, index_folder, index_source
from cafe.index.manifest import Calibration, Manifest, Root, read_manifest, write_manifest
from cafe.index.pixels import load_image
from cafe.index.snapshot import MAX_EXACT, Snapshot
from cafe.index.store import Store
from cafe.index.vector_index import build_vector_index, needs_vector_index
from cafe.index.walk import IMAGE_SUFFIXES, PDF_SUFFIX
from cafe.model import Cafe
from cafe.training.recipe_io import read_source


def open_store(generation: Path) -> tuple[Store, Manifest]:
    """Open the tables of a generation, and read its manifest."""
    manifest = read_manifest(generation)
    return Store(generation, manifest.dim), manifest


def make_generation(generation: Path, model: Cafe, name: str) -> None:
    """Make an empty generation, unless one of the same model was begun there already.

    Args:
        generation: its directory.
        model: the model whose vectors it will hold.
        name: what the manifest calls it, so that it can be loaded again.
    """
    # What an interrupted `reindex` left is used, unless it was by another model.
    golden = golden_vectors(model)
    if generation.exists():
        if _is_begun(generation, golden):
            return
        shutil.rmtree(generation)
    with storage_errors(generation.parent):
        generation.mkdir()
    Store.create(generation, golden.shape[1])
    manifest = Manifest(
        model=name,
        fingerprint=model.fingerprint(),
        prompts=model.chat_processor.prompts,
        dim=golden.shape[1],
        golden=tuple(tuple(map(float, row)) for row in golden),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    write_manifest(generation, manifest)


def record_model(generation: Path, model: Cafe | str | Path) -> None:
    """Record where a generation's model is now, if it was moved; it was compared with the golden vectors before."""
    manifest, name = read_manifest(generation), model_name(model)
    if name and name != manifest.model:
        write_manifest(generation, replace(manifest, model=name))


def _is_begun(generation: Path, golden: np.ndarray) -> bool:
    """Return whether a generation can be continued: it was interrupted after it was made, with the same model."""
    try:
        _, manifest = open_store(generation)
    except CafeError:
        return False
    return lowest_cosine(golden, np.array(manifest.golden)) >= MIN_COSINE


def make_root(what: str | Path, overrides: Sequence[str]) -> Root:
    """Describe what is to be indexed.

    Args:
        what: a folder, an image or a PDF file, or a source of records.
        overrides: the fields of a source, as `key=value`.

    Raises:
        CafeError: fields of a source are given with a folder.
    """
    path = Path(os.path.expanduser(what))
    is_file = path.suffix.lower() in (*IMAGE_SUFFIXES, PDF_SUFFIX)
    if path.is_dir() or is_file:
        if overrides:
            raise CafeError(f"{what} is no source of records, so that {overrides[0]} has no meaning.")
        return Root(str(path.absolute()))
    # What does not exist locally may be on an object store, or a dataset; opening it will tell.
    name = str(path.absolute()) if path.exists() else str(what)
    return Root(name, is_source=True, overrides=tuple(overrides))


def index_root(generation: Path, model: Cafe, root: Root, config: IndexConfig) -> IndexReport:
    """Index one root into a generation, and bring its indices and its manifest up to date.

    Raises:
        CafeError: the root does not exist. With `config.allow_empty`, one that was indexed before is forgotten instead.
    """
    store, manifest = open_store(generation)
    others = tuple(other for other in manifest.roots if other.path != root.path)
    if _is_missing(root):
        if len(others) == len(manifest.roots) or not config.allow_empty:
            raise CafeError(
                f"{root.path} does not exist: if it is on a drive that is not mounted, mount it; to drop its images, "
                "index it with --allow-empty."
            )
        report = drop_source(store, root) if root.is_source else index_folder(store, model, root, config, others)
        write_manifest(generation, _finish(store, model, replace(manifest, roots=others)))
        return report
    source = open_source(read_source(root.path, root.overrides), config.limits) if root.is_source else None
    # Recorded first, so that indexing again includes it when this is interrupted.
    manifest = replace(manifest, roots=(*others, root))
    write_manifest(generation, manifest)
    if source is not None:
        report = index_source(store, model, root, config, source)
    else:
        report = index_folder(store, model, root, config, others)
    write_manifest(generation, _finish(store, model, manifest))
    return report


def _is_missing(root: Root) -> bool:
    """Return whether a root was a file or a folder of this machine that does not exist any more."""
    is_pattern = root.is_source and (glob.has_magic(root.path) or "{" in root.path)
    return os.path.isabs(root.path) and not is_pattern and not os.path.exists(root.path)


def _finish(store: Store, model: Cafe, manifest: Manifest) -> Manifest:
    """Build what is missing of indices and calibration, and return the manifest that says so."""
    # Indices first, which `compact` brings up to date.
    store.index_words()
    store.compact()
    snapshot = Snapshot.read(store)
    if needs_vector_index(manifest.vector_index, len(snapshot), MAX_EXACT):
        manifest = replace(manifest, vector_index=build_vector_index(store, len(snapshot)))
    if needs_calibration(manifest.calibration, len(snapshot)):
        manifest = replace(manifest, calibration=_calibrate(snapshot, model, manifest))
    return manifest


def _calibrate(snapshot: Snapshot, model: Cafe, manifest: Manifest) -> Calibration:
    """Calibrate a collection on some of its images: the first ones by their keys, which are as good as random."""
    numbers: list[int] = []
    images: list[Image.Image] = []
    for number, places in enumerate(snapshot.places):
        if len(images) == NUM_SAMPLES:
            break
        # Pages take long to render, and are not what is mostly searched for.
        if places[0].page is not None:
            continue
        try:
            images.append(load_image(places[0].id, places[0].path, None, manifest.roots))
        except CafeError:  # changed or gone since it was indexed
            continue
        numbers.append(number)
    return calibrate(model, images, snapshot.vectors_of(np.array(numbers, np.int64)), len(snapshot))
