"""Packs: the branches of some examples as the inputs of one forward pass, and where its losses read."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from cafe.attention.tree import Tree, make_tree
from cafe.images.normalization import PackedPixels, pack_uint8
from cafe.packing.branch import Branch, TokenTypeFn
from cafe.packing.rows import DEFAULT_PACKING, Layout, PackingConfig, build_layout


@dataclass(frozen=True)
class PackedBatch:
    """Hold what goes through the model in one forward pass.

    Attributes:
        inputs: the model's inputs by name, except the attention mask of trees, which is computed from `tree`.
        tree: what attention layers receive for the rows; None where branches do not share prefixes.
        embedding_index: the (row, column) of each readout, in the order of the embedding branches.
        logits_index: the (row, column) of the token before each supervised token.
        labels: the supervised tokens.
        row_lengths: the number of tokens of each row, without padding.
        pixel_decoder: converts `pixel_values` from bytes to the model's values; None where they are not bytes.
    """

    inputs: dict[str, Tensor]
    tree: Tree | None
    embedding_index: Int64[Tensor, "readouts 2"]
    logits_index: Int64[Tensor, "supervised 2"]
    labels: Int64[Tensor, " supervised"]
    row_lengths: tuple[int, ...]
    pixel_decoder: PackedPixels | None = None

    @property
    def num_tokens(self) -> int:
        """Count the tokens without padding."""
        return sum(self.row_lengths)

    def pin_memory(self) -> "PackedBatch":
        """Copy all tensors to pinned memory, from which they are moved to a GPU asynchronously."""
        return replace(
            self,
            inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()},
            tree=self.tree and self.tree.pin_memory(),
            embedding_index=self.embedding_index.pin_memory(),
            logits_index=self.logits_index.pin_memory(),
            labels=self.labels.pin_memory(),
        )


def pack(
    embedding_branches: Sequence[Sequence[Branch]],
    lm_branches: Sequence[Sequence[Branch]],
    packing: PackingConfig = DEFAULT_PACKING,
) -> PackedBatch:
    """Pack the branches of some examples for one forward pass.

    Args:
        embedding_branches: for each example, the branches whose last token is a readout.
        lm_branches: for each example, the branches whose supervised tokens are predicted.
        packing: how to pack.
    """
    packed, _ = pack_with_layout(embedding_branches, lm_branches, packing)
    return packed


def pack_with_layout(
    embedding_branches: Sequence[Sequence[Branch]],
    lm_branches: Sequence[Sequence[Branch]],
    packing: PackingConfig = DEFAULT_PACKING,
) -> tuple[PackedBatch, Layout]:
    """Pack the branches of some examples as `pack` does, and return where each of their tokens lies, too."""
    groups = [[*first, *second] for first, second in zip(embedding_branches, lm_branches, strict=True)]
    branches = list(chain.from_iterable(groups))
    layout = build_layout(groups, packing)
    embedding_index, logits_index, labels = _index_tensors(embedding_branches, lm_branches, layout)
    inputs, pixel_decoder = _model_inputs(branches, layout, packing)
    tree = None
    if packing.share_prefixes:
        tree = make_tree(layout.subtree_end, torch.cat([embedding_index, logits_index]), packing.kernel)
    packed = PackedBatch(
        inputs=inputs,
        tree=tree,
        embedding_index=embedding_index,
        logits_index=logits_index,
        labels=labels,
        row_lengths=tuple(layout.valid.sum(1).tolist()),
        pixel_decoder=pixel_decoder,
    )
    return packed, layout


def _index_tensors(
    embedding_branches: Sequence[Sequence[Branch]], lm_branches: Sequence[Sequence[Branch]], layout: Layout
) -> tuple[Int64[Tensor, "readouts 2"], Int64[Tensor, "supervised 2"], Int64[Tensor, " supervised"]]:
    """Return where the readouts are, where the logits of the supervised tokens are, and these tokens."""
    # The empty tensors give the results their shape where there is nothing to concatenate.
    no_coords = torch.empty(0, 2, dtype=torch.long)
    no_labels = torch.empty(0, dtype=torch.long)
    readouts, predictors, labels = [no_coords], [no_coords], [no_labels]

    coords = iter(layout.coords)  # in the order of `pack`: for each example, embedding branches first
    for embedded, supervised in zip(embedding_branches, lm_branches, strict=True):
        for _ in embedded:
            readouts.append(next(coords)[-1:])
        for branch in supervised:
            # The logits of a token are at the one before it; nothing predicts the first token of a sequence.
            columns = branch.loss_mask.nonzero()[:, 0]
            columns = columns[columns > 0]
            predictors.append(next(coords)[columns - 1])
            labels.append(branch.input_ids[columns])
    return torch.cat(readouts), torch.cat(predictors), torch.cat(labels)


def _model_inputs(
    branches: Sequence[Branch], layout: Layout, packing: PackingConfig
) -> tuple[dict[str, Tensor], PackedPixels | None]:
    """Return the model's inputs by name, and what decodes the pixels where they are bytes."""
    # Models put image features where the image tokens are, in row-major order: images must follow it.
    images = [branches[number].image_inputs for number in layout.image_order]
    pixel_decoder = None
    if packing.normalization:
        images, pixel_decoder = pack_uint8(images, packing.normalization)
    inputs = {"input_ids": layout.input_ids, **collate_vision(images)}

    if packing.share_prefixes:
        # Models expect (rows, columns), with the axes in front only where there are several of them.
        inputs["position_ids"] = layout.position_ids.squeeze(0)
        return inputs, pixel_decoder

    # One branch per row is ordinary padded input, from which the model makes its own mask and position ids.
    inputs["attention_mask"] = layout.valid.long()
    for name, token_type_fn in packing.token_type_fns.items():
        inputs[name] = _token_types(branches, layout, token_type_fn)
    return inputs, pixel_decoder


