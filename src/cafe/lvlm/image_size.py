"""How large pictures may be for a model: set in its own image processor, so that it is saved with it.

Families say it in their own ways: a list of grids of crops (LLaVA-NeXT, LLaVA-OneVision), an area (Qwen), a longest
edge in whole crops (Idefics, SmolVLM), a number of crops (InternVL, Aya, Ovis) or of tokens (Gemma 4). A family that
reads every picture at one size has nothing to limit.
"""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, ProcessorMixin

from cafe.errors import CafeError

SOFT_TOKENS = (70, 140, 280, 560, 1120)  # what Gemma 4 can make of a picture


def set_max_image_size(
    lvlm: PreTrainedModel,
    processor: ProcessorMixin,
    max_pixels: int | None = None,
    grids: Sequence[Sequence[int]] = (),
) -> None:
    """Limits the pictures that a model reads.

    Args:
        lvlm: the model, whose configuration must agree with the processor.
        processor: of the model; what it does with pictures from here on is changed.
        max_pixels: the largest area of a picture as the model reads it, in pixels; larger ones are shrunk to it. The
            thumbnail that some families add to the crops is not counted.
        grids: the (rows, columns) of crops that a picture may be cut into.

    Raises:
        CafeError: the model cannot read pictures that small, or in grids.
    """
    images = processor.image_processor
    size = dict(images.size or {})
    crop = (size.get("height") or size.get("shortest_edge") or 0, size.get("width") or size.get("shortest_edge") or 0)
    anyres = getattr(images, "image_grid_pinpoints", None)
    if grids:
        if not anyres:
            raise CafeError(
                f"A {lvlm.config.model_type} model does not cut pictures into grids: set model.max_image_pixels."
            )
        if any(len(grid) != 2 or min(grid) < 1 for grid in grids):
            raise CafeError(
                f"model.image_grids holds pairs of rows and columns, as [[1, 1], [2, 2]], not {list(grids)}."
            )
        anyres = [[rows * crop[0], columns * crop[1]] for rows, columns in grids]
    if max_pixels and anyres:
        least = min(map(math.prod, anyres))
        anyres = [point for point in anyres if math.prod(point) <= max_pixels]
        _refuse(not anyres, lvlm, max_pixels, least)
    if anyres:
        images.image_grid_pinpoints = lvlm.config.image_grid_pinpoints = anyres
    elif max_pixels and hasattr(images, "merge_size"):
        _refuse(max_pixels < size["shortest_edge"], lvlm, max_pixels, size["shortest_edge"])
        _set_size(images, longest_edge=min(max_pixels, size["longest_edge"]))
        if getattr(images, "max_pixels", None):
            images.max_pixels = images.size["longest_edge"]
    elif max_pixels and hasattr(images, "max_soft_tokens"):
        token = (images.patch_size * images.pooling_kernel_size) ** 2
        fitting = [tokens for tokens in SOFT_TOKENS if tokens * token <= max_pixels]
        _refuse(not fitting, lvlm, max_pixels, SOFT_TOKENS[0] * token)
        images.max_soft_tokens = min(fitting[-1], images.max_soft_tokens)
    elif max_pixels and hasattr(images, "max_image_size"):
        edge = dict(images.max_image_size)["longest_edge"]
        _refuse(max_pixels < edge**2, lvlm, max_pixels, edge**2)
        _set_size(images, longest_edge=min(math.isqrt(max_pixels) // edge * edge, size["longest_edge"]))
    elif max_pixels:
        _refuse(max_pixels < math.prod(crop), lvlm, max_pixels, math.prod(crop))
        if hasattr(images, "max_patches"):
            images.max_patches = min(max_pixels // math.prod(crop), images.max_patches)
            images.min_patches = min(images.min_patches, images.max_patches)


def sync_image_grids(lvlm: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Tells a model the grids that its processor cuts pictures into: an adapter brings its processor, not its model."""
    grids = getattr(getattr(processor, "image_processor", None), "image_grid_pinpoints", None)
    if grids and hasattr(lvlm.config, "image_grid_pinpoints"):
        lvlm.config.image_grid_pinpoints = grids


def _set_size(images: Any, **sizes: int) -> None:
    images.size = type(images.size)(**{**dict(images.size), **sizes})


def _refuse(small: bool, lvlm: PreTrainedModel, max_pixels: int, least: int) -> None:
    if small:
        raise CafeError(
            f"model.max_image_pixels is {max_pixels:,}, and this {lvlm.config.model_type} model reads no picture at less "
            f"than {least:,} pixels."
        )
