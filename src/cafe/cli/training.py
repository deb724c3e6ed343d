"""The commands train, plan, merge and push: from a recipe to a checkpoint on the Hub."""

from pathlib import Path

import click

from cafe.cli.options import PATH, POSITIVE, recipe_arguments
from cafe.errors import CafeError, CheckpointError, RecipeError


@click.command("train")
@recipe_arguments
def train_command(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Fine-tune a model with the joint objective.

    RECIPE is a YAML file that describes the run, as in recipes/; KEY=VALUE replaces one of its fields, for example
    batch_size=16. The same command resumes an interrupted run.
    """
    from cafe.evaluation.runner import training_evaluator
    from cafe.training.loop import train
    from cafe.training.recipe_io import read_recipe

    # Training does not import evaluation, which lies above it: it is given what evaluates.
    run = read_recipe(recipe, overrides)
    train(run, training_evaluator(run))


@click.command("plan")
@recipe_arguments
@click.option("--gpus", type=POSITIVE, default=1, help="Number of GPUs that share the run.")
@click.option("--image", metavar="WIDTHxHEIGHT", default="640x480", help="Size of a typical image, in pixels.")
@click.option("--caption", type=POSITIVE, default=200, help="Number of tokens in a typical caption.")
@click.option("--pairs", type=POSITIVE, help="Number of records in the data.")
def plan_command(
    recipe: Path, overrides: tuple[str, ...], gpus: int, image: str, caption: int, pairs: int | None
) -> None:
    """Estimate parameters, FLOPs, memory and hours.

    RECIPE is a YAML file that describes the run, as in recipes/; KEY=VALUE replaces one of its fields. Neither weights
    nor data are read.
    """
    from cafe.planning.plan import format_plan, plan
    from cafe.planning.workload import TypicalSample
    from cafe.training.recipe_io import read_recipe

    width, height = _parse_size(image)
    sample = TypicalSample(width=width, height=height, caption=caption)
    costs = plan(read_recipe(recipe, overrides), gpus, sample, pairs)
    print(format_plan(costs))


def _parse_size(text: str) -> tuple[int, int]:
    """Parse a width and a height that are separated by an x."""
    width, _, height = text.partition("x")
    for side in (width, height):
        # Without an x, the height is empty and so is no number.
        if not side.isdecimal() or int(side) == 0:
            raise RecipeError(f"--image should be like 640x480, not {text!r}.")
    return int(width), int(height)


@click.command("merge")
@click.argument("directory", metavar="RUN", type=PATH)
@click.argument("output", type=PATH)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    show_default="float32, or the base's if that is wider",
    help="Precision of the merged weights. In 16 bits, part of what the adapter learned is lost.",
)
def merge_command(directory: Path, output: Path, dtype: str | None) -> None:
    """Merge a run's adapter into its base model.

    RUN is the output directory of a run, or a checkpoint in it. OUTPUT is the directory for the merged checkpoint,
    which needs no PEFT to load. How much of the adapter's change of the weights is left after rounding is printed.
    """
    import torch

    from cafe.checkpoint import checkpoint_dir, ensure_overwritable
    from cafe.lvlm.adapters import has_adapter, merge
    from cafe.model import Cafe

    # What can be wrong is checked before the model is loaded, which takes long.
    if not directory.is_dir():
        raise CheckpointError(f"The run {directory} does not exist.")
    checkpoint = checkpoint_dir(directory)
    if output.resolve() == checkpoint.resolve():
        raise CafeError(f"The merged checkpoint would take the place of the adapter {checkpoint}: name another output.")
    ensure_overwritable(output)
    # On the CPU, where any model fits that can be saved.
    model = Cafe.load(checkpoint, dtype=getattr(torch, dtype) if dtype else "auto", device="cpu")
    if not has_adapter(model.lvlm):
        raise CheckpointError(f"{checkpoint} has no adapter to merge: it is a plain checkpoint already.")
    # The adapter was trained in float32, and the base may have fewer bits.
    kept = merge(model.lvlm, None if dtype else torch.promote_types(model.lvlm.dtype, torch.float32))
    model.save(output)
    print(f"Rounded to {str(model.lvlm.dtype).removeprefix('torch.')}, {kept:.1%} of the adapter's change is kept.")
    print(f"The merged checkpoint is in {output}")


@click.command("push")
@click.argument("directory", metavar="RUN", type=PATH)
@click.argument("repository", metavar="REPO_ID")
@click.option("--results", type=PATH, help="Directory of an evaluation, whose results the model card shows.")
@click.option("--public", is_flag=True, help="Create a new repository as public; otherwise it is private.")
def push_command(directory: Path, repository: str, results: Path | None, public: bool) -> None:
    """Upload a checkpoint to the Hugging Face Hub.

    RUN is the output directory of a run, or a checkpoint in it. REPO_ID is owner/name, and is created if it does not
    exist. A model card is written for it.
    """
    from cafe.checkpoint import checkpoint_dir, read_metadata
    from cafe.export import detect_library, model_card, push_to_hub

    checkpoint = checkpoint_dir(directory)
    metadata = read_metadata(checkpoint)
    # The card is written from the metadata, and a directory without any may be anything.
    if not metadata:
        raise CheckpointError(f"{checkpoint} is no checkpoint of cafe: it has no cafe.json.")
    # Without results, the card shows those of the evaluation during training, if there was one.
    shown = _read_results(results) if results else None
    card = model_card(metadata, shown, detect_library(checkpoint))
    print(push_to_hub(checkpoint, repository, card, private=not public))


def _read_results(directory: Path) -> dict[str, float]:
    """Read the results that an evaluation wrote into a directory."""
    from cafe.evaluation.stored import read_results

    file = directory / "results.json"
    if not file.is_file():
        raise CafeError(f"{directory} has no results.json: `cafe evaluate` writes one.")
    try:
        return read_results(file)
    except ValueError as error:
        raise CafeError(f"{file} is not as `cafe evaluate` writes it: {error}.") from None
