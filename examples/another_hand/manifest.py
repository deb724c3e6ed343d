"""Say which drawings the data is made of, so that everyone's is the same although no image is committed."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from another_hand.concepts import DEVELOPMENT_HAND, TEST_HANDS, TRAINING_HANDS, Concept
from another_hand.drawings import resolve
from another_hand.packages import DRAWINGS, PackageError, read_json
from another_hand.world import plain_drawings

MANIFEST = Path(__file__).parent / "manifest.json"
NEAR = 0.08  # RMS difference of two drawings, of which one is then a copy of the other
HASH_DIGITS = 16

Manifest = dict[str, Any]


def read_manifest() -> Manifest:
    """Read the committed manifest."""
    manifest: Manifest = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return manifest


def make_manifest(packages: Path, archives: dict[str, str], concepts: Sequence[Concept]) -> Manifest:
    """Describe the data, except for near copies.

    Args:
        packages: where the archives are.
        archives: by package, the SHA-256 of its archive.
        concepts: all concepts.

    Returns:
        the archives' hashes; and of each concept whether training shows it, and for each hand the name of its drawing
        with the first digits of the SHA-256 of its SVG body.
    """
    sets = {hand: read_json(packages, package, "icons.json") for hand, package in DRAWINGS.items()}
    described = {}
    for concept in concepts:
        icons = {}
        for hand, icon in concept.icons.items():
            body = resolve(sets[hand], icon)["body"]
            icons[hand] = f"{icon} {hashlib.sha256(body.encode()).hexdigest()[:HASH_DIGITS]}"
        described[concept.name] = {"split": "seen" if concept.seen else "unseen", "icons": icons}
    return {"archives": archives, "concepts": described}


def write_manifest(manifest: Manifest) -> None:
    """Write the manifest that is committed, a concept a line."""
    parts = []
    for name, part in manifest.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in part.items()]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    MANIFEST.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def check(made: Manifest, committed: Manifest) -> None:
    """Compare what the packages hold with the committed manifest.

    Raises:
        PackageError: something differs.
    """
    for part, found in made.items():
        wanted = committed[part]
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise PackageError(
                    f"{name!r} is not as the manifest has it: {found.get(name)} instead of {wanted.get(name)}. "
                    "If that is meant, run `python -m another_hand.build --write-manifest`."
                )


def find_near_copies(packages: Path, concepts: Sequence[Concept]) -> dict[str, list[str]]:
    """List the seen concepts that a hand outside of training drew almost as a training hand did, by hand."""
    seen = [concept for concept in concepts if concept.seen]
    hands = (DEVELOPMENT_HAND, *TEST_HANDS)
    drawn = plain_drawings(packages, (*TRAINING_HANDS, *hands), seen)
    pixels = {key: on_white(variants[-1]) for key, variants in drawn.items()}
    copies: dict[str, list[str]] = {}
    for hand in hands:
        copies[hand] = []
        for concept in seen:
            others = [pixels[other, concept.name] for other in TRAINING_HANDS if other in concept.icons]
            own = pixels.get((hand, concept.name))
            if own is not None and min(distance(own, other) for other in others) < NEAR:
                copies[hand].append(concept.name)
    return copies


def on_white(drawing: np.ndarray) -> Float[np.ndarray, "side side 3"]:
    """Put an RGBA drawing on a white ground, with values from 0 to 1."""
    planes = drawing.astype(np.float64) / 255
    return planes[..., :3] * planes[..., 3:] + 1 - planes[..., 3:]


def distance(first: Float[np.ndarray, "side side 3"], second: Float[np.ndarray, "side side 3"]) -> float:
    """Compute the root mean square of the differences of two drawings' values."""
    return float(np.sqrt(np.mean((first - second) ** 2)))
