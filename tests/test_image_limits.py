"""The limit of pictures' size, for every way in which a family says it, and back from a saved checkpoint."""

import numpy as np
import pytest
from families import FAMILIES
from PIL import Image

from cafe.errors import CafeError
from cafe.image_limits import limit_images
from cafe.model import Cafe

PICTURE = Image.new("RGB", (200, 150), "red")


def shown(model: Cafe) -> int:
    """The tokens that stand for a picture."""
    return len(model.processing.pictures([PICTURE]).runs[0])


def read_pixels(model: Cafe) -> int:
    """The pixels of the crops, or of the patches of 4 x 4, that the vision tower gets."""
    vision = model.processing.pictures([PICTURE]).vision
    if "image_grid_thw" in vision:
        return int(vision["image_grid_thw"].prod()) * 16
    values = vision["pixel_values"]
    return values.shape[:-3].numel() * values.shape[-1] * values.shape[-2]


CROP = 32 * 32
AREA = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
CROPS = ("llava_next", "llava_onevision", "smolvlm", "idefics3", "internvl", "aya_vision", "ovis2")


@pytest.mark.parametrize("family", [*AREA, *CROPS])
def test_the_limit_holds_and_is_saved_with_the_model(family, tmp_path):
    model = FAMILIES[family]()
    before, tokens = read_pixels(model), shown(model)
    grids = [(1, 1), (2, 2)] if family.startswith("llava") else ()
    limit = 512 if family in AREA else CROP + 100
    limit_images(model.lvlm, model.processing.processor, limit, grids)
    assert read_pixels(model) < before and shown(model) < tokens
    assert read_pixels(model) <= (limit if family in AREA else 2 * CROP)  # a crop and the thumbnail
    vector = model.embed([PICTURE])
    model.save(tmp_path / "saved")
    again = Cafe.load(tmp_path / "saved")
    assert shown(again) == shown(model)
    np.testing.assert_allclose(again.embed([PICTURE]), vector, atol=1e-5)


def test_grids_are_rows_and_columns_of_crops():
    model = FAMILIES["llava_onevision"]()
    limit_images(model.lvlm, model.processing.processor, grids=[(1, 3), (2, 1)])
    assert model.lvlm.config.image_grid_pinpoints == [[32, 96], [64, 32]]
    wide = model.processing.pictures([Image.new("RGB", (300, 100))]).vision["pixel_values"]
    assert wide.shape[1] == 4  # three crops and the thumbnail


@pytest.mark.parametrize("family", ["llava", "gemma3", "gemma4", "paligemma", "qwen2_vl", "llava_next", "smolvlm"])
def test_a_limit_below_what_a_model_can_read_is_one_sentence(family):
    model = FAMILIES[family]()
    with pytest.raises(CafeError, match=r"max_pixels is 100, and this .* reads no picture at less than"):
        limit_images(model.lvlm, model.processing.processor, 100)


def test_a_model_without_grids_is_named():
    model = FAMILIES["llava"]()
    with pytest.raises(CafeError, match="does not cut pictures into grids"):
        limit_images(model.lvlm, model.processing.processor, grids=[(1, 1)])
