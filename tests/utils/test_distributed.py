"""Real processes (gloo, on the CPU) take the same steps as one process with the same global batches, sharded or not.

Those under DeepSpeed run where it is installed.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launched, run_processes
from safetensors.torch import load_file
from states import explain, remember, set_aside, states_of

import cafe.losses.contrastive
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import CafeError
from cafe.model import Cafe
from cafe.training.loop import train
from cafe.training.recipe_io import read_recipe
from cafe.training.validation import BATCH_SIZE

STEPS, GLOBAL_BATCH = 2, 8
OVERFLOW = ("objective.lm_weight=100", "objective.contrastive_weight=100")  # of float16, under the scale at first
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}


def under_zero(*values: object, stage: str) -> object:
    """Add the launcher that asks for DeepSpeed to a test's values."""
    installed = pytest.mark.skipif(not find_spec("deepspeed"), reason="DeepSpeed is not installed: see pyproject.toml")
    return pytest.param(*values, ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}, marks=installed)


def rank(recipe: Path, overrides: list[str], environment: dict[str, str], error_file: Path) -> None:
    """Run one process of a run."""
    with launched(environment, error_file):
        with error_file.with_suffix(".report").open("w") as report:
            train(
                read_recipe(recipe, overrides),
                lambda model: {"embedded": float(abs(model.embed(["a", "b"])).sum())},
                report=lambda line: print(line, file=report),
            )
        # accelerate makes them more where OMP_NUM_THREADS is not set
        assert torch.get_num_threads() == int(os.environ["OMP_NUM_THREADS"])


def short_of_memory(recipe: Path, overrides: list[str], environment: dict[str, str], error_file: Path) -> None:
    """Run one process; the second runs out of memory once, when it computes similarities for the `SHORT_AT`-th time."""
    make, turns = cafe.losses.contrastive._iter_logits, count(1)

    def runs_out(*args: Any, **options: Any) -> Iterator[Any]:
        if next(turns) == int(environment["SHORT_AT"]):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate similarities.")
        return make(*args, **options)

    if environment["RANK"] == "1":
        cafe.losses.contrastive._iter_logits = runs_out
    rank(recipe, overrides, environment, error_file)


def remembering(recipe: Path, overrides: list[str], environment: dict[str, str], error_file: Path) -> None:
    """Run one process; what it saves and loads is written beside its output."""
    remember(states_of(Path(overrides[0].removeprefix("output="))))
    rank(recipe, overrides, environment, error_file)


def with_other_weights(recipe: Path, overrides: list[str], environment: dict[str, str], error_file: Path) -> None:
    """Run one process; the second finds another number in the base model's files."""
    load = Cafe.load

    def changed(*args: Any, **options: Any) -> Cafe:
        model = load(*args, **options)
        with torch.no_grad():
            model.lvlm.get_input_embeddings().weight[5, 3] += 1e-4
        return model

    if environment["RANK"] == "1":
        Cafe.load = changed
    rank(recipe, overrides, environment, error_file)


def run(
    recipe: Path,
    output: Path,
    world: int,
    *overrides: str,
    killed_at: Path | None = None,
    each: Callable[..., None] = rank,
    **environment: str,
) -> str:
    """Train in `world` processes, with the same global batch size; return the error of the first to fail.

    All are killed as soon as there is something at `killed_at`. `each` is what a process does.
    """
    own = [f"output={output}", f"batch_size={GLOBAL_BATCH // world}", *overrides]
    error_files = [output.with_name(f"{output.name}-{number}.txt") for number in range(world)]
    return run_processes(each, (recipe, own), environment, error_files, killed_at)


