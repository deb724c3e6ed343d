"""The packer against the definitions: who shares a prefix, who attends to whom, at which position."""

import pytest
import torch
from branch_samples import IMAGE, branch, examples, random_image
from hypothesis import given, settings
from hypothesis import strategies as st

from cafe.attention.masks import tree_mask
from cafe.packing import Branch, PackingConfig, build_layout, count_crops, count_unique_tokens, pack


def shared_length(first: Branch, second: Branch) -> int:
    """Count the tokens that two branches may share, by definition: images all or none."""
    length = 0
    while length < min(len(first), len(second)) and first.input_ids[length] == second.input_ids[length]:
        if first.image_mask[length] and first.image_inputs is not second.image_inputs:
            break
        length += 1
    for each in (first, second):
        image_tokens = each.image_mask.nonzero()[:, 0].tolist()
        if image_tokens and image_tokens[0] < length <= image_tokens[-1]:
            length = image_tokens[0]
    return length


@settings(max_examples=200, deadline=None)
@given(examples(), st.integers(1, 40), st.booleans(), st.sampled_from([1, 16]))
def test_every_branch_attends_to_exactly_itself_at_its_own_positions(groups, max_tokens, share, multiple):
    layout = build_layout(
        groups, PackingConfig(max_row_tokens=max_tokens, share_prefixes=share, pad_to_multiple_of=multiple)
    )
    assert layout.subtree_end.shape[1] % multiple == 0
    attends = tree_mask(layout.subtree_end)[:, 0]
    for each, coords in zip([b for group in groups for b in group], layout.coords, strict=True):
        rows, columns = coords[:, 0], coords[:, 1]
        assert len(set(rows.tolist())) == 1
        assert torch.equal(layout.input_ids[rows, columns], each.input_ids)
        assert layout.position_ids[0, rows, columns].tolist() == list(range(len(each)))
        for index, (row, column) in enumerate(coords.tolist()):
            assert attends[row, column].nonzero()[:, 0].tolist() == sorted(columns[: index + 1].tolist())
    used = {tuple(coord) for coords in layout.coords for coord in coords.tolist()}
    assert len(used) == layout.valid.sum()  # every token belongs to a branch
    assert attends.any(-1).all()  # padding attends to something too


