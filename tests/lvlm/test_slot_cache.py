"""The slot cache against one `DynamicCache` for each sequence, as sequences of any length join, grow and leave."""

from dataclasses import dataclass, field, replace
from random import Random

import pytest
import torch
from model_samples import SMALL, WIDE, make
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from cafe.content import Content
from cafe.lvlm import slot_cache
from cafe.lvlm.content_encoder import ContentEncoder
from cafe.lvlm.forward import forward_packed, to_device
from cafe.lvlm.slot_cache import LENGTH_MULTIPLE, SlotCache, read_slots, select_key_values
from cafe.packing import pack_with_layout

NUM_WORDS = 200  # tokens of the tiny vocabularies that stand for bytes


@dataclass
class Sequence:
    """A sequence with a cache of its own, as transformers reads it."""

    lvlm: PreTrainedModel
    cache: DynamicCache = field(default_factory=DynamicCache)
    length: int = 0

    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens, and return the hidden state of the last."""
        positions = torch.arange(self.length, self.length + len(tokens))
        self.length += len(tokens)
        inputs = {"input_ids": tokens[None], "position_ids": positions[None], "past_key_values": self.cache}
        return self.lvlm.base_model(**inputs, use_cache=True).last_hidden_state[0, -1]

    def key_values(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys[0].clone(), layer.values[0].clone()) for layer in self.cache.layers]


@pytest.fixture(scope="module")
def lvlm() -> PreTrainedModel:
    return make("llava").lvlm.double()


def words(rng: Random, length: int) -> Tensor:
    return torch.tensor([rng.randrange(10, NUM_WORDS) for _ in range(length)])


def begin(lvlm: PreTrainedModel, rng: Random, length: int) -> Sequence:
    sequence = Sequence(lvlm)
    sequence.read(words(rng, length))
    return sequence


def read(lvlm: PreTrainedModel, cache: SlotCache, start: int, rows: list[Tensor]) -> Tensor:
    """Read next tokens of the sequences in some slots, as they follow those before."""
    tokens = pad_sequence(rows, batch_first=True)
    positions = torch.tensor(cache.lengths[start : start + len(rows)])[:, None] + torch.arange(tokens.shape[1])
    return read_slots(lvlm, cache, start, [len(row) for row in rows], tokens, positions[None])


@torch.inference_mode()
@pytest.mark.parametrize("seed", range(6))
def test_sequences_that_join_grow_and_leave_are_read_as_if_alone(lvlm, seed):
    rng = Random(seed)
    cache, alone = SlotCache(num_layers=2), list[Sequence]()
    for _ in range(40):
        action = rng.choice(["join", "leave", "one token", "several tokens", "several tokens"])
        if action == "join" or not alone:
            alone.append(begin(lvlm, rng, rng.choice([1, 2, 7, 30, 120, 300])))
            cache.join(alone[-1].key_values(), room=rng.choice([0, 1, 300]))
        elif action == "leave":
            slot = rng.randrange(len(alone))
            cache.leave(slot)
            last = alone.pop()
            if slot < len(alone):
                alone[slot] = last
        else:
            start = rng.randrange(len(alone))
            stop = rng.randint(start + 1, len(alone))
            longest = 1 if action == "one token" else 40
            rows = [words(rng, rng.randint(1, longest)) for _ in range(start, stop)]
            hidden = read(lvlm, cache, start, rows)
            expected = torch.stack([one.read(row) for one, row in zip(alone[start:stop], rows, strict=True)])
            torch.testing.assert_close(hidden, expected, rtol=1e-9, atol=1e-9)
        assert cache.lengths == [one.length for one in alone]


def test_columns_that_are_shown_for_a_round_shape_change_nothing(lvlm, monkeypatch):
    assert slot_cache._shown_columns(7, torch.device("cpu")) == 7
    assert slot_cache._shown_columns(7, torch.device("cuda")) == LENGTH_MULTIPLE
    monkeypatch.setattr(slot_cache, "_shown_columns", lambda length, device: slot_cache._round_up(length))
    test_sequences_that_join_grow_and_leave_are_read_as_if_alone(lvlm, 0)


@torch.inference_mode()
def test_the_caches_memory_grows_with_its_sequences_and_is_given_back_with_the_last(lvlm):
    rng = Random(0)
    cache = SlotCache(num_layers=2)
    for _ in range(3):
        cache.join(begin(lvlm, rng, 10).key_values(), room=LENGTH_MULTIPLE)
    assert all(len(layer.keys) >= 3 and layer.keys.shape[2] == 2 * LENGTH_MULTIPLE for layer in cache.layers)
    for _ in range(3):
        cache.leave(0)
    assert all(layer.keys.numel() == layer.values.numel() == 0 for layer in cache.layers)
    # It can be used again.
    sequence, row = begin(lvlm, rng, 5), words(rng, 2)
    cache.join(sequence.key_values(), room=1)
    torch.testing.assert_close(read(lvlm, cache, 0, [row])[0], sequence.read(row), rtol=1e-9, atol=1e-9)


def num_columns(cache: SlotCache) -> int:
    """Count the columns of all slots that there is memory for, used or not."""
    [number] = {states.shape[0] * states.shape[2] for layer in cache.layers for states in (layer.keys, layer.values)}
    return number


@torch.inference_mode()
def test_a_long_sequence_takes_memory_only_while_it_is_there(lvlm):
    rng = Random(0)
    cache, alone = SlotCache(num_layers=2), [begin(lvlm, rng, 5) for _ in range(9)]
    for one in alone:
        cache.join(one.key_values(), room=1)
    short = num_columns(cache)
    assert short <= 1.5 * 9 * LENGTH_MULTIPLE
    long = begin(lvlm, rng, 4 * LENGTH_MULTIPLE)
    cache.join(long.key_values(), room=1)
    assert num_columns(cache) == 10 * 5 * LENGTH_MULTIPLE
    cache.leave(9)
    assert num_columns(cache) <= short
    # Spare slots do not become long.
    for _ in range(8):
        cache.leave(1)
    cache.join(long.key_values(), room=1)
    assert num_columns(cache) == 2 * 5 * LENGTH_MULTIPLE
    rows = [words(rng, 2), words(rng, 1)]
    expected = torch.stack([alone[0].read(rows[0]), long.read(rows[1])])
    torch.testing.assert_close(read(lvlm, cache, 0, rows), expected, rtol=1e-9, atol=1e-9)


@torch.inference_mode()
@pytest.mark.parametrize("broken_slot", [0, 1, 2])
def test_nothing_of_a_sequence_whose_numbers_are_not_finite_stays_behind(lvlm, broken_slot):
    """A hidden column counts for nothing, but nothing times NaN is NaN."""
    rng = Random(0)
    cache = SlotCache(num_layers=2)
    alone = [begin(lvlm, rng, length) for length in (50, 3)]
    joining = [one.key_values() for one in alone]
    joining.insert(broken_slot, [(keys * torch.nan, values * torch.nan) for keys, values in joining[0]])
    for key_values in joining:
        cache.join(key_values, room=8)
    cache.leave(broken_slot)
    if broken_slot == 0:
        alone.reverse()  # the last one has moved
    alone.append(begin(lvlm, rng, 5))
    cache.join(alone[-1].key_values(), room=8)

    rows = [words(rng, length) for length in (1, 2, 1)]
    expected = torch.stack([one.read(row) for one, row in zip(alone, rows, strict=True)])
    torch.testing.assert_close(read(lvlm, cache, 0, rows), expected, rtol=1e-9, atol=1e-9)


@torch.inference_mode()
def test_tokens_can_be_read_again_after_an_error(lvlm, monkeypatch):
    rng = Random(0)
    cache, sequence, row = SlotCache(num_layers=2), begin(lvlm, rng, 9), words(rng, 3)
    cache.join(sequence.key_values(), room=8)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(lvlm.base_model.language_model.layers[1], "forward", raise_error)
        read(lvlm, cache, 0, [row])
    torch.testing.assert_close(read(lvlm, cache, 0, [row])[0], sequence.read(row), rtol=1e-9, atol=1e-9)


@torch.inference_mode()
@pytest.mark.parametrize("kernel", ["mask", "blocks"])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "glm4v"])
def test_a_pack_leaves_for_each_branch_what_the_branch_leaves_alone(family, kernel):
    """Branches that share images, and others, in rows of trees."""
    model = make(family)
    lvlm = model.lvlm.double()
    encoder = ContentEncoder(model.chat_processor)
    asked = [Content.of([SMALL, "What is it?"]), Content.of([SMALL]), Content.of([WIDE, SMALL]), Content.of("words")]
    branches = [*map(encoder.encode_embedding, asked), *map(encoder.encode_prompt, asked)]
    packing = replace(model.packing, kernel=kernel)
    packed, layout = pack_with_layout([[branch] for branch in branches], [[]] * len(branches), packing)
    assert packed.num_tokens < sum(map(len, branches))
    cache = DynamicCache(config=lvlm.config.get_text_config())
    forward_packed(lvlm, packed, cache)

    for branch, coords in zip(branches, layout.coords, strict=True):
        alone = DynamicCache()
        inputs = to_device(model.chat_processor.collate([branch]), lvlm.device, lvlm.dtype)
        lvlm.base_model(**inputs, past_key_values=alone, use_cache=True)
        for layer, own in zip(alone.layers, select_key_values(cache, coords), strict=True):
            for states, expected in zip(own, (layer.keys, layer.values), strict=True):
                torch.testing.assert_close(states, expected[0], rtol=1e-6, atol=1e-6)


def raise_error(*args: object, **kwargs: object) -> None:
    raise RuntimeError("out of memory")
