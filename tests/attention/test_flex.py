"""FlexAttention in the language models of all families that share prefixes, also those that transformers refuses it."""

import pytest
import torch
from model_samples import WIDE, make
from tree_samples import SHARING

import cafe.attention.flex
from cafe.attention.registration import CAFE_TREE_FLEX
from cafe.content import Content
from cafe.lvlm.forward import forward_packed
from cafe.model import Cafe
from cafe.packing import pack


@pytest.mark.parametrize("family", SHARING)
def test_flex_attention_gives_the_embeddings_of_sdpa_without_repeating_keys(family, tmp_path, monkeypatch):
    make(family).save(tmp_path / "saved")
    shapes = []
    flex_attention = cafe.attention.flex.compile_friendly_flex_attention

    def recorded(query, key, value, **kwargs):
        shapes.append((query.shape[:3], key.shape[:3], value.shape[:3]))
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(cafe.attention.flex, "compile_friendly_flex_attention", recorded)
    hidden = []
    for attention in ("sdpa", "flex_attention"):
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # the compiler is not what is tested
            model = Cafe.load(tmp_path / "saved", dtype=torch.float64, attention=attention)
            contents = [Content.of(parts) for parts in ([WIDE], [WIDE, "what is it?"], "a blue star")]
            packed = pack([[model.encode_embedding(each) for each in contents]], [[]], model.packing)
            shapes.clear()  # of the trial by which an unknown family is loaded
            hidden.append(forward_packed(model.lvlm, packed)[0])
        assert bool(shapes) == (attention == "flex_attention")
        assert model.lvlm.config.vision_config._attn_implementation == "sdpa"
    text = model.lvlm.config.get_text_config()
    assert text._attn_implementation == CAFE_TREE_FLEX and packed.tree.kernel == "flex"
    queries, keys = (1, text.num_attention_heads, 512), (1, text.num_key_value_heads, 512)
    assert keys[1] < queries[1] and shapes == [(queries, keys, keys)] * text.num_hidden_layers
    assert (hidden[1] - hidden[0]).norm() <= 1e-5 * hidden[0].norm()  # some families have norms in float32
