"""The limit of the image size, for each way that a family has, and in a saved checkpoint."""

import numpy as np
import pytest
from families import FAMILIES
from model_samples import make
from PIL import Image

from cafe.errors import CafeError
from cafe.lvlm import families
from cafe.lvlm.image_size import detect_image_sizing, set_max_image_size
from cafe.model import Cafe

IMAGE = Image.new("RGB", (200, 150), "red")


def shown(model: Cafe) -> int:
    """The tokens that stand for an image."""
    return len(model.chat_processor.process_images([IMAGE]).token_runs[0])


def read_pixels(model: Cafe) -> int:
    """The pixels of the crops, or of the patches of 4 x 4, that the vision tower gets."""
    vision = model.chat_processor.process_images([IMAGE]).inputs
    if "image_grid_thw" in vision:
        return int(vision["image_grid_thw"].prod()) * 16
    values = vision["pixel_values"]
    return values.shape[:-3].numel() * values.shape[-1] * values.shape[-2]


CROP = 32 * 32
AREA = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v")
CROPS = ("llava_next", "llava_onevision", "smolvlm", "idefics3", "internvl", "aya_vision", "ovis2")


@pytest.mark.parametrize("family", [*AREA, *CROPS])
def test_the_image_size_limit_holds_and_is_saved_with_the_model(family, tmp_path):
    model = FAMILIES[family]()
    before, tokens = read_pixels(model), shown(model)
    grids = [(1, 1), (2, 2)] if family.startswith("llava") else ()
    limit = 512 if family in AREA else CROP + 100
    set_max_image_size(model.lvlm, model.chat_processor.processor, limit, grids)
    assert read_pixels(model) < before and shown(model) < tokens
    assert read_pixels(model) <= (limit if family in AREA else 2 * CROP)  # a crop and the thumbnail
    vector = model.embed([IMAGE])
    model.save(tmp_path / "saved")
    again = Cafe.load(tmp_path / "saved")
    assert shown(again) == shown(model)
    np.testing.assert_allclose(again.embed([IMAGE]), vector, atol=1e-5)


def test_image_grids_are_rows_and_columns_of_crops():
    model = FAMILIES["llava_onevision"]()
    set_max_image_size(model.lvlm, model.chat_processor.processor, grids=[(1, 3), (2, 1)])
    assert model.lvlm.config.image_grid_pinpoints == [[32, 96], [64, 32]]
    wide = model.chat_processor.process_images([Image.new("RGB", (300, 100))]).inputs["pixel_values"]
    assert wide.shape[1] == 4  # three crops and the thumbnail


@pytest.mark.parametrize("family", ["llava", "gemma3", "gemma4", "paligemma", "qwen2_vl", "llava_next", "smolvlm"])
def test_an_image_size_limit_below_the_smallest_image_is_refused(family):
    model = FAMILIES[family]()
    with pytest.raises(CafeError, match=r"max_image_pixels is 100, but this .* reads no image at less than"):
        set_max_image_size(model.lvlm, model.chat_processor.processor, 100)


def test_a_model_without_grids_is_named():
    model = FAMILIES["llava"]()
    with pytest.raises(CafeError, match="does not cut images into grids"):
        set_max_image_size(model.lvlm, model.chat_processor.processor, grids=[(1, 1)])


@pytest.mark.parametrize("family", sorted(set(FAMILIES) & set(families.FAMILIES)))
def test_the_table_has_the_image_sizing_that_a_processor_shows(family):
    processor = make(family).chat_processor.processor
    assert detect_image_sizing(processor.image_processor) == families.FAMILIES[family].image_sizing
