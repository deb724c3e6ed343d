"""Branches over a small alphabet."""

import torch
from hypothesis import strategies as st

from cafe.packing import Branch

IMAGE = 99


def branch(ids: list[int], image_inputs: dict[str, torch.Tensor] | None = None, num_supervised: int = 0) -> Branch:
    """Make a branch whose last `num_supervised` tokens are supervised and whose tokens 99 are image tokens."""
    tokens = torch.tensor(ids)
    loss_mask = torch.arange(len(ids)) >= len(ids) - num_supervised
    return Branch(tokens, loss_mask, tokens == IMAGE, image_inputs or {})


def random_image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(1, 3, 4, 4)}


words = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@st.composite
def examples(draw: st.DrawFn) -> list[list[Branch]]:
    """Draw groups of branches over a small alphabet, some with an image of the group, so that many share prefixes."""
    groups = []
    for _ in range(draw(st.integers(1, 5))):
        images = [random_image(), random_image()]
        group = []
        for _ in range(draw(st.integers(1, 4))):
            before, after = draw(words), draw(words)
            which = draw(st.integers(0, 2))
            image_tokens = [IMAGE] * 3 if which else []
            group.append(branch(before + image_tokens + after, images[which - 1] if which else None))
        groups.append(group)
    return groups
