"""`cafe_tree` in the language models of all families: every kernel, gradient checkpointing, compilation, generation."""

import pytest
import torch
from model_samples import make
from torch._dynamo.utils import counters
from tree_samples import SHARING, checked_kernel, gradient_of, make_pack

import cafe.attention.paths
from cafe.attention.registration import CAFE_TREE
from cafe.training.optimizer import enable_gradient_checkpointing


def assert_close(results, expected):
    # Some families have norms in float32.
    for actual, other in zip(results, expected, strict=True):
        assert (actual - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", SHARING)
def test_every_kernel_gives_the_gradient_of_the_dense_mask(family, checkpointing, monkeypatch):
    model = make(family)
    model.lvlm.double().train()
    assert model.lvlm.config.get_text_config()._attn_implementation == CAFE_TREE
    if checkpointing:
        enable_gradient_checkpointing(model.lvlm)
    expected = gradient_of(model, make_pack(model, "mask", "what is it?", "why?"))
    monkeypatch.setattr(cafe.attention.paths, "causal_attention", checked_kernel)
    for kernel in ("blocks", "paths"):
        packed = make_pack(model, kernel, "what is it?", "why?")
        assert packed.tree.kernel == kernel
        assert_close(gradient_of(model, packed), expected)


@pytest.mark.parametrize("kernel", ["blocks", "paths", "mask"])
@pytest.mark.parametrize("family", SHARING)
def test_a_compiled_layer_is_one_graph_for_packs_of_different_trees(family, kernel, monkeypatch, compilable):
    monkeypatch.setattr(cafe.attention.paths, "causal_attention", checked_kernel)
    model = make(family)
    model.lvlm.double().train()
    texts = [["what is it?", "why?"], ["is it?", "who?", "what is it called?"], ["where?", "a longer one?"], ["one"]]
    packs = [make_pack(model, kernel, *each) for each in texts]
    assert len({packed.tree.subtree_end.shape[1] for packed in packs}) > 1
    expected = [gradient_of(model, packed) for packed in packs]

    # The backward pass is traced too in one of the families, which takes most of the time.
    backend = "aot_eager" if family == "llava_onevision" else "eager"
    torch.compiler.reset()
    counters.clear()
    layer = model.lvlm.get_decoder().layers[0]
    layer.forward = torch.compile(layer.forward, dynamic=True, fullgraph=True, backend=backend)
    for packed, other in zip(packs, expected, strict=True):
        assert_close(gradient_of(model, packed), other)
    assert counters["stats"]["unique_graphs"] == 1
