"""Limit the size of the images a model reads, in its own image processor, so that the limit is saved with the model.

Each way of limiting it is a strategy, which the family's entry in `cafe.lvlm.families` names: a list of grids of crops
("image_grids": LLaVA-NeXT, LLaVA-OneVision), an area ("area": Qwen), a longest edge in whole crops ("longest_edge":
Idefics, SmolVLM), a number of crops ("max_patches": InternVL, Aya, Ovis) or of tokens ("soft_tokens": Gemma 4). A
"fixed" size cannot be limited.
"""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

from cafe.errors import RecipeError
from cafe.lvlm.families import ImageSizing, family_of

SOFT_TOKENS = (70, 140, 280, 560, 1120)  # the numbers of tokens that Gemma 4 can make of an image


def set_max_image_size(
    lvlm: PreTrainedModel,
    processor: ProcessorMixin,
    max_pixels: int | None = None,
    grids: Sequence[Sequence[int]] = (),
) -> None:
    """Limit the size of the images that a model reads.

    Args:
        lvlm: the model, whose configuration is kept in agreement with the processor.
        processor: the model's processor, whose image processor is changed.
        max_pixels: largest area of an image as the model reads it, in pixels; larger images are shrunk to it. The
            thumbnail that some families add to the crops is not counted.
        grids: the (rows, columns) of crops that an image may be cut into.

    Raises:
        RecipeError: the model cannot read images that small, or does not cut images into grids.
    """
    config = lvlm.config
    image_processor = processor.image_processor
    sizing = family_of(config.model_type).image_sizing or detect_image_sizing(image_processor)
    if grids and sizing != "image_grids":
        raise RecipeError(
            f"A {config.model_type} model does not cut images into grids: set model.max_image_pixels instead."
        )
    if sizing == "image_grids":
        _limit_image_grids(config, image_processor, max_pixels, grids)
    elif max_pixels:
        _limit_pixels(sizing, config, image_processor, max_pixels)


def detect_image_sizing(image_processor: Any) -> ImageSizing:
    """Find what limits the size of an image for a family that the table does not have.

    Each way has settings of its own in the image processor; those of several crops are looked for before those of one.
    """
    if getattr(image_processor, "image_grid_pinpoints", None):
        return "image_grids"
    if hasattr(image_processor, "merge_size"):
        return "area"
    if hasattr(image_processor, "max_soft_tokens"):
        return "soft_tokens"
    if hasattr(image_processor, "max_image_size"):
        return "longest_edge"
    return "max_patches" if hasattr(image_processor, "max_patches") else "fixed"


