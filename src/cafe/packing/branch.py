"""One token sequence that the model reads, and how its tokens are numbered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

PositionIdsFn = Callable[["Branch"], Int64[Tensor, "axes tokens"]]
TokenTypeFn = Callable[["Branch"], Int64[Tensor, " tokens"]]


# Branches are compared by identity (eq=False): comparing tensors gives tensors, not a truth value.
@dataclass(frozen=True, eq=False)
class Branch:
    """Hold one token sequence and the images in it.

    Attributes:
        input_ids: the tokens, image tokens included.
        loss_mask: which tokens the language-modeling loss is computed on.
        image_mask: which tokens are image tokens.
        image_inputs: the tensors of the image processor by name; empty without images. Branches with the same images
            hold the same mapping object: images are compared by identity.
        is_truncated: whether tokens were cut off to keep within a limit.
    """

    input_ids: Int64[Tensor, " tokens"]
    loss_mask: Bool[Tensor, " tokens"]
    image_mask: Bool[Tensor, " tokens"]
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    is_truncated: bool = False

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.input_ids)

    def truncate(self, length: int) -> "Branch":
        """Keep the first `length` tokens, which must include all image tokens."""
        masks = self.loss_mask[:length], self.image_mask[:length]
        return Branch(self.input_ids[:length], *masks, self.image_inputs, is_truncated=True)

    def begin_answer(self, tokens: Sequence[int]) -> "Branch":
        """Add the first tokens of an answer to a prompt."""
        # As words that are supervised, by which prefix-LMs tell an answer from its prompt.
        is_answer = torch.ones(len(tokens), dtype=torch.bool)
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, torch.tensor(tokens, dtype=torch.long)]),
            loss_mask=torch.cat([self.loss_mask, is_answer]),
            image_mask=torch.cat([self.image_mask, ~is_answer]),
        )


def default_position_ids(branch: Branch) -> Int64[Tensor, "1 tokens"]:
    """Number the tokens 0, 1, 2, ..., as most families do."""
    return torch.arange(len(branch))[None]


def image_token_type_ids(branch: Branch) -> Int64[Tensor, " tokens"]:
    """Return 1 for image tokens, 0 elsewhere."""
    return branch.image_mask.long()


def prefix_lm_token_type_ids(branch: Branch) -> Int64[Tensor, " tokens"]:
    """Return 0 in the prompt, to which prefix-LMs attend bidirectionally, and 1 from the first supervised token on."""
    # The count of supervised tokens so far never falls back to 0, so later turns of the user are 1 as well.
    return (branch.loss_mask.cumsum(0) > 0).long()
