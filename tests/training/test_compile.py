"""Compiled layers give the gradient of uncompiled ones, with the gradient cache and dropout, and compile once."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from cafe.attention.registration import CAFE_TREE, CAFE_TREE_FLEX
from cafe.data.batch import MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.lvlm.forward import FLEX_MULTIPLE, set_kernel
from cafe.model import Cafe
from cafe.training.compile import compile_layers
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep


def test_compiled_layers_give_the_same_losses_and_gradient(random_base, scenes, compilable):
    model = Cafe.load(random_base)
    for layer in model.lvlm.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.2
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    batches = ContrastiveBatchDataset(
        [source], model.chat_processor, 6, 0, packing=model.packing, micro_batch_size=MicroBatchSize(tokens=250)
    )
    step = JointStep(model.lvlm.train(), ObjectiveConfig())

    def run_step(number):
        torch.manual_seed(number)
        model.lvlm.zero_grad()
        losses = step.forward_backward(batches[number], log_grad_norms=number == 1)
        gradient = torch.cat([p.grad.flatten() for p in model.lvlm.parameters() if p.grad is not None])
        return losses.lm.item(), losses.contrastive.item(), gradient

    assert len(batches[0].micro_batches) > 1
    expected = [run_step(number) for number in range(2)]
    compile_layers(model.lvlm)
    compiled = ["forward" in vars(layer) for layer in model.lvlm.model.language_model.layers]
    assert all(compiled[:-1]) and not compiled[-1]
    for number, (lm, contrastive, gradient) in enumerate(expected):
        result = run_step(number)
        assert result[:2] == pytest.approx((lm, contrastive), rel=1e-5)
        assert (result[2] - gradient).norm() <= 1e-5 * gradient.norm()


def test_blockwise_rows_are_compiled_once(random_base, scenes, monkeypatch, compilable):
    eager = partial(torch.compile, backend="eager")  # traces alike, and makes no kernels
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic, options: eager(forward, dynamic=dynamic))
    torch.compiler.reset()
    counters.clear()
    model = Cafe.load(random_base)
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    batches = ContrastiveBatchDataset([source], model.chat_processor, 3, 0, packing=model.packing)
    step = JointStep(model.lvlm.train(), ObjectiveConfig())
    compile_layers(model.lvlm)
    graphs = []
    for number in range(4):  # the third has another number of paths than any before
        step.forward_backward(batches[number])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0


@pytest.mark.parametrize(
    ("implementation", "dynamic"),
    [(CAFE_TREE, True), ("eager", True), (CAFE_TREE_FLEX, None), ("flex_attention", None)],
)
def test_layers_with_flex_attention_are_compiled_for_each_length_and_get_few(
    random_base, monkeypatch, implementation, dynamic
):
    model = Cafe.load(random_base)
    model.lvlm.config.get_text_config()._attn_implementation = implementation
    asked = set()
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic, options: asked.add(dynamic) or forward)
    compile_layers(model.lvlm)
    assert asked == {dynamic}
    packing = set_kernel(model.packing, model.lvlm, torch.device("cpu"), torch.float32)
    assert packing.pad_to_multiple_of == (1 if dynamic else FLEX_MULTIPLE)
