"""Chains of a row against what the tree mask says of each token."""

import torch
from branch_samples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.attention.chains import iter_ancestors, iter_chains, read_spans
from cafe.attention.masks import tree_mask
from cafe.packing import PackingConfig, build_layout


@settings(max_examples=100, deadline=None)
@given(examples(), st.integers(1, 60), st.sampled_from([1, 16]))
def test_a_chain_attends_to_its_ancestors_and_to_itself_causally(groups, max_tokens, multiple):
    end = build_layout(groups, PackingConfig(max_row_tokens=max_tokens, pad_to_multiple_of=multiple)).subtree_end
    mask = tree_mask(end)[:, 0]
    for row, ends in enumerate(end.tolist()):
        found = torch.zeros(len(ends), len(ends), dtype=torch.bool)
        for chain, ancestors in iter_ancestors(ends):
            for above in ancestors:
                found[chain, above] = True
            found[chain, chain] |= torch.ones(chain.stop - chain.start, chain.stop - chain.start).tril().bool()
        assert torch.equal(found, mask[row])


def test_padding_is_one_chain():
    assert list(iter_chains([3, 3, 3, 6, 6, 6])) == [slice(0, 3), slice(3, 6)]


def test_read_spans_reach_from_the_first_to_the_last_token_read_of_each_chain():
    ends = [10, 10, 5, 5, 5, 10, 10, 10, 10, 10]  # chains of columns 0-4 and 5-9
    assert list(iter_chains(ends)) == [slice(0, 5), slice(5, 10)]
    assert read_spans(ends, [1, 6, 8]) == [(slice(0, 5), slice(1, 2)), (slice(5, 10), slice(6, 9))]
    assert read_spans(ends, [7]) == [(slice(5, 10), slice(7, 8))]
    assert read_spans(ends, []) == []
