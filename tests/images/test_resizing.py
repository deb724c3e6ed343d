"""PyTorch's resize in Pillow's image processors, against Pillow's own."""

import numpy as np
import pytest
from families import FAMILIES
from PIL import Image

from cafe.images.resizing import MODES, resize, use_torch_resize


def picture(height: int, width: int) -> np.ndarray:
    """Soft shapes under noise, colours first."""
    across, down = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
    shapes = 127 + 100 * np.stack([np.sin(across * down / 3), np.cos(across), np.sin(down)], -1)
    noise = np.random.default_rng(0).normal(0, 25, shapes.shape)
    return np.moveaxis(np.clip(shapes + noise, 0, 255).astype(np.uint8), -1, 0)


@pytest.mark.parametrize("size", [(168, 168), (84, 31), (700, 501), (480, 640)], ids=str)
@pytest.mark.parametrize("resample", MODES)
def test_resized_pictures_are_pillows_but_for_a_level_of_255_here_and_there(size, resample):
    before = picture(480, 640)
    height, width = size
    pillow = np.asarray(Image.fromarray(np.moveaxis(before, 0, -1)).resize((width, height), resample))
    ours = np.moveaxis(resize(before, height, width, MODES[resample]), 0, -1)
    apart = np.abs(ours.astype(int) - pillow)
    assert ours.dtype == np.uint8
    assert (apart > 0).mean() < 0.02 and (apart > 1).mean() < 1e-5 and apart.max() <= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_values_are_those_of_its_own_processor_within_one_of_255(family):
    try:
        images = FAMILIES[family]().chat_processor.processor.image_processor
    except ImportError as error:
        pytest.skip(str(error))
    ours = type(images)
    plain = ours.__mro__[1]  # as transformers has it
    shown = [Image.fromarray(np.moveaxis(picture(123, 150), 0, -1))]
    values = images(shown, return_tensors="np")
    images.__class__ = plain
    expected = images(shown, return_tensors="np")
    one = 1.01 / 255 / min(images.image_std or [1.0])
    assert plain.__name__ == ours.__name__ and plain is not ours
    assert set(values) == set(expected)
    for name, array in expected.items():
        assert np.abs(np.asarray(values[name], dtype=float) - np.asarray(array, dtype=float)).max() <= one


def test_other_processors_stay_as_they_are():
    images = FAMILIES["llava"]().chat_processor.processor.image_processor
    ours = type(images)
    use_torch_resize(images)
    assert type(images) is ours
    other = object()
    use_torch_resize(other)
    assert type(other) is object
