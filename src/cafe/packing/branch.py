"""One token sequence that the model reads, and how its tokens are numbered."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

PositionIdsFn = Callable[["Branch"], Int64[Tensor, "axes tokens"]]
TokenTypeFn = Callable[["Branch"], Int64[Tensor, " tokens"]]


@dataclass(frozen=True, eq=False)
class Branch:
    """One token sequence the model must read, and the pictures it shows.

    Attributes:
        input_ids: the tokens, image tokens included.
        loss_mask: which tokens the language loss is taken on.
        image_mask: which tokens stand for pictures.
        image_inputs: the image processor's tensors by name; empty without images. Branches that show the same pictures
            share the same mapping: pictures are compared by identity.
    """

    input_ids: Int64[Tensor, " tokens"]
    loss_mask: Bool[Tensor, " tokens"]
    image_mask: Bool[Tensor, " tokens"]
    image_inputs: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    def truncate(self, length: int) -> "Branch":
        """The first tokens; all pictures must be among them."""
        return Branch(self.input_ids[:length], self.loss_mask[:length], self.image_mask[:length], self.image_inputs)


def default_position_ids(branch: Branch) -> Int64[Tensor, "1 tokens"]:
    """Position ids of a plain family: 0, 1, 2, ..."""
    return torch.arange(len(branch))[None]


def image_token_type_ids(branch: Branch) -> Int64[Tensor, " tokens"]:
    """1 where a token is replaced by a picture's features, 0 elsewhere."""
    return branch.image_mask.long()


def prefix_lm_token_type_ids(branch: Branch) -> Int64[Tensor, " tokens"]:
    """0 in the prompt, which prefix-LMs read both ways, 1 from the first supervised token on."""
    return (branch.loss_mask.cumsum(0) > 0).long()