def _token_types(
    branches: Sequence[Branch], layout: Layout, token_type_fn: TokenTypeFn
) -> Int64[Tensor, "rows columns"]:
    """Compute an input that marks tokens; padding is marked 0."""
    token_types = torch.zeros_like(layout.input_ids)
    for branch, coord in zip(branches, layout.coords, strict=True):
        token_types[coord[:, 0], coord[:, 1]] = token_type_fn(branch)
    return token_types


def count_crops(branches: Sequence[Branch]) -> int:
    """Count the images, or crops of images, that the vision tower processes for some branches."""
    # Branches that show the same images hold the same mapping object.
    distinct: dict[int, Mapping[str, Tensor]] = {}
    for branch in branches:
        if "pixel_values" in branch.image_inputs:
            distinct[id(branch.image_inputs)] = branch.image_inputs
    return sum(map(_num_crops, distinct.values()))


def _num_crops(image_inputs: Mapping[str, Tensor]) -> int:
    """Count the images, or crops of images, in the tensors of one sequence."""
    # Where the patches of all images are joined in one dimension, the grids still have one row per image.
    rows = image_inputs.get("image_grid_thw", image_inputs["pixel_values"])
    if rows.ndim <= 3:
        return len(rows)
    # Everywhere else the last three dimensions are one image: its colors, height and width.
    return math.prod(rows.shape[:-3])


def collate_vision(image_inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the image tensors of several sequences, padding all dimensions but the first with zeros."""
    tensors_by_name: dict[str, list[Tensor]] = {}
    for inputs in image_inputs:
        for name, tensor in inputs.items():
            tensors_by_name.setdefault(name, []).append(tensor)
    # Sorted, so that the order of the inputs does not depend on which sequence comes first.
    return {name: _cat_padded(tensors_by_name[name]) for name in sorted(tensors_by_name)}


def _cat_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors along the first dimension, all others padded to the largest of them."""
    shapes = [tensor.shape[1:] for tensor in tensors]
    largest = list(map(max, zip(*shapes, strict=True)))
    return torch.cat([_pad_end(tensor, largest) for tensor in tensors])


def _pad_end(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Pad all dimensions but the first with zeros at the end, to a shape."""
    # `pad` takes two amounts for each dimension, before it and behind it, from the last dimension to the first.
    amounts: list[int] = []
    for size, padded_size in zip(reversed(tensor.shape[1:]), reversed(shape), strict=True):
        amounts += (0, padded_size - size)
    return F.pad(tensor, amounts)
