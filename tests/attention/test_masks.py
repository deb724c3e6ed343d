"""FlexAttention's block mask against the dense mask of trees."""

import torch
from branch_samples import branch, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cafe.attention.masks import flex_tree_mask, tree_mask
from cafe.packing import PackingConfig, build_layout


@settings(max_examples=50, deadline=None)
@given(examples())
def test_flex_mask_equals_the_dense_mask(groups):
    for max_tokens in (1, 10**6):
        end = build_layout(groups, PackingConfig(max_row_tokens=max_tokens)).subtree_end
        rows, columns = end.shape
        block_mask = flex_tree_mask(end)
        index = torch.meshgrid(torch.arange(rows), torch.arange(columns), torch.arange(columns), indexing="ij")
        flex = block_mask.mask_mod(index[0], torch.tensor(0), index[1], index[2])
        assert torch.equal(flex, tree_mask(end)[:, 0])


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([1, 128, 512]), st.sampled_from([700, 10**6]))
def test_flex_blocks_are_those_pytorch_finds_in_the_dense_mask(data, multiple, max_tokens):
    lengths = st.integers(1, 400)
    groups, token = [], 0
    for _ in range(data.draw(st.integers(1, 4))):
        prefix, *continuations = data.draw(st.lists(lengths, min_size=2, max_size=4))
        shared = [0, *[token] * prefix]
        groups.append([branch([*shared, *[token + 1 + i] * length]) for i, length in enumerate(continuations)])
        token += 10
    config = PackingConfig(max_row_tokens=max_tokens, pad_to_multiple_of=multiple)
    end = build_layout(groups, config).subtree_end
    mask = tree_mask(end)
    found = flex_tree_mask(end)
    rows, columns = end.shape
    expected = create_block_mask(lambda r, h, q, k: mask[r, 0, q, k], rows, None, columns, columns, device="cpu")
    assert found.shape == expected.shape
    for part in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(found, part), getattr(expected, part))


def test_flex_mask_memory_is_linear_in_the_row():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tree_map_only(torch.Tensor, lambda tensor: setattr(self, "numel", max(self.numel, tensor.numel())), result)
            return result

    with Largest() as largest:
        flex_tree_mask(torch.full((1, 8192), 8192))
    assert largest.numel <= 8192