def sync_image_grids(lvlm: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Copy the processor's grids into the model's configuration: an adapter brings a processor, but no model."""
    image_processor = getattr(processor, "image_processor", None)
    grids = getattr(image_processor, "image_grid_pinpoints", None)
    if grids and hasattr(lvlm.config, "image_grid_pinpoints"):
        lvlm.config.image_grid_pinpoints = grids


def _limit_image_grids(
    config: PreTrainedConfig, image_processor: Any, max_pixels: int | None, grids: Sequence[Sequence[int]]
) -> None:
    """Keep the grids that are wanted and small enough; transformers writes a grid as its (height, width) in pixels."""
    pinpoints = image_processor.image_grid_pinpoints
    if grids:
        _check_grids(grids)
        height, width = _crop_size(image_processor)
        pinpoints = [[rows * height, columns * width] for rows, columns in grids]
    if max_pixels:
        smallest = min(map(math.prod, pinpoints))
        _check_limit(config, max_pixels, smallest)
        pinpoints = [pinpoint for pinpoint in pinpoints if math.prod(pinpoint) <= max_pixels]
    # The model cuts off padding by the grids in its configuration, so it must have the same ones.
    image_processor.image_grid_pinpoints = config.image_grid_pinpoints = pinpoints


def _check_grids(grids: Sequence[Sequence[int]]) -> None:
    """Refuse what is no pair of rows and columns.

    Raises:
        RecipeError: there is such a grid.
    """
    for grid in grids:
        if len(grid) != 2 or min(grid) < 1:
            raise RecipeError(
                f"model.image_grids holds pairs of rows and columns, as [[1, 1], [2, 2]], not {list(grids)}."
            )


def _limit_pixels(sizing: ImageSizing, config: PreTrainedConfig, image_processor: Any, max_pixels: int) -> None:
    """Limit the area of an image by the setting of its image processor."""
    match sizing:
        case "area":
            _limit_area(config, image_processor, max_pixels)
        case "soft_tokens":
            _limit_soft_tokens(config, image_processor, max_pixels)
        case "longest_edge":
            _limit_longest_edge(config, image_processor, max_pixels)
        case "max_patches":
            _limit_patches(config, image_processor, max_pixels)
        case _:  # a fixed size: there is nothing to set, and the limit is met or not
            _check_limit(config, max_pixels, math.prod(_crop_size(image_processor)))


def _limit_area(config: PreTrainedConfig, image_processor: Any, max_pixels: int) -> None:
    """Limit the area of an image, which is resized to fit.

    Despite their names, `shortest_edge` and `longest_edge` are areas here, of the smallest and the largest image.
    """
    size = dict(image_processor.size)
    _check_limit(config, max_pixels, size["shortest_edge"])
    _set_longest_edge(image_processor, min(max_pixels, size["longest_edge"]))
    # Older processors keep the same area twice.
    if getattr(image_processor, "max_pixels", None):
        image_processor.max_pixels = image_processor.size["longest_edge"]


def _limit_soft_tokens(config: PreTrainedConfig, image_processor: Any, max_pixels: int) -> None:
    """Limit the number of tokens of an image, each of which stands for the same number of pixels."""
    # Patches are pooled to tokens, a square of them to each.
    side = image_processor.patch_size * image_processor.pooling_kernel_size
    pixels_per_token = side**2
    _check_limit(config, max_pixels, SOFT_TOKENS[0] * pixels_per_token)
    # A limit never raises what the checkpoint itself has set; nor do those of the functions below.
    fitting = [tokens for tokens in SOFT_TOKENS if tokens * pixels_per_token <= max_pixels]
    image_processor.max_soft_tokens = min(fitting[-1], image_processor.max_soft_tokens)


def _limit_longest_edge(config: PreTrainedConfig, image_processor: Any, max_pixels: int) -> None:
    """Limit the longest edge of an image to a whole number of crops, whose side is called `max_image_size`."""
    crop = dict(image_processor.max_image_size)["longest_edge"]
    _check_limit(config, max_pixels, crop**2)
    # An area is no setting here, so the limit is that of a square image.
    longest_edge = math.isqrt(max_pixels) // crop * crop
    _set_longest_edge(image_processor, min(longest_edge, dict(image_processor.size)["longest_edge"]))


def _limit_patches(config: PreTrainedConfig, image_processor: Any, max_pixels: int) -> None:
    """Limit the number of crops of an image, which these processors call patches."""
    pixels_per_crop = math.prod(_crop_size(image_processor))
    _check_limit(config, max_pixels, pixels_per_crop)
    # `min_patches` must not exceed `max_patches`.
    image_processor.max_patches = min(max_pixels // pixels_per_crop, image_processor.max_patches)
    image_processor.min_patches = min(image_processor.min_patches, image_processor.max_patches)


def _crop_size(image_processor: Any) -> tuple[int, int]:
    """Return the height and width of a crop, or of the whole image where there are no crops."""
    # A size is written as (height, width), or as the one side of a square.
    size = dict(image_processor.size or {})
    side = size.get("shortest_edge") or 0
    return size.get("height") or side, size.get("width") or side


def _set_longest_edge(image_processor: Any, longest_edge: int) -> None:
    """Replace one of the numbers in an image processor's size."""
    # `size` is a `SizeDict` or, before an image processor reads it, a plain dictionary.
    image_processor.size = type(image_processor.size)(**{**dict(image_processor.size), "longest_edge": longest_edge})


def _check_limit(config: PreTrainedConfig, max_pixels: int, smallest: int) -> None:
    """Refuse a limit below the smallest image.

    Raises:
        RecipeError: the limit is below it.
    """
    if max_pixels < smallest:
        raise RecipeError(
            f"model.max_image_pixels is {max_pixels:,}, but this {config.model_type} model reads no image at less than "
            f"{smallest:,} pixels."
        )
