"""Float16's arithmetic: the scale of the loss keeps small gradients, gives way to large ones, and is gone on with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import PreTrainedModel

from cafe.data.dataset import ContrastiveBatchDataset, MicroBatchSize
from cafe.data.records import Source, open_source
from cafe.lvlm.adapters import LoraSettings
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe
from cafe.packing import PackedBatch
from cafe.training import loop
from cafe.training.loop import train
from cafe.training.loss_scale import FLOAT16, LossScale, unscale
from cafe.training.recipe import ObjectiveConfig, Recipe
from cafe.training.step import JointStep, Losses

SMALL = 1e-6  # weight of a loss whose gradient float16 does not hold
QUICK = LossScale(factor=2.0**19, growth_interval=1)  # doubles after each step, so that it overflows soon


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    AcceleratorState._reset_state(True)


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    return replace(recipe, model=replace(recipe.model, precision="fp16"), batch_size=4, max_steps=6)


def followed(random_base: Path, scenes: Path, precision: str, scale: float) -> tuple[Losses, torch.Tensor, float]:
    """A cached step's losses and its gradient: of the weights, and of the temperature."""
    model = Cafe.load(random_base, Prompts(), torch.float32)
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    batch = ContrastiveBatchDataset(
        [source], model.chat_processor, 6, seed=0, micro_batch_size=MicroBatchSize(tokens=700)
    )[0]
    objective = ObjectiveConfig(lm_weight=SMALL, contrastive_weight=SMALL, learn_temperature=True)
    step = JointStep(model.lvlm, objective, precision)
    losses = step(batch, measure=True, scale=scale)
    unscale(step.parameters(), scale)
    grads = [parameter.grad.flatten() for parameter in model.lvlm.parameters() if parameter.grad is not None]
    return losses, torch.cat(grads), step.log_temperature.grad.item()


def test_a_small_gradient_in_float16_is_float32s_with_the_scale_and_lost_without(random_base, scenes):
    losses, expected, temperature = followed(random_base, scenes, "fp32", 1.0)
    found, scaled, its_temperature = followed(random_base, scenes, "fp16", FLOAT16.factor)
    _, lost, _ = followed(random_base, scenes, "fp16", 1.0)
    assert (scaled - expected).norm() < 0.02 * expected.norm()
    assert (lost - expected).norm() > 0.9 * expected.norm()
    assert its_temperature == pytest.approx(temperature, rel=0.02)
    assert found.lm.item() == pytest.approx(losses.lm.item(), rel=1e-3)
    assert found.contrastive.item() == pytest.approx(losses.contrastive.item(), rel=1e-2)
    for name in ("grad_norm_lm", "grad_norm_contrastive"):
        assert found.metrics[name] == pytest.approx(losses.metrics[name], rel=0.02)


def test_a_scale_in_float32_changes_no_bit(random_base, scenes):
    (one, grad, temperature), (other, scaled, its_temperature) = (
        followed(random_base, scenes, "fp32", scale) for scale in (1.0, 2.0**16)
    )
    assert torch.equal(grad, scaled) and temperature == its_temperature and one.metrics == other.metrics


def test_a_scale_halves_at_once_and_doubles_after_many_steps():
    scale = LossScale(factor=8.0, growth_interval=3).update().backoff()
    assert (scale.factor, scale.good_steps) == (4.0, 0)
    factors = []
    for _ in range(6):
        scale = scale.update()
        factors.append(scale.factor)
    assert factors == [4.0, 4.0, 8.0, 8.0, 8.0, 16.0]
    assert LossScale().update().factor == 1.0


def trained(recipe: Recipe, name: str, scale: LossScale, patch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """The output of a run that begins with a scale, and what it said of overflows."""
    said: list[str] = []
    patch.setattr(loop, "FLOAT16", scale)
    output = Path(recipe.output).with_name(name)
    train(replace(recipe, output=str(output)), report=said.append)
    return output, [line for line in said if line.startswith("The gradient overflows")]


def same(one: Path, other: Path) -> bool:
    files = [next((place / "checkpoint").glob("*model.safetensors")) for place in (one, other)]
    return files[0].read_bytes() == files[1].read_bytes()


def log_of(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_step_that_overflows_is_taken_again_as_if_it_never_had_been(recipe, monkeypatch):
    """With dropout, so that random numbers matter."""
    recipe = replace(
        recipe, model=replace(recipe.model, adapter=LoraSettings(rank=4, dropout=0.1)), max_steps=3, max_nonfinite_steps=1
    )
    many, said = trained(recipe, "many", LossScale(factor=2.0**28), monkeypatch)
    assert said[0] == f"The gradient overflows at step 1: again with the loss scaled by {2**27}."
    factor = float(said[-1].split()[-1].rstrip("."))
    assert 1 < factor < 2.0**26
    few, none = trained(recipe, "few", LossScale(factor=factor), monkeypatch)
    assert not none and same(many, few)
    assert [line["step"] for line in log_of(many)] == [1, 2, 3] and all("loss" in line for line in log_of(many))


def test_a_gradient_that_no_scale_makes_finite_is_counted_and_leaves_the_scale_as_it_was(recipe, monkeypatch):
    class Breaks:
        """A model whose gradient is not a number in its second batch."""

        batches = 0

        def __call__(self, lvlm: PreTrainedModel, pack: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
            readouts, predictors = forward_packed(lvlm, pack)
            if torch.is_grad_enabled() and self.batches == 1:
                predictors.register_hook(lambda grad: grad * torch.nan)
            return readouts, predictors

    breaks = Breaks()
    monkeypatch.setattr("cafe.training.step.forward_packed", breaks)
    leave_out, make = loop.skip_nonfinite_step, loop.BatchFeed.__next__
    positions = []

    def watched(at: loop.TrainerState, *rest: object) -> None:
        positions.append(replace(at))
        leave_out(at, *rest)

    def fed(feed: loop.BatchFeed) -> list[object]:
        breaks.batches = feed.step
        return make(feed)

    monkeypatch.setattr(loop, "skip_nonfinite_step", watched)
    monkeypatch.setattr(loop.BatchFeed, "__next__", fed)
    output, said = trained(recipe, "run", LossScale(factor=4.0, growth_interval=100), monkeypatch)
    assert [line.split()[-1] for line in said] == ["2.", "1."]
    assert [at.loss_scale for at in positions] == [LossScale(factor=4.0, growth_interval=100, good_steps=1)]
    log = log_of(output)
    assert log[1]["skipped"] == 1 and len(log) == 6 and all("loss" in line for line in (log[0], *log[2:]))
    assert all(weight.isfinite().all() for weight in load_file(output / "checkpoint/model.safetensors").values())


def test_a_run_that_broke_off_goes_on_with_its_scale(recipe, monkeypatch):
    recipe = replace(recipe, save_steps=2, max_steps=4)
    whole, said = trained(recipe, "whole", QUICK, monkeypatch)
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
    assert later and later == [line for line in said if int(line.split("step ")[1].split(":")[0]) > 2]
    assert same(whole, broken)