@pytest.fixture(scope="module")
def recipe(random_base, scenes, tmp_path_factory):
    """Two steps on sixteen records: of two processes the first has no image at first, and the second none at last.

    One record is bad and one has no negatives, so that the processes hold unequal numbers of both.
    """
    directory = tmp_path_factory.mktemp("recipe")
    records = json.loads((scenes / "llava_train.json").read_text())[: STEPS * GLOBAL_BATCH]
    data = directory / "data.json"
    data.write_text(json.dumps(records))
    chat_processor = Cafe.load(random_base).chat_processor
    order = (
        ContrastiveBatchDataset([open_source(Source(path=str(data)))], chat_processor, GLOBAL_BATCH, 0).order(0).records
    )
    for record in records:
        record["negative_scores"] = [0.1 * (number % 4) for number, _ in enumerate(record["negatives"])]
    for place in (*order[:4], *order[12:14]):
        drop_image(records[place])
    records[order[5]]["image"] = "missing.png"
    records[order[6]] |= {"negatives": [], "negative_scores": []}
    data.write_text(json.dumps(records))
    file = directory / "recipe.yaml"
    # Large epsilon: AdamW's first steps would make a sign of every rounding error.
    file.write_text(f"""
output: nowhere
model: {{base: {random_base}}}
data: {{num_workers: 0, sources: [{{path: {data}, images: {scenes}}}]}}
optimizer:
  {{learning_rate: 1.0e-2, vision_tower_learning_rate: 1.0e-2, epsilon: 1.0e-2, warmup_ratio: 0.0, max_grad_norm: 0.5}}
objective: {{learn_temperature: true, hardness_weight: 1.0, false_negative_margin: 0.3, matryoshka_dims: [32]}}
evaluation: {{eval_steps: 1, data: {scenes}}}
max_steps: {STEPS}
logging_steps: 1
""")
    return file


def changed(
    scenes: Path, random_base: Path, data: Path, which: slice, change: Callable[[dict[str, Any]], object]
) -> str:
    """Write a source in which some records, by their turn in a run, are changed; return the override that names it."""
    records = json.loads((scenes / "llava_train.json").read_text())[: STEPS * GLOBAL_BATCH]
    data.write_text(json.dumps(records))
    chat_processor = Cafe.load(random_base).chat_processor
    for place in (
        ContrastiveBatchDataset([open_source(Source(path=str(data)))], chat_processor, GLOBAL_BATCH, 0)
        .order(0)
        .records[which]
    ):
        change(records[place])
    data.write_text(json.dumps(records))
    return f"[{{path: {data}, images: {scenes}}}]"


def lose_image(record: dict[str, Any]) -> None:
    """Make it a bad record."""
    record["image"] = "missing.png"


def drop_image(record: dict[str, Any]) -> None:
    """Leave only its text."""
    record.pop("image")
    for turn in record["conversations"]:
        turn["value"] = turn["value"].replace("<image>", "").strip()


def results(output: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Read the weights and the log."""
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return load_file(output / "checkpoint" / "model.safetensors"), log


def assert_moved_alike(one: dict[str, torch.Tensor], several: dict[str, torch.Tensor], base: Path) -> None:
    """Two runs' weights, by how far they have come; about as far apart if float32 rounds each to the number beside."""
    start = load_file(base / "model.safetensors")
    moved, apart = (torch.cat([(one[name] - each[name]).flatten() for name in one]) for each in (start, several))
    assert moved.norm() > 0 and apart.norm() <= 2e-5 * moved.norm()
    assert apart.abs().max() <= 5e-5 * moved.abs().max()


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """Train the recipe with some overrides in one process, each once."""

    @cache
    def of(*overrides: str) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
        output = tmp_path_factory.mktemp("alone") / "run"
        assert not run(recipe, output, 1, *overrides)
        return results(output)

    return of


@pytest.mark.parametrize(
    ("world", "overrides", "launcher"),
    [
        (2, ("micro_batch.tokens=500",), {}),
        (2, (), {"ACCELERATE_USE_CPU": "false", "CUDA_VISIBLE_DEVICES": ""}),  # as torchrun does without a GPU
        (4, ("micro_batch.tokens=250",), {}),
        (2, ("model.shard=true",), {}),
        (2, ("micro_batch.tokens=500",), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
        (2, ("model.shard=true", "micro_batch.tokens=500", "model.gradient_checkpointing=true"), {}),
        (2, ("model.shard=true", "micro_batch.tokens=500", "model.freeze=[vision_tower]"), {}),
        (2, ("model.shard=true", "micro_batch.tokens=500", "model.compile=true"), {}),
        (2, ("model.shard=true", "micro_batch.tokens=500", "model.precision=bf16"), {}),
        (2, ("model.shard=true", "micro_batch.tokens=500", "model.precision=fp16", *OVERFLOW), {}),
        (
            2,
            (
                "model.shard=true",
                "model.share_prefixes=false",
                "optimizer.gradient_accumulation_steps=2",
                "batch_size=2",
            ),
            {},
        ),
        under_zero(2, ("micro_batch.tokens=500",), stage="1"),
        under_zero(2, ("optimizer.gradient_accumulation_steps=2", "batch_size=2"), stage="2"),
        under_zero(4, ("micro_batch.tokens=250", "model.freeze=[vision_tower]"), stage="2"),
        under_zero(2, ("model.precision=fp16", *OVERFLOW), stage="2"),
    ],
    ids=str,
)
def test_several_processes_take_the_steps_of_one(alone, recipe, random_base, tmp_path, world, overrides, launcher):
    mine = [override for override in overrides if re.search("freeze|accumulation|precision|weight", override)]
    one, its_log = alone(*mine, *(["batch_size=4"] if "batch_size=2" in overrides else []))
    assert not run(recipe, tmp_path / "run", world, *overrides, **launcher)
    several, log = results(tmp_path / "run")
    start = load_file(random_base / "model.safetensors")
    assert one.keys() == several.keys() == start.keys()
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - several[name]).flatten() for name in one])
    # What 16 bits hold, eight of which are bfloat16's digits and eleven float16's, is summed in another order.
    fewer = {"model.precision=bf16": 5e-2, "model.precision=fp16": 1e-2}
    close = max(fewer.get(override, 1e-5) for override in ("", *overrides))
    assert len(its_log) == len(log) == 2 * STEPS
    for record, other in zip(its_log, log, strict=True):
        assert record.keys() == other.keys()
        for name in record.keys() - {"seconds"}:
            assert other[name] == pytest.approx(record[name], rel=close), (record["step"], name)
    assert moved.norm() > 0 and apart.norm() <= close * moved.norm()


