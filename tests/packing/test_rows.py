"""The order of siblings in a row."""

import torch
from branch_samples import IMAGE, branch, examples
from hypothesis import given, settings

from cafe.packing import Branch, PackingConfig, build_layout

ONE_ROW = PackingConfig(max_row_tokens=2**40)


def siblings(end: list[int], start: int, stop: int) -> list[int]:
    """List the columns from `start` to `stop` that are not below another of them."""
    columns = []
    while start < stop:
        columns.append(start)
        start = end[start]
    return columns


@settings(max_examples=200, deadline=None)
@given(examples())
def test_siblings_are_laid_out_longest_first_and_ties_by_their_next_token(groups: list[list[Branch]]):
    layout = build_layout(groups, ONE_ROW)
    ids, end = layout.input_ids[0].tolist(), layout.subtree_end[0].tolist()
    families = [siblings(end, 0, len(end))]
    families += [siblings(end, column + 1, end[column]) for column in range(len(end))]
    for family in families:
        # An image, whatever its token id, comes before words.
        order = [(column - end[column], -1 if ids[column] == IMAGE else ids[column]) for column in family]
        assert order == sorted(order)


def test_the_longest_continuation_follows_its_prefix():
    branches = [branch([1, 2, 3]), branch([1, 2, 4, 5]), branch([1, 2, 4, 6]), branch([1, 7])]
    layout = build_layout([branches], ONE_ROW)
    assert torch.equal(layout.input_ids, torch.tensor([[1, 2, 4, 5, 6, 3, 7]]))
    assert layout.subtree_end.tolist() == [[7, 6, 5, 4, 5, 6, 7]]


def test_the_order_of_branches_does_not_change_the_row():
    branches = [branch([1, 2, 3]), branch([1, 4, 3]), branch([1, 3, 3, 5]), branch([1])]
    rows = [build_layout([group], ONE_ROW).input_ids.tolist() for group in (branches, branches[::-1])]
    assert rows[0] == rows[1] == [[1, 3, 3, 5, 2, 3, 4, 3]]
