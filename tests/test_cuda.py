"""What is particular to a GPU: FlexAttention's kernels, compiled layers, 16 bits, NCCL, its memory.

Skipped where there is none; `pytest tests/test_cuda.py tests/attention/test_devices.py` runs it on a machine with one:
the second holds each kernel of attention to float64.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cafe.data.batch import NO_LIMIT, Batch, MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.lvlm.adapters import LoraSettings
from cafe.lvlm.forward import set_kernel
from cafe.lvlm.processing import with_fast_images
from cafe.lvlm.vision_cache import VisionCache
from cafe.model import Cafe
from cafe.scenes.draw import paint
from cafe.scenes.world import draw_scene
from cafe.training import loop
from cafe.training.compile import allow_repeated_backward, compile_layers
from cafe.training.fsdp import apply_fsdp
from cafe.training.gradients import unscale
from cafe.training.loop import train
from cafe.training.precision import AUTOCAST_DTYPES
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep, Losses

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.usefixtures("compilable"),
]

PAIRS = 8
CUT = MicroBatchSize(tokens=700)
IMAGE = paint(draw_scene(0, "test", 0))


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Products of float32 matrices are of float32, and nothing that was compiled before is used."""
    torch.set_float32_matmul_precision("highest")  # FlexAttention's kernel goes by it too
    torch.compiler.reset()
    allow_repeated_backward()  # of FlexAttention, for the norm of each loss's gradient
    yield


def batches(
    model: Cafe, scenes: Path, size: MicroBatchSize = NO_LIMIT, precision: str = "fp32", device: str | None = None
) -> ContrastiveBatchDataset:
    """Batches as training makes them, images as bytes, laid out for where and in what a model computes."""
    chat_processor, normalization = with_fast_images(model.chat_processor)
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    place = torch.device(device) if device else model.lvlm.device
    packing = set_kernel(model.packing, model.lvlm, place, AUTOCAST_DTYPES.get(precision, model.lvlm.dtype))
    packing = replace(packing, normalization=normalization)
    return ContrastiveBatchDataset([source], chat_processor, PAIRS, seed=0, packing=packing, micro_batch_size=size)


def followed(model: Cafe, batch: Batch, precision: str = "fp32", **options) -> tuple[Losses, torch.Tensor]:
    """The losses of a step and its gradient."""
    step = JointStep(model.lvlm, ObjectiveConfig(), precision).to(model.lvlm.device)
    step.zero_grad()
    losses = step.forward_backward(batch, **options)
    return losses, gradient(model)


def gradient(model: Cafe) -> torch.Tensor:
    weights = model.lvlm.parameters()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double().cpu() for p in weights])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture(scope="module")
def on_cpu(random_base, scenes) -> tuple[Losses, torch.Tensor]:
    """A step on the CPU, in float32."""
    model = Cafe.load(random_base, dtype=torch.float32, device="cpu")
    return followed(model, batches(model, scenes)[0])


@pytest.mark.parametrize("size", [NO_LIMIT, CUT], ids=["one pass", "cached"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_the_gradient_equals_the_cpus(random_base, scenes, on_cpu, attention, compiled, size):
    model = Cafe.load(random_base, dtype=torch.float32, attention=attention)
    if compiled:
        compile_layers(model.lvlm)
    batch = batches(model, scenes, size)[0].pin_memory()
    losses, grad = followed(model, batch, log_grad_norms=True)
    assert losses.lm.item() == pytest.approx(on_cpu[0].lm.item(), rel=1e-4)
    assert losses.contrastive.item() == pytest.approx(on_cpu[0].contrastive.item(), rel=1e-3)
    assert apart(grad, on_cpu[1]) <= 1e-5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize(("precision", "close"), [("bf16", 0.1), ("fp16", 0.02)])
def test_half_precision_gradients_are_close(random_base, scenes, on_cpu, precision, close, attention, compiled):
    model = Cafe.load(random_base, dtype=torch.float32, attention=attention)
    if compiled:
        compile_layers(model.lvlm)
    data = batches(model, scenes, CUT, precision)
    assert data.packing.kernel == ("flex" if attention == "flex_attention" else "paths")
    losses, grad = followed(model, data[0], precision, loss_scale=2.0**12)
    assert losses.lm.item() == pytest.approx(on_cpu[0].lm.item(), rel=close / 10)
    assert losses.contrastive.item() == pytest.approx(on_cpu[0].contrastive.item(), rel=close / 2)
    assert apart(grad / 2.0**12, on_cpu[1]) <= close


def test_flex_attention_compiles_nothing_once_it_is_warm(random_base, scenes):
    model = Cafe.load(random_base, dtype=torch.float32, attention="flex_attention")
    step = JointStep(model.lvlm, ObjectiveConfig(), "bf16").to("cuda")
    data = batches(model, scenes, CUT, "bf16")
    for number in range(len(data)):
        step.forward_backward(data[number])
    with torch.compiler.set_stance("fail_on_recompile"):
        for number in range(len(data), 2 * len(data)):  # the next epoch
            step.forward_backward(data[number])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_sharded_step_is_the_whole_one(random_base, scenes, on_cpu, precision, tmp_path):
    """One process of NCCL's: layers are gathered, in 16 bits too, and gradients scattered, all the same."""
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = Cafe.load(random_base, dtype=torch.float32, device="cpu")
        step = JointStep(model.lvlm, ObjectiveConfig(), precision)
        apply_fsdp(step.packed_forward, torch.device("cuda"), step.packed_forward.dtype)
        step.to("cuda")
        batch = batches(model, scenes, CUT, precision, "cuda")[0]
        losses = step.forward_backward(batch, log_grad_norms=True, loss_scale=2.0**12)
        unscale(step.parameters(), 2.0**12)
        grads = [p.grad.full_tensor().flatten().double().cpu() for p in model.lvlm.parameters() if p.grad is not None]
    finally:
        dist.destroy_process_group()
    assert losses.lm.item() == pytest.approx(on_cpu[0].lm.item(), rel=1e-4 if precision == "fp32" else 1e-2)
    assert torch.cat(grads).norm().item() == pytest.approx(
        on_cpu[1].norm().item(), rel=1e-3 if precision == "fp32" else 0.1
    )


def test_a_frozen_tower_encodes_images_once(random_base, scenes):
    model = Cafe.load(random_base, dtype=torch.float32)
    tower = model.lvlm.model.vision_tower.requires_grad_(False)
    batch = batches(model, scenes, CUT)[0]
    calls = []
    layers = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))
    layers[0].register_forward_hook(lambda module, args, made: calls.append(1))
    _, plain = followed(model, batch)
    step = JointStep(model.lvlm, ObjectiveConfig(), vision=VisionCache(tower, model.lvlm.config)).to("cuda")
    model.lvlm.zero_grad()
    before = len(calls)
    step.forward_backward(batch)
    assert len(calls) - before == len(batch.micro_batches)
    assert apart(gradient(model), plain) <= 1e-5


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_model_embeds_and_generates_in_half_precision(random_base, dtype):
    gpu, cpu = Cafe.load(random_base, dtype=dtype), Cafe.load(random_base, device="cpu")
    assert gpu.lvlm.dtype == (dtype or torch.bfloat16) and gpu.lvlm.device.type == "cuda"
    contents = ["a red circle", IMAGE, {"image": IMAGE, "text": "what is it?"}]
    assert (gpu.embed(contents) * cpu.embed(contents)).sum(1).min() > 0.99
    vectors, answers = gpu.embed_and_generate_batch([IMAGE, IMAGE], max_new_tokens=4)
    assert len(answers) == 2 and answers[0] == answers[1]
    alone, answer = gpu.embed_and_generate(IMAGE, "What is it?", max_new_tokens=4)
    assert isinstance(answer, str) and (vectors[0] * alone).sum() > 0.99
    assert gpu.score([IMAGE, "What is it?"], "a circle") == pytest.approx(
        cpu.score([IMAGE, "What is it?"], "a circle"), rel=0.05
    )


