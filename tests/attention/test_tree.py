"""The mask of trees in the form that attention implementations take."""

import pytest
import torch

from cafe.attention.masks import tree_mask
from cafe.attention.tree import attention_mask
from cafe.model import Cafe


@pytest.mark.parametrize("columns", [5, 8, 9])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_mask_is_additive_and_aligned_so_that_a_gpu_copies_nothing(random_base, columns, attention):
    text_config = Cafe.load(random_base, attention=attention).lvlm.config.get_text_config()
    end = torch.tensor([[columns, 3, 3, *[columns] * (columns - 3)], list(range(1, columns + 1))])
    mask = attention_mask(end, text_config, torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and mask.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])  # as PyTorch's `preprocess_mask` wants them
    assert torch.equal(mask == 0, tree_mask(end))
    masked = float("-inf") if attention == "sdpa" else torch.finfo(torch.bfloat16).min
    assert mask[mask != 0].unique().tolist() == [masked]
