"""The packer against the definitions: who shares a prefix, who attends to whom, at which position."""

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
    largest = max(count_unique_tokens(group) for group in groups)
    assert layout.subtree_end.shape[1] <= (max_tokens if largest <= max_tokens else largest + largest // 8)


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