@pytest.mark.parametrize(("precision", "attention"), [("bf16", "sdpa"), ("bf16", "flex_attention"), ("fp16", "sdpa")])
def test_training_from_files_with_workers_and_automatic_micro_batches(recipe, precision, attention):
    recipe = replace(
        recipe,
        model=replace(recipe.model, precision=precision, attention=attention),
        data=replace(recipe.data, num_workers=2),
        micro_batch="auto",
        memory=4.0,
    )
    checkpoint = train(recipe)
    log = [json.loads(line) for line in (Path(recipe.output) / "log.jsonl").read_text().splitlines()]
    assert log[-1]["lm_loss"] < log[0]["lm_loss"]
    assert Cafe.load(checkpoint).embed(["a"]).shape[0] == 1


@pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
def test_adapter_trains_beside_4bit_weights_with_paged_8bit_optimizer(recipe):
    recipe = replace(
        recipe,
        model=replace(recipe.model, precision="bf16", frozen_weights_dtype="4bit", adapter=LoraSettings(rank=8)),
        optimizer=replace(recipe.optimizer, name="paged_adamw_8bit", vision_tower_learning_rate=None),
        max_steps=6,
    )
    checkpoint = train(recipe)
    log = [json.loads(line) for line in (Path(recipe.output) / "log.jsonl").read_text().splitlines()]
    assert log[-1]["lm_loss"] < log[0]["lm_loss"]
    assert Cafe.load(checkpoint, four_bit=True).embed(["a"]).shape[0] == 1


def test_oom_halves_the_micro_batch(recipe, capsys):
    """Of 24 pairs in one micro-batch, under a limit that a few of them fit."""
    recipe = replace(recipe, batch_size=24, max_steps=2)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(replace(recipe, output=recipe.output + "-whole"))
    taken = torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 0.7 * taken
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        train(recipe)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Memory ran out at step 1" in capsys.readouterr().out
    logs = [
        (Path(output) / "log.jsonl").read_text().splitlines() for output in (recipe.output, recipe.output + "-whole")
    ]
    for one, other in zip(*logs, strict=True):
        assert json.loads(one)["lm_loss"] == pytest.approx(json.loads(other)["lm_loss"], rel=1e-3)


def test_resume_continues_with_the_same_command(recipe, monkeypatch):
    """Broken off at its third step, it ends as a whole run, but for kernels that add in an order of their own."""
    recipe = replace(recipe, save_steps=2)
    whole = train(replace(recipe, output=recipe.output + "-whole"))
    clip, left = loop.clip_grad_norm_, [True, True]
    monkeypatch.setattr(loop, "clip_grad_norm_", lambda *args: left.pop() and clip(*args))
    with pytest.raises(IndexError):
        train(recipe)
    monkeypatch.undo()
    again = train(recipe)
    weights = [Cafe.load(place, device="cpu", dtype=torch.float32).lvlm.state_dict() for place in (whole, again)]
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0]) <= 1e-3
