"""What a collection records about itself: the model that made its vectors, what was indexed, and how scores are read.

A collection is a directory. Its file `current` names the generation in use, a directory that holds a manifest and the
tables; building with another model makes a new generation beside the old one and then changes this one file.
"""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cafe.errors import CafeError, RecipeError
from cafe.index.faults import storage_errors
from cafe.lvlm.prompts import DESCRIBE_PROMPT, RENAMED_PROMPTS, Prompts
from cafe.utils.atomic import atomic_write_text
from cafe.utils.schema import Schema

FORMAT = 1  # of the manifest and the tables; a newer one is refused
CURRENT_FILE = "current"
MANIFEST_FILE = "collection.json"
TABLE_SUFFIX = ".lance"  # of the directory that LanceDB makes for a table
LOCK_FILE = "writer.lock"  # see `cafe.index.lock`


@dataclass(frozen=True)
class Root:
    """Record what was indexed, and how, so that the same can be indexed again.

    Attributes:
        path: the absolute path of a folder, an image or a PDF file; or the path of a source.
        is_source: whether it is a source of records.
        overrides: the fields of the source, as `key=value`.
        hidden: whether hidden files and folders are indexed.
        exclude: names of files and folders to leave out.
        describe: whether images are captioned.
        describe_prompt: what the model is asked for a caption.
    """

    path: str
    is_source: bool = False
    overrides: tuple[str, ...] = ()
    hidden: bool = False
    exclude: tuple[str, ...] = ()
    describe: bool = False
    describe_prompt: str = DESCRIBE_PROMPT


@dataclass(frozen=True)
class Logistic:
    """Map a cosine similarity to a score between 0 and 1: sigmoid(slope * similarity + offset)."""

    slope: float
    offset: float


@dataclass(frozen=True)
class Calibration:
    """Hold how similarities become scores, for queries with words and for queries by images alone.

    Attributes:
        num_images: the number of images in the collection when it was measured.
        words, images: the maps; None where the model cannot tell matches from others.
    """

    num_images: int
    words: Logistic | None = None
    images: Logistic | None = None


@dataclass(frozen=True)
class VectorIndex:
    """Describe the index of a collection that is too large to be searched exactly in memory.

    Attributes:
        num_images: the number of images when it was built.
        num_probes: the number of its partitions that a search reads.
        recall: the fraction of the exact 10 nearest images that it finds, measured when it was built.
    """

    num_images: int
    num_probes: int
    recall: float


@dataclass(frozen=True)
class Manifest:
    """Record what a generation of a collection was made with.

    Attributes:
        model: the directory or Hub id of the model.
        fingerprint: of its weights and settings, see `Cafe.fingerprint`.
        prompts: its prompts.
        dim: the number of dimensions of an embedding.
        golden: the embeddings of the contents in `cafe.index.golden`.
        created: the time, in ISO format.
        roots: what was indexed.
        calibration: how similarities become scores; None until it is measured.
        vector_index: the index of its vectors; None if they are searched exactly.
        format: the version of the format.
    """

    model: str
    fingerprint: str
    prompts: Prompts
    dim: int
    golden: tuple[tuple[float, ...], ...]
    created: str
    roots: tuple[Root, ...] = ()
    calibration: Calibration | None = None
    vector_index: VectorIndex | None = None
    format: int = field(default=FORMAT)


def current_generation(collection: Path) -> Path | None:
    """Return the directory of a collection's generation in use; None if there is no collection.

    Raises:
        CafeError: the collection is damaged or cannot be read.
    """
    file = collection / CURRENT_FILE
    with storage_errors(collection):
        if not file.is_file():
            return None
        name = file.read_text(encoding="utf-8", errors="replace").strip()
    # A number: any other name could lead out of the collection.
    if not name.isdecimal():
        raise CafeError(f"The collection {collection} is damaged: its file {CURRENT_FILE} names no generation.")
    return collection / name


def next_generation(collection: Path) -> Path:
    """Return the directory of the generation after the one in use, which may have been begun already."""
    current = current_generation(collection)
    return collection / str(int(current.name) + 1 if current else 1)


def switch_generation(collection: Path, generation: Path) -> None:
    """Put a generation into use, and delete the others."""
    with storage_errors(collection):
        atomic_write_text(collection / CURRENT_FILE, generation.name + "\n")
    for other in collection.iterdir():
        if other != generation and is_generation(other):
            shutil.rmtree(other, ignore_errors=True)


def delete_collection(collection: Path) -> None:
    """Delete a collection, but nothing else that its directory holds."""
    with storage_errors(collection):
        for entry in collection.iterdir():
            if is_generation(entry):
                shutil.rmtree(entry)
        # Last, so that what an interruption leaves is still a collection that can be removed.
        for name in (CURRENT_FILE, LOCK_FILE):
            (collection / name).unlink(missing_ok=True)
        if not any(collection.iterdir()):
            collection.rmdir()


def is_generation(directory: Path) -> bool:
    """Return whether a directory holds what a generation holds and nothing else, however far its making came."""
    if not directory.name.isdecimal() or not directory.is_dir():
        return False
    return all(entry.suffix == TABLE_SUFFIX or MANIFEST_FILE in entry.name for entry in directory.iterdir())


def size_on_disk(collection: Path) -> int:
    """Return the number of bytes in a collection's files, while another process may write and delete some."""
    size = 0
    # Not by `rglob`, which fails where a directory vanishes.
    for directory, _, names in os.walk(collection):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.stat(os.path.join(directory, name)).st_size
    return size


def ensure_usable(collection: Path) -> None:
    """Make sure that a directory is a collection, or can become one.

    Raises:
        CafeError: there is something else in it.
    """
    if collection.is_file():
        raise CafeError(f"{collection} is a file, not the directory of a collection.")
    if not collection.is_dir() or (collection / CURRENT_FILE).is_file():
        return
    # What an interrupted attempt may have left.
    others = [entry.name for entry in collection.iterdir() if entry.name != LOCK_FILE and not is_generation(entry)]
    if others:
        raise CafeError(f"{collection} holds something that is not a collection ({others[0]}); nothing was written.")


def write_manifest(generation: Path, manifest: Manifest) -> None:
    """Write a generation's manifest."""
    with storage_errors(generation.parent):
        atomic_write_text(generation / MANIFEST_FILE, json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(generation: Path) -> Manifest:
    """Read a generation's manifest.

    Raises:
        CafeError: it is missing or damaged, or of a newer format.
    """
    file = generation / MANIFEST_FILE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CafeError(f"The collection's {file} cannot be read: {error}.") from None
    # Before the rest, because a newer format may have other fields.
    version = tree.get("format") if isinstance(tree, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise CafeError(
            f"The collection {generation.parent} was made by a newer version of cafe (format {version}; this version "
            f"reads {FORMAT}): upgrade cafe."
        )
    schema = Schema(f"the collection's {file}", {Prompts: RENAMED_PROMPTS})
    try:
        manifest: Manifest = schema.build(Manifest, tree)
    except RecipeError as error:
        raise CafeError(f"The collection {generation.parent} is damaged: {error}") from None
    return manifest
