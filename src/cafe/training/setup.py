"""What a recipe says of data and step, made."""

from dataclasses import replace
from pathlib import Path

from cafe.data.formats import open_source
from cafe.data.loading import UNCUT, Batches, MicroBatch, MicroBatchSize
from cafe.data.raw import raw
from cafe.families import vision_tower_of
from cafe.model import Cafe
from cafe.training.optimizer import prepare
from cafe.training.recipe import Recipe
from cafe.training.step import JointStep
from cafe.training.vision import VisionCache


def make_batches(recipe: Recipe, model: Cafe, rank: int, world: int, sharded: bool = False) -> Batches:
    """The contrastive batches of a run, this process's part of each, in an order fixed by the seed."""
    objective = recipe.objective
    processing, normalization = raw(model.processing)
    return Batches(
        [open_source(source) for source in recipe.data.sources],
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
        directory = Path(recipe.model.vision_cache) if recipe.model.vision_cache else None
        vision = VisionCache(tower, model.lvlm.config, directory)
    return JointStep(model.lvlm.train(), recipe.objective, recipe.model.precision, vision, blank)
