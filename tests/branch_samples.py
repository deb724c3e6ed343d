"""Branches over a small alphabet."""

import torch
from hypothesis import strategies as st

from cafe.packing import Branch

IMAGE = 99


def branch(ids: list[int], vision: dict[str, torch.Tensor] | None = None, spoken: int = 0) -> Branch:
    """A branch whose last `spoken` tokens are supervised and whose tokens 99 are a picture's."""
    tokens = torch.tensor(ids)
    supervised = torch.arange(len(ids)) >= len(ids) - spoken
    return Branch(tokens, supervised, tokens == IMAGE, vision or {})


def picture() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(1, 3, 4, 4)}


words = st.lists(st.integers(0, 2), min_size=1, max_size=8)


@st.composite
def examples(draw: st.DrawFn) -> list[list[Branch]]:
    """Groups of branches over a small alphabet, some with one of the group's pictures, so that prefixes abound."""
    groups = []
    for _ in range(draw(st.integers(1, 5))):
        pictures = [picture(), picture()]
        group = []
        for _ in range(draw(st.integers(1, 4))):
            before, after = draw(words), draw(words)
            which = draw(st.integers(0, 2))
            shown = [IMAGE] * 3 if which else []
            group.append(branch(before + shown + after, pictures[which - 1] if which else None))
        groups.append(group)
    return groups