def test_parameters_unused_in_every_process_do_not_move(alone, recipe, random_base, scenes, tmp_path):
    texts = changed(scenes, random_base, tmp_path / "data.json", slice(GLOBAL_BATCH, None), drop_image)
    source = f"data.sources={texts}", "optimizer.weight_decay=0.5"  # of the second step, in AdamW beside its momentum
    one, _ = alone(*source)
    assert not run(recipe, tmp_path / "run", 2, *source)
    several, _ = results(tmp_path / "run")
    assert_moved_alike(one, several, random_base)


def test_equal_queries_of_two_processes_are_no_negatives_of_each_other(alone, recipe, random_base, scenes, tmp_path):
    """Each image is shown twice in a batch, once in either process."""
    shown = [record["image"] for record in json.loads((scenes / "llava_train.json").read_text())]
    images = cycle(shown[: GLOBAL_BATCH // 2])
    again = changed(
        scenes, random_base, tmp_path / "data.json", slice(None), lambda record: record.update(image=next(images))
    )
    one, its_log = alone(f"data.sources={again}")
    _, unmasked = alone(f"data.sources={again}", "objective.mask_duplicates=false")
    assert not run(recipe, tmp_path / "run", 2, f"data.sources={again}")
    several, log = results(tmp_path / "run")
    assert_moved_alike(one, several, random_base)
    losses = [each[0]["contrastive_loss"] for each in (its_log, log, unmasked)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and losses[2] > losses[0] + 0.01


@pytest.mark.parametrize("overrides", [(), ("model.shard=true",)], ids=str)
def test_process_with_only_bad_records_keeps_up(alone, recipe, random_base, scenes, tmp_path, overrides):
    few, half = (
        changed(scenes, random_base, tmp_path / f"{count}.json", slice(count), lose_image)
        for count in (GLOBAL_BATCH // 2, BATCH_SIZE)
    )
    bad = f"data.sources={few}", f"evaluation.sources={half}", "evaluation.num_samples=0"
    one, its_log = alone(*bad)
    assert not run(recipe, tmp_path / "run", 2, *bad, *overrides)
    assert (tmp_path / "run-0.report").read_text().endswith(" 4 of 16 records were bad.\n")
    several, log = results(tmp_path / "run")
    assert_moved_alike(one, several, random_base)
    for record, other in zip(its_log, log, strict=True):
        assert record.pop("samples", None) == other.pop("samples", None)
        assert untimed(json.dumps(other)) == pytest.approx(untimed(json.dumps(record)), rel=1e-4)


@pytest.mark.parametrize("turn", ["1", "5"], ids=["loss", "gradient"])
def test_oom_in_the_contrastive_loss_reaches_all_processes(alone, recipe, random_base, tmp_path, turn):
    one, its_log = alone()
    assert not run(recipe, tmp_path / "run", 2, each=short_of_memory, SHORT_AT=turn)
    assert "Step 1: out of memory; retrying" in (tmp_path / "run-0.report").read_text()
    several, log = results(tmp_path / "run")
    assert_moved_alike(one, several, random_base)
    for record, other in zip(its_log, log, strict=True):
        assert untimed(json.dumps(other)) == pytest.approx(untimed(json.dumps(record)), rel=1e-4)


@pytest.mark.parametrize("overrides", [(), ("model.shard=true",)], ids=str)
def test_different_base_weights_between_processes_are_rejected(recipe, tmp_path, overrides):
    error = run(recipe, tmp_path / "run", 2, *overrides, each=with_other_weights)
    assert "CheckpointError: The processes loaded different weights, " in error and "embed_tokens.weight first" in error


def test_published_scaling_is_the_loss_weight_over_the_world_size(alone, recipe, random_base, tmp_path):
    fixed = "objective.learn_temperature=false"
    one, _ = alone(fixed, "objective.contrastive_weight=0.5")
    assert not run(recipe, tmp_path / "run", 2, fixed, "objective.gradient_scaling=published")
    several, _ = results(tmp_path / "run")
    other, _ = alone(fixed)
    start = load_file(random_base / "model.safetensors")
    apart, unscaled, moved = (
        torch.cat([(one[name] - each[name]).flatten() for name in one]).norm() for each in (several, other, start)
    )
    assert apart <= 1e-5 * moved <= 1e-3 * unscaled


@pytest.mark.parametrize(
    ("overrides", "launcher"),
    [
        (("micro_batch.tokens=500",), {}),
        (("model.shard=true", "model.adapter.rank=4", "model.adapter.dropout=0.1"), {}),
        under_zero(("micro_batch.tokens=500",), stage="1"),
        under_zero(("model.adapter.rank=4", "model.adapter.dropout=0.1"), stage="2"),
    ],
    ids=str,
)
def test_resume_after_kill_with_several_processes(recipe, tmp_path, overrides, launcher):
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    start = partial(run, recipe, each=remembering, **launcher)
    start(broken, 2, "save_steps=1", *overrides, killed_at=broken / "state" / "step-000001")
    assert not (broken / "checkpoint").exists()
    set_aside(broken)
    for output in (broken, whole):
        assert not start(output, 2, "save_steps=1", *overrides)
    assert {f"1-{done}-{process}.pt" for done in ("saved", "loaded") for process in range(2)} <= {
        file.name for file in states_of(broken).iterdir()
    }
    logs = [(output / "log.jsonl").read_text().splitlines() for output in (broken, whole)]
    assert [untimed(line) for line in logs[0]] == [untimed(line) for line in logs[1]] != [], explain(broken, whole)
    weights = [next((output / "checkpoint").glob("*model.safetensors")).read_bytes() for output in (broken, whole)]
    assert weights[0] == weights[1], explain(broken, whole)


def untimed(line: str) -> dict[str, float]:
    """Read a record of the log without its seconds."""
    return {name: value for name, value in json.loads(line).items() if name != "seconds"}


@pytest.mark.parametrize(
    ("launcher", "sentence"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM, which needs one loss and one backward pass per step"),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            "ZeRO of stage 3: stages 1 and 2 without offloading are supported",
        ),
        (ZERO | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "ZeRO of stage 2, offloaded: stages 1 and 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "version 1, which is not supported"),
    ],
    ids=str,
)
def test_unsupported_launchers_are_rejected(recipe, tmp_path, monkeypatch, launcher, sentence):
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CafeError, match=sentence):
        train(read_recipe(recipe, [f"output={tmp_path / 'run'}"]))


def test_data_smaller_than_one_global_batch_is_rejected(random_base, scenes):
    source, chat_processor = (
        open_source(Source(path=str(scenes / "llava_train.json"))),
        Cafe.load(random_base).chat_processor,
    )
    with pytest.raises(CafeError, match="holds 48 records, fewer than one batch of 64"):
        ContrastiveBatchDataset([source], chat_processor, 32, 0, world_size=2)
