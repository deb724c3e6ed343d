"""The blocks of the mask of trees, and the operator that computes them."""

import pytest
import torch
from branch_samples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from cafe.attention.blockwise import iter_blocks, read_blocks, tree_to_blocks
from cafe.attention.masks import tree_mask
from cafe.packing import PackingConfig, build_layout


@settings(max_examples=100, deadline=None)
@given(examples(), st.integers(1, 60))
def test_blocks_cover_the_mask_once(groups, max_tokens):
    end = build_layout(groups, PackingConfig(max_row_tokens=max_tokens)).subtree_end
    count = torch.zeros(*end.shape, end.shape[1], dtype=torch.long)
    num_pairs = 0
    for block in iter_blocks(tree_to_blocks(end).bounds):
        view = count[block.row, block.queries, block.keys]
        view += torch.ones_like(view).tril() if block.causal else 1
        num_pairs += block.num_pairs
    assert torch.equal(count, tree_mask(end)[:, 0].long())
    assert num_pairs == count.sum()


@settings(max_examples=100, deadline=None)
@given(examples(), st.integers(1, 60), st.data())
def test_blocks_of_tokens_that_are_read_cover_their_queries_once(groups, max_tokens, data):
    end = build_layout(groups, PackingConfig(max_row_tokens=max_tokens)).subtree_end
    read = torch.zeros_like(end, dtype=torch.bool)
    for row, column in data.draw(
        st.lists(st.tuples(st.integers(0, end.shape[0] - 1), st.integers(0, end.shape[1] - 1)), max_size=5)
    ):
        read[row, column] = True
    count = torch.zeros(*end.shape, end.shape[1], dtype=torch.long)
    for block in iter_blocks(read_blocks(end, read).bounds):
        view = count[block.row, block.queries, block.keys]
        view += torch.ones_like(view).tril() if block.causal else 1
    assert torch.equal(count[read], tree_mask(end)[:, 0][read].long())
    # All queries between two that are read are complete, or not computed at all.
    complete = (count == tree_mask(end)[:, 0]).all(2)
    assert torch.equal(complete, count.any(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_operator_tells_compilers_what_it_returns(dtype):
    end = torch.tensor([[9, 9, 5, 4, 5, 9, 8, 8, 9], [4, 4, 4, 4, 9, 9, 9, 9, 9]])
    states = [torch.randn(2, heads, 9, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.cafe.attend_blocks, (*states, tree_to_blocks(end).bounds, None), test_utils=checks,
        rtol=1e-2 if dtype == torch.bfloat16 else None, atol=1e-2 if dtype == torch.bfloat16 else None,
    )  # fmt: skip


def test_flops_are_those_of_the_pairs_that_are_seen():
    end = torch.tensor([[9, 9, 5, 4, 5, 9, 8, 8, 9]])
    states = [torch.randn(1, heads, 9, 8, requires_grad=True) for heads in (4, 2, 2)]
    with FlopCounterMode(display=False) as counter:
        output = tree_to_blocks(end).attend(*states, None)
        forward = counter.get_total_flops()
        output.sum().backward()
    seen = int(tree_mask(end).sum())
    assert forward == 2 * 2 * 4 * 8 * seen
    assert counter.get_total_flops() - forward == 4 * 2 * 4 * 8 * seen
