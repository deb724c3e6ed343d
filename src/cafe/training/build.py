"""The data and the joint step of a run, built from its recipe."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cafe.data.batch import NO_LIMIT, MicroBatch, MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import OpenedSource, open_source
from cafe.lvlm.families import find_vision_tower
from cafe.lvlm.forward import set_kernel
from cafe.lvlm.loading import load_chat_processor
from cafe.lvlm.processing import ChatProcessor, with_fast_images
from cafe.lvlm.prompts import Prompts
from cafe.lvlm.vision_cache import VisionCache
from cafe.model import Cafe
from cafe.training.compile import allow_repeated_backward
from cafe.training.optimizer import configure_trainable_parameters, trainable_parameters
from cafe.training.precision import AUTOCAST_DTYPES
from cafe.training.recipe import ModelConfig, Recipe
from cafe.training.step import JointStep


def build_chat_processor(base: str, prompts: Prompts, config: ModelConfig) -> ChatProcessor:
    """Load the processor of a base model, or of an adapter's, with the recipe's image limits; without the weights.

    Raises:
        CafeError: none can be loaded from there, or the limits are not for it.
    """
    return load_chat_processor(base, prompts, config.max_image_pixels, config.image_grids)


def build_dataset(
    recipe: Recipe,
    model: Cafe,
    rank: int,
    world: int,
    sharded: bool = False,
    sources: Sequence[OpenedSource] | None = None,
    device: torch.device | None = None,
) -> ContrastiveBatchDataset:
    """Build the contrastive batches of a run, this process's part of each, in an order fixed by the seed.

    Args:
        recipe: the run.
        model: the model, perhaps not yet on its device.
        rank: the index of this process.
        world: the number of processes.
        sharded: whether each process holds a shard of the model.
        sources: the recipe's sources, opened here unless they are given.
        device: where the model will compute; by default where it is.
    """
    objective = recipe.objective
    # Images are normalized on the GPU instead of in the workers, where the processor allows it.
    chat_processor, normalization = with_fast_images(model.chat_processor)
    # The model may be on another device for now, and it computes in another dtype than that of its weights.
    dtype = AUTOCAST_DTYPES.get(recipe.model.precision, model.lvlm.dtype)
    shares = model.packing.share_prefixes and recipe.model.share_prefixes
    packing = replace(model.packing, share_prefixes=shares, normalization=normalization)
    packing = set_kernel(packing, model.lvlm, device or model.lvlm.device, dtype)
    packing = replace(packing, max_row_tokens=recipe.model.max_row_tokens or packing.max_row_tokens)
    # A size that is measured is found later, and `BatchFeed` applies it.
    micro_batch_size = recipe.micro_batch if isinstance(recipe.micro_batch, MicroBatchSize) else NO_LIMIT
    return ContrastiveBatchDataset(
        sources or [open_source(source, recipe.data.image_limits) for source in recipe.data.sources],
        chat_processor,
        recipe.batch_size,
        recipe.seed,
        recipe.model.max_length,
        contrast=objective.contrastive_weight > 0,
        language=objective.lm_weight > 0,
        hard_negatives=objective.hard_negatives,
        packing=packing,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world,
        mixture=recipe.data.mixture,
        add_blank_images=sharded,
    )


def build_step(recipe: Recipe, model: Cafe, blank_micro_batch: MicroBatch | None = None) -> JointStep:
    """Build the joint step over a model, with what the recipe does not train frozen."""
    configure_trainable_parameters(model.lvlm, recipe.model)
    if recipe.model.attention == "flex_attention":
        allow_repeated_backward()
    vision = _make_vision_cache(recipe.model, model)
    return JointStep(model.lvlm.train(), recipe.objective, recipe.model.precision, vision, blank_micro_batch)


def _make_vision_cache(config: ModelConfig, model: Cafe) -> VisionCache | None:
    """Make a cache of the vision tower's outputs if the tower is frozen."""
    tower = find_vision_tower(model.lvlm)
    if tower is None or trainable_parameters(tower):
        return None
    directory = None  # outputs are kept for the length of a step
    if config.vision_cache:
        # Outputs depend on the precision: each has a directory of its own.
        directory = Path(config.vision_cache) / config.precision
    return VisionCache(tower, model.lvlm.config, directory)
