"""The commands data check and mine: what a source contains, and a new source with hard negatives."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cafe.cli.options import FRACTION, NON_NEGATIVE, PATH, POSITIVE, override_arguments, recipe_arguments
from cafe.errors import RecipeError, RecordError
from cafe.utils.text import escape_controls

if TYPE_CHECKING:
    from cafe.content import ImageLimits
    from cafe.data.source import Source
    from cafe.lvlm.prompts import Prompts
    from cafe.model import Cafe
    from cafe.training.recipe import ModelConfig, Recipe

DEFAULT_JUDGE_THRESHOLD = 0.5  # probability of a match from which --judge drops a candidate


@click.group("data")
def data_group() -> None:
    """Inspect training data."""


@dataclass(frozen=True)
class CheckedData:
    """Hold what `cafe data check` reads, and by which model's tokenizer and image processor.

    Attributes:
        sources: the sources to read.
        base: the directory or Hub id of the model.
        prompts: the prompts to render.
        model: the limits on images.
        max_tokens: the maximum length of a sequence; None for no limit.
        max_bad_fraction: the fraction of bad records above which the check fails.
        image_limits: the limits on images of sources that have none of their own.
    """

    sources: tuple["Source", ...]
    base: str
    prompts: "Prompts"
    model: "ModelConfig"
    max_tokens: int | None
    max_bad_fraction: float
    image_limits: "ImageLimits"


@data_group.command("check")
@click.argument("path", metavar="SOURCE|RECIPE")  # not PATH: a source may be a URL
@override_arguments
@click.option(
    "--base",
    show_default="the recipe's base model",
    help='Model whose tokens are counted: a run, a directory, a Hub id, or "scenes".',
)
@click.option("--sample", type=NON_NEGATIVE, default=1000, help="Number of records to read per source; 0 for all.")
@click.option("--examples", type=NON_NEGATIVE, default=6, help="Number of examples per source on the page.")
@click.option("--workers", type=NON_NEGATIVE, default=1, help="Number of processes that read records.")
@click.option("--output", type=PATH, default=Path("data-check.html"), help="The HTML file to write.")
def check_command(
    path: str,
    overrides: tuple[str, ...],
    base: str | None,
    sample: int,
    examples: int,
    workers: int,
    output: Path,
) -> None:
    """Report sizes, lengths, duplicates and bad records.

    SOURCE is a data file, which needs --base; RECIPE is a YAML file, all of whose sources are checked. KEY=VALUE
    replaces a field of either. A page shows examples as the model will read them.
    """
    from cafe.data.inspection import inspect
    from cafe.data.inspection_page import write_page
    from cafe.data.records import open_source
    from cafe.training.build import build_chat_processor

    # A recipe says by itself which model reads its sources, and how.
    is_recipe = path.endswith((".yaml", ".yml"))
    checked = _recipe_data(path, overrides, base) if is_recipe else _source_data(path, overrides, base)
    chat_processor = build_chat_processor(checked.base, checked.prompts, checked.model)
    reports = inspect(
        [open_source(source, checked.image_limits) for source in checked.sources],
        chat_processor,
        max_tokens=checked.max_tokens,
        sample=sample,
        examples=examples,
        workers=workers,
    )
    write_page(output, reports, chat_processor, checked.max_tokens)
    for report in reports:
        print(escape_controls(report.name))
        for name, value in report.table():
            print(f"  {name:20} {value}")
    print(f"The page is {output}; distributions are min / median / p95 / max.")

    # Last, so that the tables of all sources are printed whichever of them is bad.
    for report in reports:
        num_bad, num_read = len(report.errors), len(report.stats)
        if num_bad > checked.max_bad_fraction * num_read:
            fraction = num_bad / num_read
            name = escape_controls(report.name)
            raise RecordError(f"{fraction:.1%} of the records of {name} are bad. The first: {report.errors[0]}")


def _recipe_data(path: str, overrides: tuple[str, ...], base: str | None) -> CheckedData:
    """Collect what a recipe says about its data and its model."""
    from cafe.checkpoint import resolve_checkpoint
    from cafe.training.recipe_io import read_recipe

    recipe = read_recipe(path, overrides)
    # The limits of training hold for the check too, so that it reports what training would skip.
    return CheckedData(
        sources=recipe.data.sources,
        base=resolve_checkpoint(base or recipe.model.base),
        prompts=recipe.prompts,
        model=recipe.model,
        max_tokens=recipe.model.max_length,
        max_bad_fraction=recipe.data.max_bad_fraction,
        image_limits=recipe.data.image_limits,
    )


def _source_data(path: str, overrides: tuple[str, ...], base: str | None) -> CheckedData:
    """Collect what a source says about itself, and a checkpoint about its prompts."""
    from cafe.checkpoint import prompts_from_metadata, read_metadata, resolve_checkpoint
    from cafe.content import ImageLimits
    from cafe.training.recipe import DataConfig, ModelConfig
    from cafe.training.recipe_io import read_source

    if not base:
        raise RecipeError("A source alone does not say which model is to read it: give --base.")
    sources = (read_source(path, overrides),)
    checkpoint = resolve_checkpoint(base)
    # A source alone limits neither the length of sequences nor the size of images.
    return CheckedData(
        sources=sources,
        base=checkpoint,
        prompts=prompts_from_metadata(read_metadata(checkpoint)),
        model=ModelConfig(base=checkpoint),
        max_tokens=None,
        max_bad_fraction=DataConfig.max_bad_fraction,
        image_limits=ImageLimits(),
    )


@click.command("mine")
@recipe_arguments
@click.option(
    "--checkpoint",
    show_default="the recipe's base model",
    help='Checkpoint used to embed: a run, a directory, a Hub id, or "scenes".',
)
@click.option("--output", type=PATH, required=True, help="Folder for the new source.")
@click.option("--negatives", type=POSITIVE, default=4, help="Maximum number of negatives per record.")
@click.option("--top", type=POSITIVE, default=64, help="Number of nearest targets considered per query.")
@click.option(
    "--max-positive-ratio",
    type=FRACTION,
    default=0.95,
    help="Reject candidates whose similarity reaches this fraction of the positive's; 0 disables the limit.",
)
@click.option("--margin", type=float, help="Reject candidates whose similarity is not this far below the positive's.")
@click.option(
    "--judge",
    type=float,
    is_flag=False,
    flag_value=DEFAULT_JUDGE_THRESHOLD,
    metavar="[P]",
    help="Ask the model whether each candidate matches, and drop those it says yes to with at least probability P "
    f"({DEFAULT_JUDGE_THRESHOLD} if P is not given).",
)
@click.option("--soft", is_flag=True, help="Keep those candidates as soft targets, with that probability.")
@click.option("--question", help="The question that the judge is asked.")
@click.option("--batch-size", type=POSITIVE, default=16, help="Number of inputs per forward pass.")
def mine_command(
    recipe: Path,
    overrides: tuple[str, ...],
    checkpoint: str | None,
    output: Path,
    negatives: int,
    top: int,
    max_positive_ratio: float,
    margin: float | None,
    judge: float | None,
    soft: bool,
    question: str | None,
    batch_size: int,
) -> None:
    """Find hard negatives and write them as a new source.

    RECIPE is a YAML file whose data is mined, as in recipes/; KEY=VALUE replaces one of its fields.
    """
    from cafe.data.records import open_source
    from cafe.mining.config import QUESTION, MiningConfig
    from cafe.mining.hard_negatives import mine
    from cafe.training.recipe_io import read_recipe

    # Soft targets are the judge's probabilities, so they need a judge.
    if soft and judge is None:
        judge = DEFAULT_JUDGE_THRESHOLD
    # The recipe says what is mined; all that is particular to mining are options.
    run = read_recipe(recipe, overrides)
    model = _embedding_model(run, checkpoint)
    mining = MiningConfig(
        negatives=negatives,
        top=top,
        max_positive_ratio=max_positive_ratio or None,  # 0 disables the limit
        margin=margin,
        judge=judge,
        soft=soft,
        question=question or QUESTION,
        batch_size=batch_size,
        workers=run.data.num_workers,
    )
    sources = [open_source(source, run.data.image_limits) for source in run.data.sources]
    mine(model, sources, output, mining, run.seed, run.model.max_length)


def _embedding_model(recipe: "Recipe", checkpoint: str | None) -> "Cafe":
    """Load the model to mine with."""
    from cafe.checkpoint import resolve_checkpoint
    from cafe.lvlm.image_size import set_max_image_size
    from cafe.model import Cafe

    # A checkpoint has its own prompts and image sizes, those it was trained with; a base model takes the recipe's.
    if checkpoint:
        return Cafe.load(resolve_checkpoint(checkpoint))
    model = Cafe.load(resolve_checkpoint(recipe.model.base), recipe.prompts)
    processor = model.chat_processor.processor
    set_max_image_size(model.lvlm, processor, recipe.model.max_image_pixels, recipe.model.image_grids)
    return model
