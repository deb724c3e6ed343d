"""The training loop on real scenes and a tiny random model: it learns, logs, is reproducible, and rejects mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from cafe.checkpoint import resolve_checkpoint
from cafe.cli.main import main
from cafe.data.batch import MicroBatchSize
from cafe.data.source import Source
from cafe.errors import CafeError
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe
from cafe.training import loop
from cafe.training.loop import train
from cafe.training.optimizer import cosine_schedule_with_warmup, make_optimizer
from cafe.training.recipe import DataConfig, EvaluationConfig, ObjectiveConfig, OptimizerConfig
from cafe.training.step import JointStep


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    """accelerate keeps the first run's precision for the life of the process."""
    AcceleratorState._reset_state(True)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def test_train_lowers_the_loss_logs_it_and_is_reproducible(recipe, tmp_path):
    first = train(recipe, report=lambda line: None)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    assert log[-1]["lm_loss"] < log[0]["lm_loss"]
    for name in ("grad_norm_lm", "grad_norm_contrastive", "accuracy", "temperature", "lr", "grad_norm"):
        assert name in log[0]
    second = train(replace(recipe, output=str(tmp_path / "again")), report=lambda line: None)
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert Cafe.load(first).metadata["recipe"]["batch_size"] == 8


def test_results_of_the_base_model_are_not_inherited(recipe, random_base, tmp_path):
    Cafe.load(random_base).save(tmp_path / "base", results={"vqa/all": 50.0})
    further = replace(recipe, max_steps=1, model=replace(recipe.model, base=str(tmp_path / "base")))
    assert "results" not in Cafe.load(train(further, report=lambda line: None)).metadata


def test_logging_steps_0_logs_the_first_and_last_step(recipe, tmp_path):
    train(replace(recipe, max_steps=3, logging_steps=0), report=lambda line: None)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 3]


def test_each_part_has_its_own_learning_rate(recipe, random_base):
    model = Cafe.load(random_base, Prompts(), torch.float32)
    rates = OptimizerConfig(learning_rate=1e-3, vision_tower_learning_rate=1e-4, projector_learning_rate=1e-5)
    optimizer = make_optimizer(JointStep(model.lvlm, ObjectiveConfig()), "llava_onevision", rates)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    inner = model.lvlm.model
    assert {rate_of[id(p)] for p in inner.vision_tower.parameters()} == {1e-4}
    assert {rate_of[id(p)] for p in inner.multi_modal_projector.parameters()} == {1e-5}
    assert rate_of[id(inner.image_newline)] == 1e-5
    assert {rate_of[id(p)] for p in inner.language_model.parameters()} == {1e-3}


def test_learned_temperature_moves(recipe):
    checkpoint = train(replace(recipe, objective=ObjectiveConfig(learn_temperature=True)), report=lambda line: None)
    assert Cafe.load(checkpoint).metadata["temperature"] != pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradient_checkpointing_with_micro_batches_runs_and_warns(recipe, precision):
    half = replace(
        recipe,
        model=replace(recipe.model, precision=precision, gradient_checkpointing=True),
        optimizer=replace(recipe.optimizer, gradient_accumulation_steps=2),
        micro_batch=MicroBatchSize(tokens=400),
        max_steps=2,
    )
    lines: list[str] = []
    assert (train(half, report=lines.append) / "cafe.json").is_file()
    assert [line.split()[0] for line in lines] == ["Training", "Warning:", "The"]
    assert "model.gradient_checkpointing and micro_batch" in lines[1]
    whole = replace(half, output=half.output + "-whole", micro_batch=MicroBatchSize())
    train(whole, report=lines.append)
    assert [line.split()[0] for line in lines[3:]] == ["Training", "The"]


