"""Build the data: fetch the packages, check them against the manifest, and write every folder that is not complete.

    python -m another_hand.build runs/another-hand

The same configuration writes the same files, byte for byte.
"""

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from another_hand.concepts import LIST, Concept, read_concepts
from another_hand.evaluation_data import Folder, plan_folders, write_evaluation
from another_hand.manifest import MANIFEST, check, find_near_copies, make_manifest, read_manifest, write_manifest
from another_hand.packages import PackageError, fetch
from another_hand.scenes import Scene, paint_all
from another_hand.training_records import (
    ask,
    describe,
    draw_training_scenes,
    draw_training_singles,
    frequencies,
    name,
)
from another_hand.world import VARIANTS, make_world, plain_drawings
from cafe.scenes.files import write_json, write_json_lines
from cafe.utils.atomic import atomic_write_text

MARKER = "complete.json"  # is written last
# What decides the files that are written, with the manifest and the list of concepts.
MODULES = (
    "annotations",
    "augment",
    "build",
    "concepts",
    "drawings",
    "evaluation_data",
    "retrieval",
    "scenes",
    "training_records",
    "words",
    "world",
)


@dataclass(frozen=True)
class BuildConfig:
    """Configure how much is written.

    Attributes:
        train_scenes: number of training scenes.
        train_singles: number of training images of one drawing.
        test_scenes: number of scenes in each evaluation folder.
        variants: number of augmented variants of each training drawing.
        seed: decides everything that is drawn at random.
        folders: the names of the evaluation folders to write; all if there are none.
    """

    train_scenes: int = 6000
    train_singles: int = 4000
    test_scenes: int = 150
    variants: int = VARIANTS
    seed: int = 0
    folders: tuple[str, ...] = ()


CUT = BuildConfig(
    train_scenes=96, train_singles=48, test_scenes=6, variants=2, folders=("noto-v1", "openmoji", "unseen")
)
"""For trying everything in three minutes."""


def build(directory: Path, config: BuildConfig) -> None:
    """Write the training data to `data/train`, and each evaluation folder to `data/NAME`.

    A folder that is complete is left as it is. One that was written only in part, with another configuration or by
    other code is written again.

    Raises:
        PackageError: the packages cannot be fetched, or are not as the manifest has them.
    """
    manifest = read_manifest()
    packages = directory / "packages"
    archives = fetch(packages, manifest["archives"])
    concepts = read_concepts(packages)
    check(make_manifest(packages, archives, concepts), manifest)
    made_of = json.dumps({"config": asdict(config), "sources": _digest_sources()}) + "\n"

    scenes = draw_training_scenes(concepts, config.train_scenes, config.variants + 1, config.seed)
    _write_once(directory / "data" / "train", made_of, partial(_write_train, packages, concepts, scenes, config))
    for folder in plan_folders(concepts, manifest["near_copies"]):
        if config.folders and folder.name not in config.folders:
            continue
        write = partial(_write_evaluation, packages, concepts, scenes, config, folder)
        _write_once(directory / "data" / folder.name, made_of, write)


def _write_once(path: Path, made_of: str, write: Callable[[Path], None]) -> None:
    """Write a folder unless it is complete; its marker says what it was made of."""
    marker = path / MARKER
    if marker.is_file() and marker.read_text() == made_of:
        return
    shutil.rmtree(path, ignore_errors=True)
    write(path)
    atomic_write_text(marker, made_of)


def _write_train(
    packages: Path, concepts: Sequence[Concept], scenes: Sequence[Scene], config: BuildConfig, path: Path
) -> None:
    """Write the training images, their descriptions, their questions, and the pairs of single drawings with texts."""
    singles = draw_training_singles(concepts, config.train_singles, config.variants + 1, config.seed)
    by_name = {concept.name: concept for concept in concepts}
    paint_all([*scenes, *singles], make_world(packages, concepts, config.variants).drawings, path)
    in_scenes, in_singles = frequencies(concepts, scenes), frequencies(concepts, singles)
    questions = [ask(scene, in_scenes, config.seed) for scene in scenes]
    questions += [ask(scene, in_singles, config.seed) for scene in singles]
    write_json(path / "llava_scenes.json", [describe(scene, in_scenes, config.seed) for scene in scenes])
    write_json(path / "llava_questions.json", questions)
    write_json_lines(path / "names.jsonl", (name(scene, by_name, config.seed) for scene in singles))


def _write_evaluation(
    packages: Path,
    concepts: Sequence[Concept],
    training: Sequence[Scene],
    config: BuildConfig,
    folder: Folder,
    path: Path,
) -> None:
    """Write an evaluation folder, with drawings as they are."""
    hands = dict.fromkeys(hand for drawn in folder.hands.values() for hand in drawn)
    drawings = plain_drawings(packages, hands, folder.concepts)
    write_evaluation(path, folder, concepts, drawings, training, config.test_scenes, config.seed)


def _digest_sources() -> str:
    """Hash the manifest, the list of concepts and the modules that write the data."""
    digest = hashlib.sha256(MANIFEST.read_bytes() + LIST.read_bytes())
    for module in MODULES:
        digest.update(MANIFEST.with_name(f"{module}.py").read_bytes())
    return digest.hexdigest()


def rewrite_manifest(packages: Path) -> None:
    """Write the manifest anew from the packages, which are fetched if they are not there.

    Raises:
        PackageError: the packages cannot be fetched.
    """
    archives = fetch(packages, {})
    concepts = read_concepts(packages)
    manifest = make_manifest(packages, archives, concepts)
    write_manifest({**manifest, "near_copies": find_near_copies(packages, concepts)})


def main() -> None:
    """Build the data, or rewrite the manifest; a mistake is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m another_hand.build", description=main.__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/another-hand"))
    parser.add_argument("--write-manifest", action="store_true", help="say in the manifest what the packages hold now")
    parser.add_argument("--cut", action="store_true", help="write a hundredth of it, to try everything")
    options = parser.parse_args()
    try:
        if options.write_manifest:
            rewrite_manifest(options.directory / "packages")
        else:
            build(options.directory, CUT if options.cut else BuildConfig())
    except PackageError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
