"""The fast path of images gives what the family's own processor gives."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from model_samples import make
from samples import noise

from cafe.content import ImageRef
from cafe.lvlm.images import FamilyImages, FastImages
from cafe.lvlm.processing import with_fast_images

NOT_BYTES = {"gemma4"}  # its processor has the colors last, and no mean
SIZES = [(90, 31), (48, 64), (90, 31), (300, 200), (48, 64)]


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_images_have_the_familys_pixels_and_tokens(family):
    chat_processor = make(family).chat_processor
    fast, normalization = with_fast_images(chat_processor)
    assert isinstance(fast.images, FamilyImages if family in NOT_BYTES else FastImages)
    assert isinstance(chat_processor.images, FamilyImages)
    if family in NOT_BYTES:
        return
    for seed, size in enumerate(SIZES):
        image = noise(seed, *size)
        expected, processed = chat_processor.process_images([image]), fast.images.process_array(np.array(image))
        values = processed.inputs.pop("pixel_values")
        known = size in SIZES[:seed]
        assert (values.dtype == torch.uint8) == known
        assert processed.token_runs == expected.token_runs
        if known:
            values = normalization.normalize(values)
        assert torch.allclose(values, expected.inputs.pop("pixel_values"), rtol=0, atol=1e-6)
        assert processed.inputs.keys() == expected.inputs.keys()
        assert all(torch.equal(processed.inputs[name], expected.inputs[name]) for name in processed.inputs)


def test_several_images_together_are_processed_by_the_family():
    chat_processor = make("smolvlm").chat_processor  # pads the smaller of two with zeros
    fast, _ = with_fast_images(chat_processor)
    refs = [ImageRef(noise(0, 90, 31)), ImageRef(noise(1, 48, 64))]
    for _ in range(2):
        assert torch.equal(
            fast.load_images(refs).inputs["pixel_values"], chat_processor.load_images(refs).inputs["pixel_values"]
        )


def test_a_family_whose_normalization_differs_keeps_its_own_processor(monkeypatch):
    chat_processor = make("llava").chat_processor
    image_processor = chat_processor.processor.image_processor
    monkeypatch.setattr(image_processor, "rescale", lambda image, scale, **_: image * scale * 0.9)
    fast, _ = with_fast_images(chat_processor)
    assert fast.images is chat_processor.images
