"""The model of a collection: what it is called, and golden contents, whose embeddings tell it from any other."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

from cafe.checkpoint import resolve_checkpoint
from cafe.content import Content
from cafe.errors import CafeError
from cafe.index.manifest import Manifest
from cafe.model import Cafe

MIN_COSINE = 0.999  # between embeddings of one model in different precisions, or on different machines
_SIDE = 64  # pixels

_TEXTS = ("a dog runs on the beach", "two red boats in front of a house", "a page with a table of numbers")


def golden_contents() -> list[Content]:
    """Return the contents: three texts, two images, and one with both."""
    # A slope of colors, drawn here because a file would have to be decoded.
    ramp = np.linspace(0, 255, _SIDE).astype(np.uint8)
    slope = np.stack([np.tile(ramp, (_SIDE, 1)), np.tile(ramp[:, None], (1, _SIDE)), np.full((_SIDE, _SIDE), 128)], 2)
    # Rings of two colors; the integer arithmetic gives the same bytes on every machine.
    distance = (np.arange(_SIDE) - _SIDE // 2) ** 2
    inside = (distance[:, None] + distance[None]) // 100 % 2 == 0
    rings = np.where(inside[..., None], np.array([200, 40, 40]), np.array([240, 240, 220]))
    images = [Image.fromarray(pixels.astype(np.uint8)) for pixels in (slope, rings)]
    return [Content.of(value) for value in (*_TEXTS, *images, [images[1], "what is in the middle?"])]


def golden_vectors(model: Cafe) -> Float32[np.ndarray, "contents dim"]:
    """Embed the golden contents."""
    return model.embed(golden_contents())


def lowest_cosine(first: Float[np.ndarray, "contents dim"], second: Float[np.ndarray, "contents dim"]) -> float:
    """Return the lowest cosine similarity of the same contents' embeddings by two models; -1 of different widths."""
    if first.shape != second.shape:
        return -1.0
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return float(((first * second).sum(1) / norms).min())


def check_model(model: Cafe, name: str, manifest: Manifest, collection: str) -> None:
    """Make sure that a model is the one that made a collection.

    Args:
        model: the model.
        name: what it is called, see `model_name`.
        manifest: of the collection.
        collection: the collection's name.

    Raises:
        CafeError: it gives other embeddings; the message has the command that helps.
    """
    if lowest_cosine(golden_vectors(model), np.array(manifest.golden)) >= MIN_COSINE:
        return
    command = f"`cafe collections reindex {collection} --model {name}`"
    if name == manifest.model:
        raise CafeError(
            f"The model {name} has changed since it made the collection {collection}, and gives other embeddings: "
            f"build the collection anew by {command}."
        )
    raise CafeError(
        f"The collection {collection} was made with {manifest.model}, and {name} gives other embeddings: leave out "
        f"--model, or build the collection anew by {command}."
    )


def load_model(model: Cafe | str | Path) -> Cafe:
    """Return a model, or load it by what it is called: a run, a directory or a Hub id."""
    return model if isinstance(model, Cafe) else Cafe.load(resolve_checkpoint(str(model)))


def load_recorded_model(given: Cafe | str | Path | None, manifest: Manifest | None, collection: str) -> Cafe:
    """Load the model that was given, or else the one that a collection records.

    Args:
        given: the model, or what it is called; None for the recorded one.
        manifest: of the collection; None if there is none yet.
        collection: the collection's name.

    Raises:
        CafeError: no model is given and none is recorded, or that one was moved.
    """
    if given is not None:
        return load_model(given)
    recorded = manifest.model if manifest else ""
    if not recorded:  # it was made in memory
        raise CafeError(f"The collection {collection} does not say where its model is: open it with the model.")
    if os.path.isabs(recorded) and not os.path.exists(recorded):
        raise CafeError(
            f"The model of the collection {collection}, {recorded}, does not exist any more: if it was moved, give its "
            "new path by --model."
        )
    return load_model(recorded)


def model_name(model: Cafe | str | Path) -> str:
    """Return what a model is called wherever it is loaded from next time: a directory by its absolute path."""
    name = model.name if isinstance(model, Cafe) else str(model)
    path = Path(name).expanduser()
    return str(path.absolute()) if name and path.is_dir() else name
