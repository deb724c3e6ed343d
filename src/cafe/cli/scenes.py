"""The commands scenes write, scenes train-base and quickstart: the small synthetic world and the first run on it."""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cafe.cli.options import NON_NEGATIVE, PATH
from cafe.errors import MissingPackageError

if TYPE_CHECKING:
    from cafe.model import Cafe
    from cafe.training.recipe import Recipe

# Of the commands that the quickstart ends with: a test image, and another one that differs in its triangle alone.
EXAMPLE_IMAGE = "test-0-000023.png"
EXAMPLE_WORDS = "a small cyan ring at the top right and a large red triangle at the bottom right"
EXAMPLE_LESS, EXAMPLE_MORE = "a large red triangle at the bottom right", "a small red triangle at the bottom right"
EXAMPLE_QUESTION = "What is the object at the top right?"


@click.group("scenes")
def scenes_group() -> None:
    """Make the synthetic dataset and its base model."""


@scenes_group.command("write")
@click.argument("directory", type=PATH)
@click.option("--train", type=NON_NEGATIVE, default=8000, help="Number of training images.")
@click.option("--test", type=NON_NEGATIVE, default=500, help="Number of test images.")
@click.option("--seed", type=int, default=0, help="Random seed.")
def write_command(directory: Path, train: int, test: int, seed: int) -> None:
    """Generate images with annotations in public formats.

    DIRECTORY is where they are written.
    """
    from cafe.scenes.write import write_scenes

    write_scenes(directory, seed, train, test)


@scenes_group.command("train-base")
@click.argument("directory", type=PATH)
@click.option("--seed", type=int, default=0, help="Random seed.")
def train_base_command(directory: Path, seed: int) -> None:
    """Train the tiny base model from scratch.

    DIRECTORY is where the checkpoint is written.
    """
    from cafe.scenes.base import train_base

    train_base(directory, seed)


@click.command("quickstart")
@click.option("--directory", type=PATH, default=Path("runs/quickstart"), help="Directory for data, run and results.")
@click.option("--recipe", type=PATH, default=Path("recipes/scenes.yaml"), help="Recipe of the run.")
def quickstart_command(directory: Path, recipe: Path) -> None:
    """Train, evaluate and report on generated scenes, and index them."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything reads it: all that is needed is in the package
    from cafe.checkpoint import resolve_checkpoint
    from cafe.evaluation.report.page import write_report
    from cafe.evaluation.report.run import ReportRun
    from cafe.evaluation.runner import measure, training_evaluator
    from cafe.model import Cafe
    from cafe.scenes.write import write_scenes
    from cafe.training.loop import train

    data, before, after = directory / "scenes", directory / "before", directory / "after"
    run = _quickstart_recipe(recipe, directory, data)
    # What exists already is not made again, so an interrupted quickstart resumes.
    if not (data / "llava_train.json").is_file():
        write_scenes(data)
    # The base is measured too, so that the report compares with it.
    measure(Cafe.load(resolve_checkpoint(run.model.base)), data, before)
    trained = Cafe.load(train(run, training_evaluator(run)))
    measure(trained, data, after)
    runs = [ReportRun("base", before, None), ReportRun("joint", after, directory / "run" / "log.jsonl")]
    write_report(directory / "report.html", runs)
    print(f"Open {directory / 'report.html'}")
    _index_test_images(trained, data / "images" / "test", directory / "collection")


def _index_test_images(model: "Cafe", images: Path, directory: Path) -> None:
    """Index and caption the test images, and print commands to try; without LanceDB, print how to install it."""
    from cafe.index.collection import Collection
    from cafe.index.indexing import IndexConfig

    try:
        # Decoded in this process: starting others takes longer than reading images this small.
        Collection.open(directory, model).add(images, describe=True, config=IndexConfig(num_workers=0))
    except MissingPackageError as error:
        print(f"The test images can also be searched and asked about. {error}")
        return
    # As they can be pasted, whether or not the environment is activated.
    program = "cafe" if shutil.which("cafe") else f"{shlex.quote(sys.executable)} -m cafe"
    collection, image = (shlex.quote(os.path.join(".", path)) for path in (directory, images / EXAMPLE_IMAGE))
    print("Search the test images by words, by an image with changes, and ask about what is found:")
    print(f'  {program} search "{EXAMPLE_WORDS}" -k 3 --collection {collection}')
    print(f'  {program} search {image} - "{EXAMPLE_LESS}" + "{EXAMPLE_MORE}" -k 3 --collection {collection}')
    print(f'  {program} ask "{EXAMPLE_QUESTION}" --find "{EXAMPLE_WORDS}" -k 3 --each --collection {collection}')
    print("Or do it on a page, at the address that this prints:")
    print(f"  {program} serve --collection {collection}")


def _quickstart_recipe(path: Path, directory: Path, data: Path) -> "Recipe":
    """Read a recipe, with its output and its data placed in the quickstart's directories."""
    from dataclasses import replace

    from cafe.training.recipe_io import read_recipe

    recipe = read_recipe(path, [f"output={directory / 'run'}", f"evaluation.data={data}"])
    # Overrides replace whole lists, but of each source only the directory is another.
    sources = tuple(replace(source, path=str(data / Path(source.path).name)) for source in recipe.data.sources)
    return replace(recipe, data=replace(recipe.data, sources=sources))