@settings(max_examples=200, deadline=None)
@given(examples(), st.integers(1, 40))
def test_a_row_holds_each_prefix_once_and_at_most_max_tokens(groups, max_tokens):
    layout = build_layout(groups, PackingConfig(max_row_tokens=max_tokens))
    branches = [b for group in groups for b in group]
    for i, first in enumerate(layout.coords):
        for j, second in enumerate(layout.coords[:i]):
            if first[0, 0] == second[0, 0]:
                same = (first[:, None] == second[None, :]).all(-1).sum()
                assert same == shared_length(branches[i], branches[j])
    # With a long prefix that all share, rows of the length that is least work may be longer than the maximum.
    root = min(shared_length(first, second) for first in branches for second in branches) if branches[1:] else 0
    limit = max(max_tokens, int(root + (root * (3 * max_tokens + root)) ** 0.5))
    largest = max(count_unique_tokens(group) for group in groups)
    assert layout.subtree_end.shape[1] <= (limit if largest <= limit else largest + largest // 8)


def test_examples_that_show_the_same_image_share_it_in_the_order_of_the_images():
    red, blue = random_image(), random_image()
    contents = [
        branch([1, IMAGE, IMAGE, 2], red),
        branch([1, IMAGE, IMAGE, 3], blue),
        branch([1, 8, 9]),
        branch([1, IMAGE, IMAGE, 4, 5], red),
        branch([1, IMAGE, IMAGE, 6], blue),
        branch([1, IMAGE, IMAGE, 7], red),
    ]
    # Rows hold one image with its questions, or everything: a row of 4 tokens would hold a branch.
    for max_tokens in (8, 100):
        packed = pack([[each] for each in contents], [[]] * 6, PackingConfig(max_row_tokens=max_tokens))
        ids = packed.inputs["input_ids"]
        assert (ids == IMAGE).sum() == 4
        # The tokens behind an image tell whose it is, in row-major order.
        first_words = [int(token) for token in ids.flatten() if token in (2, 3, 4, 6, 7)]
        images = [red, blue] if first_words[0] in (2, 4, 7) else [blue, red]
        assert torch.equal(packed.inputs["pixel_values"], torch.cat([image["pixel_values"] for image in images]))
        assert [int(ids[row, column]) for row, column in packed.embedding_index] == [2, 3, 9, 5, 6, 7]


def test_examples_with_a_long_common_beginning_share_it_and_those_with_a_short_one_fill_rows():
    instructions = [list(range(start, start + 20)) for start in (100, 200)]
    groups = [[branch([1, *instructions[number % 2], 300 + number, 400 + number])] for number in range(12)]
    layout = build_layout(groups, PackingConfig(max_row_tokens=40))
    assert layout.valid.sum() == 2 * (1 + 20 + 6 * 2)  # a row for each instruction
    # One word in common is no reason to put branches into one row.
    groups = [[branch([1, 2 + number % 2, *range(100 * number + 100, 100 * number + 109)])] for number in range(12)]
    assert build_layout(groups, PackingConfig(max_row_tokens=40)).valid.all()


@pytest.mark.parametrize("alone", [True, False])
def test_a_long_prefix_is_read_as_often_as_is_least_work(alone):
    """Work by the definition: for each token, its matrices (three times the maximum row) and attention over its row."""
    image, questions, length, max_tokens = random_image(), 60, 10, 40
    groups = [[branch([1, *[IMAGE] * 99, *range(n * 100, n * 100 + length)], image)] for n in range(1, questions + 1)]
    if not alone:
        groups.append([branch([1, 2, 3])])
    rows, columns = build_layout(groups, PackingConfig(max_row_tokens=max_tokens)).subtree_end.shape

    def work(count: int, longest: float) -> float:
        return count * longest * (3 * max_tokens + longest)

    best = min(work(count, 100 + questions * length / count) for count in range(1, questions + 1))
    assert work(rows, columns) <= 1.15 * best


def test_a_tree_may_be_deeper_than_pythons_stack():
    """Each branch is a prefix of the next, so each is a node below the one before."""
    text = torch.arange(400)
    chain = [Branch(text[:length], text[:length] < 0, text[:length] < 0) for length in range(1, len(text) + 1)]
    layout = build_layout([chain], PackingConfig(max_row_tokens=len(text)))
    assert count_unique_tokens(chain) == layout.valid.sum() == len(text)
    assert torch.equal(layout.input_ids[0], text)
    assert all(torch.equal(coords[:, 1], text[: len(coords)]) for coords in layout.coords)


def test_an_image_is_packed_once_in_the_order_of_its_tokens():
    first, second = random_image(), random_image()
    queries = [branch([1, IMAGE, IMAGE, 2], first), branch([1, IMAGE, IMAGE, 5], second)]
    targets = [branch([1, 7, 8]), branch([1, 7, 9])]
    dialogue = branch([1, IMAGE, IMAGE, 3, 4], first, num_supervised=2)
    packed = pack([[query, target] for query, target in zip(queries, targets, strict=True)], [[dialogue], []])
    row = packed.inputs["input_ids"][0].tolist()
    assert sorted(row) == sorted([1, IMAGE, IMAGE, 2, 3, 4, IMAGE, IMAGE, 5, 7, 8, 9])
    order = [first, second] if row.index(2) < row.index(5) else [second, first]
    assert torch.equal(packed.inputs["pixel_values"], torch.cat([image["pixel_values"] for image in order]))
    assert [row[column] for _, column in packed.embedding_index.tolist()] == [2, 8, 5, 9]
    assert packed.labels.tolist() == [3, 4]
    assert [row[column] for _, column in packed.logits_index.tolist()] == [IMAGE, 3]


def test_crops_are_counted_in_every_layout_of_pixel_values():
    grids = {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 2]])}
    for shape, count, more in [
        ((2, 3, 8, 8), 2, {}),  # images
        ((2, 5, 3, 8, 8), 10, {}),  # images, crops of each
        ((28, 96), 2, grids),  # patches of all images
        ((2, 28, 96), 2, {}),  # images, patches of each
    ]:
        image_inputs = {"pixel_values": torch.zeros(shape), **more}
        branches = [branch([1, IMAGE, 2], image_inputs), branch([1, IMAGE, 3], image_inputs), branch([4])]
        assert count_crops(branches) == count


def test_texts_of_mixed_lengths_leave_hardly_any_padding():
    generator = torch.Generator().manual_seed(0)
    groups = []
    for _ in range(64):
        image = random_image()
        long, short = torch.randint(20, 120, (2,), generator=generator).tolist()
        text = torch.randint(100, 1000, (120,), generator=generator).tolist()
        prompt = [1, 2, 3, *[IMAGE] * 196]
        query, target = branch([*prompt, 5, 6], image), branch([1, 2, 3, *text[:short]])
        groups.append([query, target, branch([*prompt, *text[:long]], image, num_supervised=long // 2)])
    packed = pack([group[:2] for group in groups], [group[2:] for group in groups], PackingConfig(max_row_tokens=1024))
    assert packed.num_tokens >= 0.98 * packed.inputs["input_ids"].numel()
