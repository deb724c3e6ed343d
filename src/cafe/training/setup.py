"""What a recipe says of data and step, made."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig

from cafe.adapters import adapter_of
from cafe.data.formats import Records, open_source
from cafe.data.loading import UNCUT, Batches, MicroBatch, MicroBatchSize
from cafe.data.raw import raw
from cafe.errors import not_loaded
from cafe.families import vision_tower_of
from cafe.image_limits import limit_images
from cafe.instructions import Prompts
from cafe.model import Cafe
from cafe.processing import Processing, load_processor
from cafe.training.geometry import empty_model
from cafe.training.optimizer import prepare
from cafe.training.recipe import ModelRecipe, Recipe
from cafe.training.step import JointStep
from cafe.training.vision import VisionCache


def processing_of(base: str, prompts: Prompts, recipe: ModelRecipe) -> Processing:
    """What a base model, or an adapter's, reads texts and pictures by, as the recipe limits it; without the weights.

    Raises:
        CafeError: nothing of the sort can be loaded from there, or the limits are not for it.
    """
    try:
        adapter = adapter_of(base)
        config = AutoConfig.from_pretrained((adapter and adapter.base_model_name_or_path) or base)
        processor = load_processor(base, config.model_type)
    except (ImportError, OSError, ValueError) as error:
        raise not_loaded("processor", base, error) from error
    limit_images(empty_model(config), processor, recipe.max_pixels, recipe.grids)
    return Processing(processor, prompts)


def make_batches(
    recipe: Recipe,
    model: Cafe,
    rank: int,
    world: int,
    sharded: bool = False,
    sources: Sequence[Records] | None = None,
) -> Batches:
    """The contrastive batches of a run, this process's part of each, in an order fixed by the seed.

    The recipe's sources are opened here unless they were before.
    """
    objective = recipe.objective
    processing, normalization = raw(model.processing)
    return Batches(
        sources or [open_source(source) for source in recipe.data.sources],
        processing,
        recipe.batch_size,
        recipe.seed,
        recipe.model.max_tokens,
        contrast=objective.contrastive_weight > 0,
        language=objective.lm_weight > 0,
        hard_negatives=objective.hard_negatives,
        packing=replace(
            model.packing,
            share=model.packing.share and recipe.model.share_prefixes,
            columns=recipe.model.row_tokens or model.packing.columns,
            normalization=normalization,
        ),
        size=recipe.micro_batch if isinstance(recipe.micro_batch, MicroBatchSize) else UNCUT,
        rank=rank,
        world=world,
        mixture=recipe.data.mixture,
        blanks=sharded,
    )


def make_joint(recipe: Recipe, model: Cafe, blank: MicroBatch | None = None) -> JointStep:
    """The joint step over a model, with what is not trained frozen."""
    prepare(model.lvlm, recipe.model)
    tower = vision_tower_of(model.lvlm)
    vision = None
    if tower is not None and not any(parameter.requires_grad for parameter in tower.parameters()):
        kept = recipe.model.vision_cache
        directory = Path(kept) / recipe.model.precision if kept else None  # what it makes is of that precision
        vision = VisionCache(tower, model.lvlm.config, directory)
    return JointStep(model.lvlm.train(), recipe.objective, recipe.model.precision, vision, blank)
