"""The order of siblings in a row, and the number and length of rows against the estimate of their work."""

import math

import pytest
import torch
from branch_samples import IMAGE, branch, examples, random_image
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cafe.packing import Branch, PackingConfig, build_layout
from cafe.packing.rows import MAX_SPREAD, MIN_SAVING

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


def work(count: int, longest: int, max_tokens: int) -> int:
    """Estimate the work of rows that are all padded to the longest: matrices, and attention."""
    return count * longest * (3 * max_tokens + longest)


def one_branch_trees(lengths: list[int], root: int = 0) -> list[list[Branch]]:
    """Make groups of one branch each, which share `root` tokens and have `lengths` of their own."""
    return [[branch([1] * root + [number + 100] * length)] for number, length in enumerate(lengths)]


def shape(groups: list[list[Branch]], max_tokens: int) -> tuple[int, int]:
    """Return the number of rows, and their length."""
    count, longest = build_layout(groups, PackingConfig(max_row_tokens=max_tokens)).subtree_end.shape
    return count, longest


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=30), st.integers(0, 15), st.integers(20, 2000))
def test_rows_take_no_more_work_than_best_fit_or_one_row(lengths: list[int], root: int, max_tokens: int):
    count, longest = shape(one_branch_trees(lengths, root), max_tokens)
    largest = root + max(lengths)
    if largest > max_tokens:
        max_tokens = largest + largest // 8

    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        roomy = [row for row in range(len(rows)) if rows[row] + length <= max_tokens]
        if roomy:
            rows[max(roomy, key=lambda row: rows[row])] += length
        else:
            rows.append(root + length)
    assert longest <= max_tokens
    assert work(count, longest, max_tokens) <= work(len(rows), max(rows), max_tokens)
    total = root + sum(lengths)
    if total <= max_tokens:
        assert work(count, longest, max_tokens) <= work(1, total, max_tokens)


@settings(max_examples=200, deadline=None)
@given(st.integers(2, MAX_SPREAD), st.integers(1, 200), st.integers(0, 50), st.integers(100, 2000))
def test_equal_trees_are_spread_over_the_number_of_rows_with_the_least_work(
    num_trees: int, length: int, root: int, max_tokens: int
):
    count, longest = shape(one_branch_trees([length] * num_trees, root), max_tokens)
    if root + length > max_tokens:
        max_tokens = (root + length) * 9 // 8
    works = []
    for num_rows in range(1, num_trees + 1):
        fullest = root + length * math.ceil(num_trees / num_rows)
        if fullest <= max_tokens:
            works.append(work(num_rows, fullest, max_tokens))
    assert (1 - MIN_SAVING) * work(count, longest, max_tokens) <= min(works)


@settings(max_examples=200, deadline=None)
@given(examples())
@example(one_branch_trees([1000, 1000]))  # without a common prefix, two rows would hold no more tokens than one
def test_rows_of_unbounded_length_are_one(groups: list[list[Branch]]):
    count, _ = shape(groups, 2**40)
    assert count == 1


@pytest.mark.parametrize(("max_tokens", "expected"), [(7168, (2, 1947)), (2**40, (1, 3880))])
def test_two_pairs_of_a_7b_model_take_a_row_each_where_row_length_costs(max_tokens: int, expected: tuple[int, int]):
    groups = []
    for pair in range(2):
        image, first = random_image(), 1000 * (pair + 1)
        prompt = [1] * 14 + [IMAGE] * 1485
        caption = [first] * 216
        groups.append(
            [branch(prompt + caption, image), branch(prompt + [2] * 16, image), branch([1] * 14 + caption)],
        )
    assert shape(groups, max_tokens) == expected
    assert work(2, 1947, 7168) < work(1, 3880, 7168)
