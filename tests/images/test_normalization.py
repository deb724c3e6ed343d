"""Images as bytes: every family's values are reproduced, and what is not made of bytes stays as it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES
from samples import noise

from cafe.content import Content
from cafe.images.normalization import Normalization, pack_uint8
from cafe.lvlm.forward import forward_packed
from cafe.model import Cafe
from cafe.packing import collate_vision, pack
from cafe.training.build import build_dataset

HALF = Normalization(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OTHER = Normalization(1 / 255, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
NOT_BYTES = {"gemma4"}  # its processor has the colors last, and no mean


def make(family: str) -> tuple[Cafe, Normalization]:
    try:
        model = FAMILIES[family]()
    except ImportError as error:
        pytest.skip(str(error))
    normalization = Normalization.from_processor(model.chat_processor.processor.image_processor)
    assert normalization
    return model, normalization


@pytest.mark.parametrize("normalization", [HALF, OTHER])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 2, 3, 4, 5), (7, 3 * 8)])
def test_normalized_values_follow_the_formula_and_quantize_to_the_same_bytes(normalization, shape):
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    color = (np.arange(24) // 8 if len(shape) == 2 else np.arange(3)[:, None, None]).astype(int)
    mean, std = np.array(normalization.mean)[color], np.array(normalization.std)[color]
    expected = (raw.numpy().astype(float) / 255 - mean) / std
    values = normalization.normalize(raw)
    assert np.abs(values.numpy() - expected).max() < 1e-6
    assert torch.equal(normalization.quantize_exact(values), raw)


@pytest.mark.parametrize(
    "values",
    [torch.full((1, 3, 2, 2), 0.001), torch.full((1, 3, 2, 2), 1.5), torch.zeros(1, 2, 2, 4), torch.zeros(2, 5)],
    ids=["between bytes", "beyond bytes", "no colors", "no colors in patches"],
)
def test_values_not_made_of_bytes_are_not_quantized(values):
    assert HALF.quantize_exact(values) is None
    image = {"pixel_values": HALF.normalize(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))}
    given = [image, {"pixel_values": values}]
    assert pack_uint8(given, HALF) == (given, None)


def test_bytes_beside_values_of_no_bytes_become_values():
    raw = torch.randint(0, 256, (1, 3, 2, 2), dtype=torch.uint8)
    odd = {"pixel_values": torch.full((1, 3, 2, 2), 0.001)}
    made, pixels = pack_uint8([{"pixel_values": raw}, odd], HALF)
    assert pixels is None and made[1] is odd
    assert torch.equal(made[0]["pixel_values"], HALF.normalize(raw))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_images_sent_as_bytes_have_the_same_values(family):
    model, normalization = make(family)
    parts = [
        model.chat_processor.process_images([noise(n, *size)]).inputs for n, size in enumerate([(48, 32), (90, 31)])
    ]
    joined, (raw, pixels) = collate_vision(parts), pack_uint8(parts, normalization)
    assert (pixels is None) == (family in NOT_BYTES)
    if pixels:
        sent = collate_vision(raw)
        assert sent["pixel_values"].dtype == torch.uint8
        assert torch.allclose(pixels.normalize(sent["pixel_values"]), joined["pixel_values"], rtol=0, atol=1e-6)


def test_a_batch_of_bytes_has_the_hidden_states_of_one_of_values(random_base):
    model = Cafe.load(random_base, dtype=torch.float64)
    branches = [[model.encode_embedding(Content.of([noise(n, 64, 64), "what?"]))] for n in range(3)]
    branches.append([model.encode_embedding(Content.of("a red circle"))])
    of_bytes = replace(model.packing, normalization=HALF)
    sent, kept = (pack(branches, [[]] * 4, packing) for packing in (of_bytes, model.packing))
    assert sent.inputs["pixel_values"].dtype == torch.uint8 and sent.pixel_decoder and not kept.pixel_decoder
    with torch.no_grad():
        one, other = forward_packed(model.lvlm, sent)[0], forward_packed(model.lvlm, kept)[0]
    assert (one - other).norm() <= 1e-6 * other.norm()  # the values of both are float32


def test_training_batches_send_images_as_bytes(recipe):
    batch = build_dataset(recipe, Cafe.load(recipe.model.base), 0, 1)[0]
    assert {part.joint.inputs["pixel_values"].dtype for part in batch.micro_batches} == {torch.uint8}
