"""Pictures as bytes: every family's values come back, and what is not made of bytes stays as it is."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES
from samples import noise

from cafe.content import Content
from cafe.model import Cafe
from cafe.packing import collate_vision, pack
from cafe.pixels import Normalization, as_bytes
from cafe.reading import read
from cafe.training.setup import make_batches

HALF = Normalization(1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
OTHER = Normalization(1 / 255, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
NOT_BYTES = {"gemma4"}  # its processor has the colours last, and no mean


def make(family: str) -> tuple[Cafe, Normalization]:
    try:
        model = FAMILIES[family]()
    except ImportError as error:
        pytest.skip(str(error))
    normalization = Normalization.of(model.processing.processor.image_processor)
    assert normalization
    return model, normalization


@pytest.mark.parametrize("normalization", [HALF, OTHER])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 2, 3, 4, 5), (7, 3 * 8)])
def test_values_are_those_of_the_formula_and_bytes_come_back(normalization, shape):
    raw = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    color = (np.arange(24) // 8 if len(shape) == 2 else np.arange(3)[:, None, None]).astype(int)
    mean, std = np.array(normalization.mean)[color], np.array(normalization.std)[color]
    expected = (raw.numpy().astype(float) / 255 - mean) / std
    values = normalization.to_values(raw)
    assert np.abs(values.numpy() - expected).max() < 1e-6
    assert torch.equal(normalization.to_bytes(values), raw)


@pytest.mark.parametrize(
    "values",
    [torch.full((1, 3, 2, 2), 0.001), torch.full((1, 3, 2, 2), 1.5), torch.zeros(1, 2, 2, 4), torch.zeros(2, 5)],
    ids=["between bytes", "beyond bytes", "no colours", "no colours in patches"],
)
def test_what_is_not_made_of_bytes_is_told(values):
    assert HALF.to_bytes(values) is None
    picture = {"pixel_values": HALF.to_values(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))}
    given = [picture, {"pixel_values": values}]
    assert as_bytes(given, HALF) == (given, None)


def test_bytes_beside_values_that_no_byte_becomes_are_made_values():
    raw = torch.randint(0, 256, (1, 3, 2, 2), dtype=torch.uint8)
    odd = {"pixel_values": torch.full((1, 3, 2, 2), 0.001)}
    made, pixels = as_bytes([{"pixel_values": raw}, odd], HALF)
    assert pixels is None and made[1] is odd
    assert torch.equal(made[0]["pixel_values"], HALF.to_values(raw))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_pictures_come_back_joined_as_they_were(family):
    model, normalization = make(family)
    parts = [model.processing.pictures([noise(n, *size)]).vision for n, size in enumerate([(48, 32), (90, 31)])]
    joined, (raw, pixels) = collate_vision(parts), as_bytes(parts, normalization)
    assert (pixels is None) == (family in NOT_BYTES)
    if pixels:
        sent = collate_vision(raw)
        assert sent["pixel_values"].dtype == torch.uint8
        assert torch.allclose(pixels.to_values(sent["pixel_values"]), joined["pixel_values"], rtol=0, atol=1e-6)


def test_a_pack_of_bytes_is_read_as_one_of_values(random_base):
    model = Cafe.load(random_base, dtype=torch.float64)
    branches = [[model.encode_embedding(Content.of([noise(n, 64, 64), "what?"]))] for n in range(3)]
    branches.append([model.encode_embedding(Content.of("a red circle"))])
    of_bytes = replace(model.packing, normalization=HALF)
    sent, kept = (pack(branches, [[]] * 4, packing) for packing in (of_bytes, model.packing))
    assert sent.inputs["pixel_values"].dtype == torch.uint8 and sent.pixels and not kept.pixels
    with torch.no_grad():
        one, other = read(model.lvlm, sent)[0], read(model.lvlm, kept)[0]
    assert (one - other).norm() <= 1e-6 * other.norm()  # values of float32 both


def test_a_run_sends_bytes(recipe):
    batch = make_batches(recipe, Cafe.load(recipe.model.base), 0, 1)[0]
    assert {part.joint.inputs["pixel_values"].dtype for part in batch.micro_batches} == {torch.uint8}
