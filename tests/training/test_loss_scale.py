"""Training in float16: the loss scale keeps small gradients, backs off from large ones, and survives a resume."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cafe.data.batch import MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.lvlm.adapters import LoraSettings
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe
from cafe.packing import PackedBatch
from cafe.training import loop, prepare
from cafe.training.checkpointing import TrainerState
from cafe.training.gradients import unscale
from cafe.training.loop import train
from cafe.training.loss_scale import FLOAT16, LossScale
from cafe.training.micro_batching import BatchFeed
from cafe.training.recipe import ObjectiveConfig, Recipe
from cafe.training.step import JointStep, Losses

SMALL = 1e-6  # the weight of a loss whose gradient is too small for float16
QUICK = LossScale(factor=2.0**19, growth_interval=1)  # doubles after each step, so that it overflows soon


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state(True)


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    return replace(recipe, model=replace(recipe.model, precision="fp16"), batch_size=4, max_steps=6)


def compute_step(random_base: Path, scenes: Path, precision: str, scale: float) -> tuple[Losses, torch.Tensor, float]:
    """Compute a cached step's losses and its gradient: of the weights, and of the temperature."""
    model = Cafe.load(random_base, Prompts(), torch.float32)
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    batch = ContrastiveBatchDataset(
        [source], model.chat_processor, 6, seed=0, micro_batch_size=MicroBatchSize(tokens=700)
    )[0]
    objective = ObjectiveConfig(lm_weight=SMALL, contrastive_weight=SMALL, learn_temperature=True)
    step = JointStep(model.lvlm, objective, precision)
    losses = step.forward_backward(batch, log_grad_norms=True, loss_scale=scale)
    unscale(step.parameters(), scale)
    grads = [parameter.grad.flatten() for parameter in model.lvlm.parameters() if parameter.grad is not None]
    return losses, torch.cat(grads), step.log_temperature.grad.item()


def test_loss_scale_keeps_small_float16_gradients(random_base, scenes):
    losses, expected, temperature = compute_step(random_base, scenes, "fp32", 1.0)
    losses16, scaled, its_temperature = compute_step(random_base, scenes, "fp16", FLOAT16.factor)
    _, lost, _ = compute_step(random_base, scenes, "fp16", 1.0)
    assert (scaled - expected).norm() < 0.02 * expected.norm()
    assert (lost - expected).norm() > 0.9 * expected.norm()
    assert its_temperature == pytest.approx(temperature, rel=0.02)
    assert losses16.lm.item() == pytest.approx(losses.lm.item(), rel=1e-3)
    assert losses16.contrastive.item() == pytest.approx(losses.contrastive.item(), rel=1e-2)
    for name in ("grad_norm_lm", "grad_norm_contrastive"):
        assert losses16.metrics[name] == pytest.approx(losses.metrics[name], rel=0.02)


def test_loss_scale_changes_no_bit_in_float32(random_base, scenes):
    (one, grad, temperature), (other, scaled, its_temperature) = (
        compute_step(random_base, scenes, "fp32", scale) for scale in (1.0, 2.0**16)
    )
    assert torch.equal(grad, scaled) and temperature == its_temperature and one.metrics == other.metrics


def test_loss_scale_halves_at_once_and_doubles_after_many_steps():
    scale = LossScale(factor=8.0, growth_interval=3).update().backoff()
    assert (scale.factor, scale.good_steps) == (4.0, 0)
    factors = []
    for _ in range(6):
        scale = scale.update()
        factors.append(scale.factor)
    assert factors == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0]
    assert LossScale().update().factor == 1.0


def trained(recipe: Recipe, name: str, scale: LossScale, patch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """Train with an initial loss scale; return the output and the lines reported on overflows."""
    lines: list[str] = []
    patch.setattr(prepare, "FLOAT16", scale)
    output = Path(recipe.output).with_name(name)
    train(replace(recipe, output=str(output)), report=lines.append)
    return output, [line for line in lines if "gradient overflow" in line]


def same(one: Path, other: Path) -> bool:
    files = [next((output / "checkpoint").glob("*model.safetensors")) for output in (one, other)]
    return files[0].read_bytes() == files[1].read_bytes()


def log_of(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_overflowing_step_is_retried_and_leaves_no_trace(recipe, monkeypatch):
    """With dropout, so that random numbers matter."""
    recipe = replace(
        recipe,
        model=replace(recipe.model, adapter=LoraSettings(rank=4, dropout=0.1)),
        max_steps=3,
        max_nonfinite_steps=1,
    )
    many, overflows = trained(recipe, "many", LossScale(factor=2.0**28), monkeypatch)
    assert overflows[0] == f"Step 1: gradient overflow; retrying with loss scale {2**27}."
    factor = float(overflows[-1].split()[-1].rstrip("."))
    assert 1 < factor < 2.0**26
    few, none = trained(recipe, "few", LossScale(factor=factor), monkeypatch)
    assert not none and same(many, few)
    assert [line["step"] for line in log_of(many)] == [1, 2, 3] and all("loss" in line for line in log_of(many))


def test_nonfinite_gradient_at_any_scale_is_counted_and_keeps_the_loss_scale(recipe, monkeypatch):
    class Breaks:
        """Runs the model and makes its gradient NaN in the second batch."""

        batches = 0

        def __call__(self, lvlm: PreTrainedModel, pack: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
            embeddings, hidden = forward_packed(lvlm, pack)
            if torch.is_grad_enabled() and self.batches == 1:
                hidden.register_hook(lambda grad: grad * torch.nan)
            return embeddings, hidden

    breaks = Breaks()
    monkeypatch.setattr("cafe.training.step.forward_packed", breaks)
    skip, make = loop.skip_nonfinite_step, BatchFeed.__next__
    states = []

    def watched(state: TrainerState, *rest: object) -> None:
        states.append(replace(state))
        skip(state, *rest)

    def fed(feed: BatchFeed) -> list[object]:
        breaks.batches = feed.step
        return make(feed)

    monkeypatch.setattr(loop, "skip_nonfinite_step", watched)
    monkeypatch.setattr(BatchFeed, "__next__", fed)
    output, overflows = trained(recipe, "run", LossScale(factor=4.0, growth_interval=100), monkeypatch)
    assert [line.split()[-1] for line in overflows] == ["2.", "1."]
    assert [state.loss_scale for state in states] == [LossScale(factor=4.0, growth_interval=100, good_steps=1)]
    log = log_of(output)
    assert log[1]["skipped"] == 1 and len(log) == 6 and all("loss" in line for line in (log[0], *log[2:]))
    assert all(weight.isfinite().all() for weight in load_file(output / "checkpoint/model.safetensors").values())


def test_resume_keeps_the_loss_scale(recipe, monkeypatch):
    recipe = replace(recipe, save_steps=2, max_steps=4)
    whole, overflows = trained(recipe, "whole", QUICK, monkeypatch)
    clip: Callable[..., object] = loop.clip_grad_norm_

    def breaks(*args: object) -> object:
        if (whole.with_name("broken") / "state" / "step-000002").is_dir():
            raise KeyboardInterrupt
        return clip(*args)

    monkeypatch.setattr(loop, "clip_grad_norm_", breaks)
    with pytest.raises(KeyboardInterrupt):
        trained(recipe, "broken", QUICK, monkeypatch)
    monkeypatch.setattr(loop, "clip_grad_norm_", clip)
    AcceleratorState._reset_state(True)
    broken, later = trained(recipe, "broken", QUICK, monkeypatch)
    assert later and later == [line for line in overflows if int(line.split("Step ")[1].split(":")[0]) > 2]
    assert same(whole, broken)
