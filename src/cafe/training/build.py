"""What a recipe says of data and step, made."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cafe.data.batch import NO_LIMIT, MicroBatch, MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import OpenedSource, open_source
from cafe.lvlm.families import find_vision_tower
from cafe.lvlm.loading import load_chat_processor
from cafe.lvlm.processing import ChatProcessor, with_fast_images
from cafe.lvlm.prompts import Prompts
from cafe.lvlm.vision_cache import VisionCache
from cafe.model import Cafe
from cafe.training.optimizer import configure_trainable_parameters
from cafe.training.recipe import ModelConfig, Recipe
from cafe.training.step import JointStep


def build_chat_processor(base: str, prompts: Prompts, recipe: ModelConfig) -> ChatProcessor:
    """What a base model, or an adapter's, reads texts and pictures by, as the recipe limits it; without the weights.

    Raises:
        CafeError: nothing of the sort can be loaded from there, or the limits are not for it.
    """
    return load_chat_processor(base, prompts, recipe.max_image_pixels, recipe.image_grids)


def build_dataset(
    recipe: Recipe,
    model: Cafe,
    rank: int,
    world: int,
    sharded: bool = False,
    sources: Sequence[OpenedSource] | None = None,
) -> ContrastiveBatchDataset:
    """The contrastive batches of a run, this process's part of each, in an order fixed by the seed.

    The recipe's sources are opened here unless they were before.
    """
    objective = recipe.objective
    chat_processor, normalization = with_fast_images(model.chat_processor)
    return ContrastiveBatchDataset(
        sources or [open_source(source) for source in recipe.data.sources],
        chat_processor,
        recipe.batch_size,
        recipe.seed,
        recipe.model.max_length,
        contrast=objective.contrastive_weight > 0,
        language=objective.lm_weight > 0,
        hard_negatives=objective.hard_negatives,
        packing=replace(
            model.packing,
            share_prefixes=model.packing.share_prefixes and recipe.model.share_prefixes,
            max_row_tokens=recipe.model.max_row_tokens or model.packing.max_row_tokens,
            normalization=normalization,
        ),
        micro_batch_size=recipe.micro_batch if isinstance(recipe.micro_batch, MicroBatchSize) else NO_LIMIT,
        rank=rank,
        world_size=world,
        mixture=recipe.data.mixture,
        add_blank_images=sharded,
    )


def build_step(recipe: Recipe, model: Cafe, blank: MicroBatch | None = None) -> JointStep:
    """The joint step over a model, with what is not trained frozen."""
    configure_trainable_parameters(model.lvlm, recipe.model)
    tower = find_vision_tower(model.lvlm)
    vision = None
    if tower is not None and not any(parameter.requires_grad for parameter in tower.parameters()):
        kept = recipe.model.vision_cache
        directory = Path(kept) / recipe.model.precision if kept else None  # what it makes is of that precision
        vision = VisionCache(tower, model.lvlm.config, directory)
    return JointStep(model.lvlm.train(), recipe.objective, recipe.model.precision, vision, blank)
