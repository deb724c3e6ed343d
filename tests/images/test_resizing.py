"""PyTorch's resize in Pillow's image processors, compared with Pillow's own."""

import numpy as np
import pytest
from families import FAMILIES
from model_samples import make
from PIL import Image

from cafe.images.resizing import MODES, resize, with_torch_resize


def shapes(height: int, width: int) -> np.ndarray:
    """An image of soft shapes under noise, colors first."""
    across, down = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
    waves = 127 + 100 * np.stack([np.sin(across * down / 3), np.cos(across), np.sin(down)], -1)
    noise = np.random.default_rng(0).normal(0, 25, waves.shape)
    return np.moveaxis(np.clip(waves + noise, 0, 255).astype(np.uint8), -1, 0)


@pytest.mark.parametrize("size", [(168, 168), (84, 31), (700, 501), (480, 640)], ids=str)
@pytest.mark.parametrize("resample", MODES)
def test_resized_images_are_pillows_within_rare_single_levels(size, resample):
    before = shapes(480, 640)
    height, width = size
    pillow = np.asarray(Image.fromarray(np.moveaxis(before, 0, -1)).resize((width, height), resample))
    ours = np.moveaxis(resize(before, height, width, MODES[resample]), 0, -1)
    apart = np.abs(ours.astype(int) - pillow)
    assert ours.dtype == np.uint8
    assert (apart > 0).mean() < 0.02 and (apart > 1).mean() < 1e-5 and apart.max() <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_pixel_values_are_its_own_within_one_level(family):
    ours = make(family).chat_processor.processor.image_processor
    transformers_class = type(ours).__mro__[1]
    plain = transformers_class.from_dict(ours.to_dict())
    assert type(plain) is transformers_class is not type(ours) and transformers_class.__name__ == type(ours).__name__
    images = [Image.fromarray(np.moveaxis(shapes(123, 150), 0, -1))]
    values, expected = ours(images, return_tensors="np"), plain(images, return_tensors="np")
    one_level = 1.01 / 255 / min(ours.image_std or [1.0])
    assert set(values) == set(expected)
    for name, array in expected.items():
        apart = np.abs(np.asarray(values[name], dtype=float) - np.asarray(array, dtype=float))
        assert apart.max() <= one_level


@pytest.mark.parametrize("family", FAMILIES)
def test_torch_resize_keeps_an_image_processors_settings_and_files(family):
    ours = make(family).chat_processor.processor.image_processor
    plain = type(ours).__mro__[1].from_dict(ours.to_dict())
    again = with_torch_resize(plain)
    assert again is not plain and vars(again) == vars(plain)
    assert again.to_json_string() == plain.to_json_string() and str(again) == str(plain)


def test_other_image_processors_are_returned_unchanged():
    ours = make("llava").chat_processor.processor.image_processor
    assert with_torch_resize(ours) is ours
    other = object()
    assert with_torch_resize(other) is other
