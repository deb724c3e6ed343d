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
        chat_processor = FAMILIES[family]().chat_processor
    except ImportError as error:
        pytest.skip(str(error))
    short, normalization = with_fast_images(chat_processor)
    assert (short is chat_processor) == (family in NOT_BYTES)
    if short is chat_processor:
        return
    for seed, size in enumerate([(90, 31), (48, 64), (90, 31), (300, 200), (48, 64)]):
        image = noise(seed, *size)
        whole, made = chat_processor.process_images([image]), short.picture(np.array(image))
        values = made.vision.pop("pixel_values")
        seen = size in [(90, 31), (48, 64)] and seed > 1
        assert (values.dtype == torch.uint8) == seen  # of a size seen before
        assert made.runs == whole.token_runs
        assert torch.allclose(
            normalization.normalize(values) if seen else values, whole.inputs.pop("pixel_values"), rtol=0, atol=1e-6
        )
        assert made.vision.keys() == whole.inputs.keys()
        assert all(torch.equal(made.vision[name], whole.inputs[name]) for name in made.vision)


def test_several_pictures_together_go_the_familys_way():
    chat_processor = FAMILIES["smolvlm"]().chat_processor  # fills up the smaller of two with zeros
    short, _ = with_fast_images(chat_processor)
    refs = [ImageRef(noise(0, 90, 31)), ImageRef(noise(1, 48, 64))]
    for _ in range(2):
        assert torch.equal(
            short.load_images(refs).inputs["pixel_values"], chat_processor.load_images(refs).inputs["pixel_values"]
        )


def test_a_family_whose_processor_does_not_say_the_same_keeps_its_own_way(monkeypatch):
    chat_processor = FAMILIES["llava"]().chat_processor
    images = chat_processor.processor.image_processor
    monkeypatch.setattr(images, "rescale", lambda image, scale, **_: image * scale * 0.9)
    short, _ = with_fast_images(chat_processor)
    assert short is chat_processor
