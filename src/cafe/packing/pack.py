"""Lay out the branches of some examples as the model's inputs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from cafe.images.normalization import PackedPixels, pack_uint8
from cafe.packing.branch import Branch
from cafe.packing.rows import DEFAULT_PACKING, PackingConfig, build_layout


@dataclass(frozen=True)
class PackedBatch:
    """What goes through the model at once.

    Attributes:
        inputs: the model's inputs by name, without the attention mask of trees, which is made from `subtree_end`.
        subtree_end: see `Layout`; None where branches do not share.
        embedding_index: the (row, column) of the last token of each embedded branch, in their order.
        logits_index: the (row, column) of the tokens before each supervised token.
        labels: the supervised tokens.
        num_tokens: the tokens that are not padding.
        pixel_decoder: what makes values of `pixel_values`, where these are bytes.
    """

    inputs: dict[str, Tensor]
    subtree_end: Int64[Tensor, "rows columns"] | None
    embedding_index: Int64[Tensor, "readouts 2"]
    logits_index: Int64[Tensor, "supervised 2"]
    labels: Int64[Tensor, " supervised"]
    num_tokens: int
    pixel_decoder: PackedPixels | None = None

    def pin_memory(self) -> "PackedBatch":
        """The same in memory that a GPU copies from while it computes."""
        return replace(
            self,
            inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()},
            subtree_end=None if self.subtree_end is None else self.subtree_end.pin_memory(),
            embedding_index=self.embedding_index.pin_memory(),
            logits_index=self.logits_index.pin_memory(),
            labels=self.labels.pin_memory(),
        )


def pack(
    embedded: Sequence[Sequence[Branch]], spoken: Sequence[Sequence[Branch]], packing: PackingConfig = DEFAULT_PACKING
) -> PackedBatch:
    """Lays out the branches of some examples for the model.

    Args:
        embedded: for each example the branches whose last token is a readout.
        spoken: for each example the branches whose supervised tokens are to be predicted.
        packing: how.
    """
    groups = [[*first, *second] for first, second in zip(embedded, spoken, strict=True)]
    layout = build_layout(groups, packing)
    branches = [branch for group in groups for branch in group]
    wants = [index < len(first) for first, group in zip(embedded, groups, strict=True) for index in range(len(group))]
    readouts, predictors, labels = [], [], []
    for branch, place, embeds in zip(branches, layout.coords, wants, strict=True):
        if embeds:
            readouts.append(place[-1])
        else:
            said = branch.loss_mask.nonzero()[:, 0]
            said = said[said > 0]
            predictors.append(place[said - 1])
            labels.append(branch.input_ids[said])
    pictures, pixels = [branches[first].image_inputs for first in layout.image_order], None
    if packing.normalization:
        pictures, pixels = pack_uint8(pictures, packing.normalization)
    inputs = {"input_ids": layout.input_ids, **collate_vision(pictures)}
    if packing.share_prefixes:
        inputs["position_ids"] = layout.position_ids[0] if len(layout.position_ids) == 1 else layout.position_ids
    else:
        inputs["attention_mask"] = layout.valid.long()
        for name, types in packing.token_type_fns.items():
            inputs[name] = torch.zeros_like(layout.input_ids)
            for branch, place in zip(branches, layout.coords, strict=True):
                inputs[name][place[:, 0], place[:, 1]] = types(branch)
    nowhere = torch.empty(0, 2, dtype=torch.long)
    return PackedBatch(
        inputs,
        layout.subtree_end if packing.share_prefixes else None,
        torch.stack(readouts) if readouts else nowhere,
        torch.cat([nowhere, *predictors]),
        torch.cat([nowhere[:, 0], *labels]),
        int(layout.valid.sum()),
        pixels,
    )


def count_crops(branches: Sequence[Branch]) -> int:
    """The pictures, or parts of pictures, that the vision tower reads for some branches."""
    visions = {
        id(branch.image_inputs): branch.image_inputs for branch in branches if "pixel_values" in branch.image_inputs
    }
    return sum(_num_crops(vision) for vision in visions.values())


def _num_crops(vision: Mapping[str, Tensor]) -> int:
    rows = vision.get("image_grid_thw", vision["pixel_values"])  # patches of several pictures are joined, grids are not
    return math.prod(rows.shape[:-3]) if rows.ndim > 3 else len(rows)


def collate_vision(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Joins the vision tensors of several sequences along their first dimension, padding the others with zeros."""
    names = {name for part in parts for name in part}
    return {name: _cat_padded([part[name] for part in parts if name in part]) for name in sorted(names)}


def _cat_padded(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = [
        torch.nn.functional.pad(
            tensor,
            [
                amount
                for size, full in zip(tensor.shape[:0:-1], shape[::-1], strict=True)
                for amount in (0, full - size)
            ],
        )
        for tensor in tensors
    ]
    return torch.cat(padded)
