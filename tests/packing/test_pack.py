"""The packer against the definition: who shares a prefix, who sees whom, at which position."""

import torch
from branch_samples import IMAGE, branch, examples, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cafe.attention.masks import flex_tree_mask, tree_mask
from cafe.packing import Branch, PackingConfig, build_layout, count_crops, count_unique_tokens, pack


def prefix(first: Branch, second: Branch) -> int:
    """How many tokens two branches may share, by definition: pictures all or none."""
    length = 0
    while length < min(len(first), len(second)) and first.input_ids[length] == second.input_ids[length]:
        if first.image_mask[length] and first.image_inputs is not second.image_inputs:
            break
        length += 1
    for one in (first, second):
        places = one.image_mask.nonzero()[:, 0].tolist()
        if places and places[0] < length <= places[-1]:
            length = places[0]
    return length


@settings(max_examples=200, deadline=None)
@given(examples(), st.integers(1, 40), st.booleans(), st.sampled_from([1, 16]))
def test_every_branch_sees_exactly_itself_at_its_own_positions(groups, columns, share, multiple):
    layout = build_layout(
        groups, PackingConfig(max_row_tokens=columns, share_prefixes=share, pad_to_multiple_of=multiple)
    )
    assert layout.subtree_end.shape[1] % multiple == 0
    sees = tree_mask(layout.subtree_end)[:, 0]
    for one, place in zip([b for group in groups for b in group], layout.coords, strict=True):
        rows, at = place[:, 0], place[:, 1]
        assert len(set(rows.tolist())) == 1
        assert torch.equal(layout.input_ids[rows, at], one.input_ids)
        assert layout.position_ids[0, rows, at].tolist() == list(range(len(one)))
        for index, (row, column) in enumerate(place.tolist()):
            assert sees[row, column].nonzero()[:, 0].tolist() == sorted(at[: index + 1].tolist())
    taken = {tuple(place) for places in layout.coords for place in places.tolist()}
    assert len(taken) == layout.valid.sum()  # nothing is there for nobody
    assert sees.any(-1).all()  # not even padding sees nothing


@settings(max_examples=200, deadline=None)
@given(examples(), st.integers(1, 40))
def test_a_row_holds_a_prefix_once_and_stays_within_its_budget(groups, columns):
    layout = build_layout(groups, PackingConfig(max_row_tokens=columns))
    branches = [b for group in groups for b in group]
    for i, first in enumerate(layout.coords):
        for j, second in enumerate(layout.coords[:i]):
            if first[0, 0] == second[0, 0]:
                same = (first[:, None] == second[None, :]).all(-1).sum()
                assert same == prefix(branches[i], branches[j])
    largest = max(count_unique_tokens(group) for group in groups)
    assert layout.subtree_end.shape[1] <= (columns if largest <= columns else largest + largest // 8)


@settings(max_examples=50, deadline=None)
@given(examples())
def test_the_block_mask_says_the_same(groups):
    for columns in (1, 10**6):
        end = build_layout(groups, PackingConfig(max_row_tokens=columns)).subtree_end
        rows, length = end.shape
        block = flex_tree_mask(end)
        where = torch.meshgrid(torch.arange(rows), torch.arange(length), torch.arange(length), indexing="ij")
        assert torch.equal(block.mask_mod(where[0], torch.tensor(0), where[1], where[2]), tree_mask(end)[:, 0])


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([1, 128, 512]), st.sampled_from([700, 10**6]))
def test_the_blocks_are_those_that_pytorch_finds_in_the_whole_mask(data, multiple, columns):
    lengths = st.integers(1, 400)
    groups, token = [], 0
    for _ in range(data.draw(st.integers(1, 4))):
        prefix, *own = data.draw(st.lists(lengths, min_size=2, max_size=4))
        groups.append([branch([0, *[token] * prefix, *[token + 1 + i] * length]) for i, length in enumerate(own)])
        token += 10
    end = build_layout(groups, PackingConfig(max_row_tokens=columns, pad_to_multiple_of=multiple)).subtree_end
    mask = tree_mask(end)
    found = flex_tree_mask(end)
    rows, length = end.shape
    expected = create_block_mask(lambda r, h, q, k: mask[r, 0, q, k], rows, None, length, length, device="cpu")
    assert found.shape == expected.shape
    for part in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(found, part), getattr(expected, part))


