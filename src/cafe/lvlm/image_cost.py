"""Count what an image costs a published model, from its configuration alone: `cafe plan` downloads no processor."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import select_best_resolution
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from cafe.lvlm.families import family_of
from cafe.lvlm.image_size import set_max_image_size

MAX_DOWNSCALE = 1.1  # LLaVA-OneVision leaves features alone that are at most this much too large a side


@dataclass(frozen=True, kw_only=True)
class ImageCost:
    """Hold what an image costs: its crops, the patches of each crop, and its tokens in the language model."""

    crops: int
    patches: int
    tokens: int


def published_image_cost(
    lvlm: PreTrainedModel,
    width: int,
    height: int,
    max_pixels: int | None = None,
    grids: Sequence[Sequence[int]] = (),
) -> ImageCost:
    """Count what an image of some size costs a model whose image processor is as published.

    Raises:
        RecipeError: the limits do not fit the model, see `set_max_image_size`.
    """
    config = lvlm.config
    family = family_of(config.model_type)
    # In place of the published image processor, an object with those of its settings that the limits change.
    images: Any = SimpleNamespace()
    if family.image_area:
        smallest, largest = family.image_area
        images.size = {"shortest_edge": smallest, "longest_edge": largest}
    else:
        side = config.vision_config.image_size
        images.size = {"height": side, "width": side}
        images.image_grid_pinpoints = config.image_grid_pinpoints
    processor: Any = SimpleNamespace(image_processor=images)
    set_max_image_size(lvlm, processor, max_pixels, grids)
    if family.image_area:
        return _area_cost(config, images.size, width, height)
    return _grid_cost(config, images.image_grid_pinpoints, width, height)


def _area_cost(config: PreTrainedConfig, size: dict[str, int], width: int, height: int) -> ImageCost:
    """Count an image that is read whole, resized to an area."""
    vision = config.vision_config
    side = vision.patch_size * vision.spatial_merge_size  # of the pixels behind one token
    resized = smart_resize(height, width, side, size["shortest_edge"], size["longest_edge"])
    tokens = math.prod(resized) // side**2
    return ImageCost(crops=1, patches=tokens * vision.spatial_merge_size**2, tokens=tokens)


def _grid_cost(config: PreTrainedConfig, pinpoints: Sequence[Sequence[int]], width: int, height: int) -> ImageCost:
    """Count an image that is cut into a grid of crops beside its thumbnail."""
    vision = config.vision_config
    patches_per_side = vision.image_size // vision.patch_size
    best = select_best_resolution((height, width), pinpoints)
    rows, columns = (side // vision.image_size for side in best)
    grid_height, grid_width = rows * patches_per_side, columns * patches_per_side

    # The image keeps its shape within the grid; the features of the padding around it are cut off.
    if width / height > grid_width / grid_height:
        grid_height -= 2 * ((grid_height - int(height * grid_width / width)) // 2)
    else:
        grid_width -= 2 * ((grid_width - int(width * grid_height / height)) // 2)

    # Features beyond the family's maximum number of crops are interpolated down to it.
    max_crops = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    downscale = math.sqrt(grid_height * grid_width / (max_crops * patches_per_side**2))
    if downscale > MAX_DOWNSCALE:
        grid_height, grid_width = int(grid_height // downscale), int(grid_width // downscale)

    # The thumbnail comes first, and a newline token ends each row of features.
    tokens = patches_per_side**2 + grid_height * grid_width + grid_height
    return ImageCost(crops=1 + rows * columns, patches=patches_per_side**2, tokens=tokens)