def test_a_run_is_not_resumed_on_other_data(recipe, scenes, tmp_path, monkeypatch):
    rows = json.loads((scenes / "llava_train.json").read_text())
    source = Source(path=str(tmp_path / "a.json"), images=str(scenes))
    recipe = replace(recipe, save_steps=1, max_steps=2, data=replace(recipe.data, sources=(source,)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "export_checkpoint", raise_interrupt)
        train(recipe, report=lambda line: None)
    (tmp_path / "a.json").write_text(json.dumps(rows[:-8]))
    with pytest.raises(CafeError, match=r"a\.json had 48 records and has 40"):
        train(recipe, report=lambda line: None)
    lines: list[str] = []
    train(replace(recipe, data=replace(recipe.data, allow_changes=True)), report=lines.append)
    assert "Resuming from step 2." in lines


def raise_interrupt(run):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("max_length", "words"), [(None, ""), (90, " and 12 cut to model.max_length")])
def test_the_last_line_counts_records_that_were_cut(recipe, scenes, tmp_path, max_length, words):
    rows = json.loads((scenes / "llava_train.json").read_text())[:16]
    for row in rows[:12]:
        row["conversations"][1]["value"] *= 20
    (tmp_path / "long.json").write_text(json.dumps(rows))
    source = Source(path=str(tmp_path / "long.json"), images=str(scenes))
    model = replace(recipe.model, max_length=max_length or recipe.model.max_length)
    lines: list[str] = []
    data = replace(recipe.data, sources=(source,))
    train(replace(recipe, model=model, data=data, max_steps=2), report=lines.append)
    assert lines[-1].endswith(f"; 0 of 16 records were bad{words}.")


def test_schedule_warms_up_and_falls_to_zero():
    factor = cosine_schedule_with_warmup(100, 0.1)
    assert factor(0) == pytest.approx(0.1) and factor(9) == 1.0
    assert factor(55) == pytest.approx(0.5) and factor(100) == 0.0


def test_missing_files_are_named_before_a_model_is_loaded(recipe, tmp_path):
    model = replace(recipe.model, base=str(tmp_path))  # no model is there
    with pytest.raises(CafeError, match=r"no\.json does not exist"):
        train(replace(recipe, model=model, data=DataConfig(sources=(Source(path="no.json"),))))


def test_flex_attention_on_a_cpu_is_rejected(recipe):
    with pytest.raises(CafeError, match="flex_attention has no backward pass on a CPU"):
        train(replace(recipe, model=replace(recipe.model, attention="flex_attention")))


def test_evaluation_data_without_an_evaluator_is_rejected(recipe, scenes):
    with pytest.raises(CafeError, match=r"nothing measures evaluation\.data"):
        train(replace(recipe, evaluation=EvaluationConfig(data=str(scenes), eval_steps=1)))


def test_base_is_a_run_a_directory_or_a_hub_id(random_base, tmp_path, monkeypatch):
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    assert resolve_checkpoint(str(tmp_path / "run")) == str(tmp_path / "run" / "checkpoint")
    assert (resolve_checkpoint(str(random_base)), resolve_checkpoint("owner/name")) == (str(random_base), "owner/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_checkpoint("~/run/checkpoint") == str(tmp_path / "run" / "checkpoint")
    for missing in ("/no", "./no", "../no", "~/no", "runs/no/checkpoint"):
        with pytest.raises(CafeError, match=f"directory {missing} does not exist"):
            resolve_checkpoint(missing)


def test_command_line_mistake_is_one_line_on_stderr(tmp_path, capsys):
    assert main(["train", str(tmp_path / "no.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no.yaml does not exist" in error


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_training_learns_where_the_caller_switched_gradients_off(recipe, random_base, mode):
    """As a notebook does for inference, and leaves it so."""
    try:
        with mode():
            assert not torch.is_grad_enabled()
            checkpoint = train(replace(recipe, max_steps=2), report=lambda line: None)
            assert not torch.is_grad_enabled()  # the caller's setting is left as it was
    finally:
        torch.set_grad_enabled(True)
    base, trained = load_file(random_base / "model.safetensors"), weights(checkpoint)
    assert sum(not torch.equal(trained[name], base[name]) for name in base) > 0.9 * len(base)