def test_the_block_mask_of_a_long_row_is_made_in_little_memory():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            tree_map_only(torch.Tensor, lambda tensor: setattr(self, "numel", max(self.numel, tensor.numel())), made)
            return made

    with Largest() as largest:
        flex_tree_mask(torch.full((1, 8192), 8192))
    assert largest.numel <= 8192


def test_an_image_is_packed_once_in_the_order_of_its_tokens():
    first, second = picture(), picture()
    queries = [branch([1, IMAGE, IMAGE, 2], first), branch([1, IMAGE, IMAGE, 5], second)]
    targets = [branch([1, 7, 8]), branch([1, 7, 9])]
    dialogue = branch([1, IMAGE, IMAGE, 3, 4], first, spoken=2)
    done = pack([[query, target] for query, target in zip(queries, targets, strict=True)], [[dialogue], []])
    row = done.inputs["input_ids"][0].tolist()
    assert sorted(row) == sorted([1, IMAGE, IMAGE, 2, 3, 4, IMAGE, IMAGE, 5, 7, 8, 9])
    order = [first, second] if row.index(2) < row.index(5) else [second, first]
    assert torch.equal(done.inputs["pixel_values"], torch.cat([vision["pixel_values"] for vision in order]))
    assert [row[column] for _, column in done.embedding_index.tolist()] == [2, 8, 5, 9]
    assert done.labels.tolist() == [3, 4] and [row[column] for _, column in done.logits_index.tolist()] == [IMAGE, 3]


def test_crops_are_counted_however_a_family_lays_them_out():
    grids = {"image_grid_thw": torch.tensor([[1, 4, 6], [1, 2, 2]])}
    for shape, count, more in [
        ((2, 3, 8, 8), 2, {}),  # pictures
        ((2, 5, 3, 8, 8), 10, {}),  # pictures, and the parts of each
        ((28, 96), 2, grids),  # patches of all pictures
        ((2, 28, 96), 2, {}),  # pictures, and the patches of each
    ]:
        vision = {"pixel_values": torch.zeros(shape), **more}
        shown = [branch([1, IMAGE, 2], vision), branch([1, IMAGE, 3], vision), branch([4])]
        assert count_crops(shown) == count


def test_texts_of_mixed_lengths_leave_hardly_any_padding():
    generator = torch.Generator().manual_seed(0)
    groups = []
    for _ in range(64):
        vision = picture()
        long, short = torch.randint(20, 120, (2,), generator=generator).tolist()
        said = torch.randint(100, 1000, (120,), generator=generator).tolist()
        prompt = [1, 2, 3, *[IMAGE] * 196]
        groups.append([branch([*prompt, 5, 6], vision), branch([1, 2, 3, *said[:short]])])
        groups[-1].append(branch([*prompt, *said[:long]], vision, spoken=long // 2))
    done = pack([group[:2] for group in groups], [group[2:] for group in groups], PackingConfig(max_row_tokens=1024))
    assert done.num_tokens >= 0.98 * done.inputs["input_ids"].numel()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(20, 90))
def test_rows_take_no_more_work_than_filled_best_fit_by_hand(lengths, columns):
    columns = columns if max(lengths) <= columns else max(lengths) + max(lengths) // 8
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        room = [row for row in range(len(rows)) if rows[row] + length <= columns]
        if room:
            rows[max(room, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    groups = [[branch([number + 100, *[0] * (length - 1)])] for number, length in enumerate(lengths)]
    count, longest = build_layout(groups, PackingConfig(max_row_tokens=columns)).subtree_end.shape
    assert longest <= columns
    assert count * longest * (3 * columns + longest) <= len(rows) * max(rows) * (3 * columns + max(rows))
