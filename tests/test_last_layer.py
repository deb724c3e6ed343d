"""The last layer behind attention: the same where it is read, and nothing computed elsewhere."""

import pytest
import torch
from families import FAMILIES
from torch.utils.flop_counter import FlopCounterMode

from cafe.last_layer import last_layer_at, parts_of

OTHER_LAYERS = {"gemma4"}  # something follows the feed-forward part of its layers
PLACES = torch.tensor([[0, 4], [1, 0], [0, 4], [1, 6]])  # one of them twice


def make(family):
    try:
        return FAMILIES[family]().lvlm.train()
    except ImportError as error:
        pytest.skip(str(error))


def gradients(lvlm, weight, *context):
    """The hidden states at `PLACES`, and the gradient of their weighted sum."""
    ids = torch.randint(10, 40, (2, 7), generator=torch.Generator().manual_seed(0))
    lvlm.zero_grad()
    with last_layer_at(lvlm, *context):
        hidden = lvlm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    read = hidden[PLACES[:, 0], PLACES[:, 1]]
    (read * weight).sum().backward()
    return read, torch.cat([part.grad.flatten() for part in lvlm.parameters() if part.grad is not None]), hidden


def everywhere():
    return torch.cartesian_prod(torch.arange(2), torch.arange(7))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_and_its_gradient_are_those_of_the_whole_layer(family):
    lvlm = make(family)
    assert bool(parts_of(lvlm)) == (family not in OTHER_LAYERS)
    weight = torch.randn(len(PLACES), 1, generator=torch.Generator().manual_seed(1))
    for one, plain in zip(
        gradients(lvlm, weight, PLACES[:2], PLACES[2:])[:2], gradients(lvlm, weight, everywhere())[:2], strict=True
    ):
        torch.testing.assert_close(one, plain, rtol=1e-5, atol=1e-6)


def test_only_what_is_read_is_computed_and_the_layer_is_whole_again_behind_it():
    lvlm = make("llava_onevision")
    ids = torch.arange(10, 24).view(2, 7)
    weights = sum(parameter.numel() for part in parts_of(lvlm) for parameter in part.parameters())

    def flops(*places):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), last_layer_at(lvlm, *places):
            lvlm.base_model(input_ids=ids)
        return counter.get_total_flops()

    whole = flops(everywhere())
    assert whole - flops(PLACES) == 2 * weights * (14 - 3)
    assert whole - flops(PLACES[:0]) == 2 * weights * 14
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lvlm.base_model(input_ids=ids)
    assert counter.get_total_flops() == whole


def test_layers_that_are_made_again_for_the_backward_pass_are_computed_whole():
    lvlm = make("llava_onevision")
    weight = torch.ones(len(PLACES), 1)
    plain = gradients(lvlm, weight, everywhere())
    lvlm.gradient_checkpointing_enable()
    for one, other in zip(gradients(lvlm, weight, PLACES), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
