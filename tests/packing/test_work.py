"""The work in a pack against what each branch reads by itself: its i-th token attends to i tokens."""

import numpy as np
import torch
from branch_samples import branch, examples, words
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.attention.masks import tree_mask
from cafe.packing import NO_WORK, PackingConfig, PackWork, build_layout, count_work, pack
from cafe.packing.work import count_visible_keys


@settings(max_examples=200, deadline=None)
@given(examples(), st.integers(1, 40), st.booleans(), st.sampled_from([1, 16]), st.data())
def test_the_work_in_a_pack_is_that_of_its_distinct_tokens(groups, max_tokens, share, multiple, data):
    packing = PackingConfig(max_row_tokens=max_tokens, share_prefixes=share, pad_to_multiple_of=multiple)
    # The first branches of an example are embedded; of the others, any tokens are supervised.
    groups = [[*group, branch(data.draw(words), num_supervised=3)] for group in groups]
    layout = build_layout(groups, packing)
    coords = iter(layout.coords)
    seen, read = {}, set()  # keys that the token at a (row, column) attends to; the tokens that are read
    for group in groups:
        for member, each in enumerate(group):
            own = [tuple(coord) for coord in next(coords).tolist()]
            seen |= {coord: index + 1 for index, coord in enumerate(own)}
            if member < len(group) - 1:
                read.add(own[-1])
            else:
                read |= {own[index - 1] for index in range(1, len(own)) if each.loss_mask[index]}
    work = count_work(pack([group[:-1] for group in groups], [group[-1:] for group in groups], packing))
    assert work == PackWork(len(seen), sum(seen.values()), len(read), sum(seen[coord] for coord in read))


@settings(max_examples=100, deadline=None)
@given(examples(), st.integers(1, 40))
def test_visible_keys_are_the_rows_of_the_mask(groups, max_tokens):
    layout = build_layout(groups, PackingConfig(max_row_tokens=max_tokens))
    assert torch.equal(count_visible_keys(layout.subtree_end), tree_mask(layout.subtree_end)[:, 0].sum(-1))
    # The same pairs by their keys: `subtree_end - j` queries attend to key j.
    ends = layout.subtree_end.numpy()
    assert count_visible_keys(layout.subtree_end).sum() == (ends - np.arange(ends.shape[1])).sum()


def test_work_without_anything_to_read_is_counted():
    work = count_work(pack([[]], [[branch([1, 2, 3])]]))
    assert work == PackWork(tokens=3, seen=6, read=0, read_seen=0)


def test_works_are_added_and_scaled():
    assert PackWork(1, 2, 3, 4) + PackWork(10, 20, 30, 40) * 2 == PackWork(21, 42, 63, 84)
    assert sum([PackWork(1, 2, 3, 4)] * 3, NO_WORK) == PackWork(1, 2, 3, 4) * 3
