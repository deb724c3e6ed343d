"""Packs through a tiny random model of a real family."""

import pytest
import torch

from cafe.attention.masks import tree_mask
from cafe.attention.tree import attention_mask
from cafe.content import Content
from cafe.lvlm.forward import forward_packed
from cafe.model import Cafe
from cafe.packing import pack
from cafe.scenes.draw import paint
from cafe.scenes.world import draw_scene


def test_flex_attention_reads_trees_as_sdpa_does(random_base):
    """All in one row, filled up to a few lengths; without the compiler, which is not what is tested."""
    image = paint(draw_scene(0, "test", 0))
    found = []
    for attention in ("sdpa", "flex_attention"):
        model = Cafe.load(random_base, dtype=torch.float64, attention=attention)
        assert model.lvlm.config.vision_config._attn_implementation == "sdpa"
        content = Content.of([image, "a red circle"])
        branches = [model.encode_embedding(content), model.encode_prompt(content)]
        done = pack([branches, [model.encode_embedding(Content.of("a blue star"))]], [[], []], model.packing)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found.append(forward_packed(model.lvlm, done)[0])
    assert done.inputs["input_ids"].shape == (1, 512)
    torch.testing.assert_close(found[0], found[1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("columns", [5, 8, 9])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_has_numbers_in_rows_aligned_for_a_gpu(random_base, columns, attention):
    text = Cafe.load(random_base, attention=attention).lvlm.config.get_text_config()
    end = torch.tensor([[columns, 3, 3, *[columns] * (columns - 3)], list(range(1, columns + 1))])
    mask = attention_mask(end, text, torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and mask.stride(-1) == 1
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])  # as PyTorch's `preprocess_mask` wants them
    assert torch.equal(mask == 0, tree_mask(end)) and mask[mask != 0].unique().tolist() == [
        float("-inf") if attention == "sdpa" else torch.finfo(torch.bfloat16).min
    ]
