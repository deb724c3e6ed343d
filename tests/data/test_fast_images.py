"""Pictures as training reads them, against the family's own processing."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from samples import noise

from cafe.content import ImageRef
from cafe.data.fast_images import with_fast_images

NOT_BYTES = {"gemma4"}  # its processor has the colours last, and no mean


@pytest.mark.parametrize("family", FAMILIES)
def test_the_short_way_makes_the_same_pictures_and_tokens(family):
    try:
        processing = FAMILIES[family]().processing
    except ImportError as error:
        pytest.skip(str(error))
    short, normalization = with_fast_images(processing)
    assert (short is processing) == (family in NOT_BYTES)
    if short is processing:
        return
    for seed, size in enumerate([(90, 31), (48, 64), (90, 31), (300, 200), (48, 64)]):
        image = noise(seed, *size)
        whole, made = processing.pictures([image]), short.picture(np.array(image))
        values = made.vision.pop("pixel_values")
        seen = size in [(90, 31), (48, 64)] and seed > 1
        assert (values.dtype == torch.uint8) == seen  # of a size seen before
        assert made.runs == whole.runs
        assert torch.allclose(
            normalization.to_values(values) if seen else values, whole.vision.pop("pixel_values"), rtol=0, atol=1e-6
        )
        assert made.vision.keys() == whole.vision.keys()
        assert all(torch.equal(made.vision[name], whole.vision[name]) for name in made.vision)


def test_several_pictures_together_go_the_familys_way():
    processing = FAMILIES["smolvlm"]().processing  # fills up the smaller of two with zeros
    short, _ = with_fast_images(processing)
    refs = [ImageRef(noise(0, 90, 31)), ImageRef(noise(1, 48, 64))]
    for _ in range(2):
        assert torch.equal(short.shown(refs).vision["pixel_values"], processing.shown(refs).vision["pixel_values"])


def test_a_family_whose_processor_does_not_say_the_same_keeps_its_own_way(monkeypatch):
    processing = FAMILIES["llava"]().processing
    images = processing.processor.image_processor
    monkeypatch.setattr(images, "rescale", lambda image, scale, **_: image * scale * 0.9)
    short, _ = with_fast_images(processing)
    assert short is processing
