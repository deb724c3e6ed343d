"""Micro-batches that fit: an OOM retry changes no gradient, measurement finds a size, memory stays flat."""

import gc
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_samples import make
from transformers import PreTrainedModel

from cafe.data.batch import NO_LIMIT, Batch, MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import CafeError
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe
from cafe.packing import PackedBatch, count_crops, count_unique_tokens
from cafe.training.checkpointing import TrainerState
from cafe.training.loop import StepGradient, gradient_with_retries
from cafe.training.micro_batching import BatchFeed, find_micro_batch_size
from cafe.training.recipe import ObjectiveConfig, OptimizerConfig
from cafe.training.step import JointStep

PAIRS = 6


@pytest.fixture
def model(random_base: Path) -> Cafe:
    model = Cafe.load(random_base, Prompts(), torch.float32)
    for layer in model.lvlm.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    return replace(model, lvlm=model.lvlm.train())


@pytest.fixture
def batches(model: Cafe, scenes: Path) -> ContrastiveBatchDataset:
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    return ContrastiveBatchDataset([source], model.chat_processor, PAIRS, seed=0, packing=model.packing)


def gradient(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def compute_gradient(joint: JointStep, batches: list[Batch], feed: BatchFeed) -> StepGradient:
    """The loop's gradient of a step, with its retries, not clipped."""
    run = SimpleNamespace(
        recipe=SimpleNamespace(objective=joint.objective, optimizer=OptimizerConfig(max_grad_norm=math.inf)),
        joint=joint,
        trained=list(joint.parameters()),
        zero=None,
        feed=feed,
        state=TrainerState(),
        device=joint.device,
        report=feed.report,
    )
    return gradient_with_retries(run, batches, log_grad_norms=False)


class RunsOut:
    """Runs out of memory over packs of more than `tokens`: after `after` such packs, `times` times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int = 0, after: int = 0, times: int = 1000) -> None:
        self.tokens, self.after, self.times = tokens, after, times
        monkeypatch.setattr("cafe.training.step.forward_packed", self)

    def __call__(self, lvlm: PreTrainedModel, pack: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        made = forward_packed(lvlm, pack)
        if pack.num_tokens > self.tokens:
            self.after -= 1
            if self.after < 0 and self.times:
                self.times -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything.")
        return made


@pytest.mark.parametrize("late", [False, True])  # while embedding; when some of the gradient is there already
def test_oom_step_is_retried_exactly_in_halved_micro_batches(model, batches, late, monkeypatch):
    batches = batches.with_micro_batch_size(MicroBatchSize(tokens=700))
    joint = JointStep(model.lvlm, ObjectiveConfig())
    lines: list[str] = []
    feed = BatchFeed(batches, None, 0, 2, 1, 0, lines.append)
    parts = next(feed)
    count = len(parts[0].micro_batches)
    assert count > 1
    RunsOut(monkeypatch, after=count if late else 0, times=1)
    torch.manual_seed(5)
    (losses,) = compute_gradient(joint, parts, feed).losses
    repeated, state = gradient(joint), torch.get_rng_state()
    assert len(lines) == 1 and lines[0].startswith("Step 1: out of memory; retrying with micro-batches of at most ")
    assert len(parts) == 1 and len(parts[0].micro_batches) == count  # the caller's list is left as it is

    monkeypatch.undo()
    joint.zero_grad()
    torch.manual_seed(5)
    smaller = batches.with_micro_batch_size(feed.measured_size)
    assert len(smaller[0].micro_batches) > count
    unbroken = joint.forward_backward(smaller[0])
    assert torch.equal(repeated, gradient(joint)) and torch.equal(losses.lm, unbroken.lm)
    assert torch.equal(state, torch.get_rng_state())
    later = next(feed)[0]  # the batches after it are cut alike
    assert [part.joint.num_tokens for part in later.micro_batches] == [
        part.joint.num_tokens for part in smaller[1].micro_batches
    ]


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma4"])
def test_patch_based_families_are_cut_by_tokens_alone(family, scenes, monkeypatch):
    model = make(family)
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    batches = ContrastiveBatchDataset([source], model.chat_processor, PAIRS, seed=0, packing=model.packing)
    with monkeypatch.context() as patch:
        RunsOut(patch, 3 * count_unique_tokens(batches.largest_examples(1)[0].all))
        size = find_micro_batch_size(JointStep(model.lvlm, ObjectiveConfig()), batches)
        assert size.tokens and not size.crops
    lines: list[str] = []
    feed = BatchFeed(batches, None, 0, 1, 1, 0, lines.append)
    parts = next(feed)
    tokens = parts[0].micro_batches[0].joint.num_tokens // 2
    RunsOut(monkeypatch, times=1)
    compute_gradient(JointStep(model.lvlm, ObjectiveConfig()), parts, feed)
    assert feed.measured_size == MicroBatchSize(tokens) and lines[0].endswith(f" at most {tokens} tokens.")
    assert 2 <= len(feed.batches[0].micro_batches) < PAIRS


def test_oom_retry_gives_the_same_gradient_without_dropout(model, batches, monkeypatch):
    joint = JointStep(model.lvlm.eval(), ObjectiveConfig())
    joint.forward_backward(batches[0])
    expected = gradient(joint)
    joint.zero_grad()
    feed = BatchFeed(batches, None, 0, 1, 1, 0, lambda line: None)
    RunsOut(monkeypatch, times=2)
    compute_gradient(joint, next(feed), feed)
    assert feed.measured_size is not None
    assert (gradient(joint) - expected).norm() <= 1e-5 * expected.norm()


def test_measured_and_configured_micro_batch_sizes_both_hold(batches):
    """A resumed run may be given smaller micro-batches, as a sharded one that ran out of memory asks for."""
    for measured, of_recipe, expected in [
        (MicroBatchSize(900, 20), NO_LIMIT, MicroBatchSize(900, 20)),
        (MicroBatchSize(900, 20), MicroBatchSize(tokens=300), MicroBatchSize(300, 20)),
        (MicroBatchSize(tokens=300), MicroBatchSize(900, 20), MicroBatchSize(300, 20)),
        (None, MicroBatchSize(crops=20), MicroBatchSize(crops=20)),
    ]:
        assert (
            BatchFeed(batches.with_micro_batch_size(of_recipe), measured, 4, 8, 1, 0, print).batches.micro_batch_size
            == expected
        )


def test_oom_halves_the_size_in_a_process_without_records_too(batches, monkeypatch):
    others = iter([1, 600, 30])  # they can be halved; their largest micro-batch
    monkeypatch.setattr("cafe.training.micro_batching.all_reduce_max", lambda number, device: max(number, next(others)))
    feed = BatchFeed(batches, None, 1, 2, 1, 0, lambda line: None)
    feed.halve_micro_batch_size([batches.collate([])], torch.device("cpu"))
    assert feed.batches.micro_batch_size == MicroBatchSize(300, 15)


def test_oom_with_a_single_example_names_it(model, batches, monkeypatch):
    joint = JointStep(model.lvlm, ObjectiveConfig())
    feed = BatchFeed(batches, None, 0, 1, 1, 0, lambda line: None)
    RunsOut(monkeypatch)
    with pytest.raises(
        CafeError, match=r"Step 1: out of memory with a single example, one of .*llava_train.json, record"
    ):
        compute_gradient(joint, next(feed), feed)


def test_micro_batch_size_follows_from_the_available_memory(model, batches, monkeypatch):
    joint = JointStep(model.lvlm, ObjectiveConfig())
    state = torch.get_rng_state()
    assert find_micro_batch_size(joint, batches) == NO_LIMIT  # all of this machine's memory is enough
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in joint.parameters())

    largest = batches.largest_examples(PAIRS)
    tokens = [count_unique_tokens(example.all) for example in largest]
    assert tokens == sorted(tokens, reverse=True)
    RunsOut(monkeypatch, tokens[0] + tokens[1] // 2)  # two of the largest do not fit
    size = find_micro_batch_size(joint, batches)
    assert size.tokens and size.crops
    assert size.tokens >= tokens[0] and size.crops >= count_crops(largest[0].all)
    with pytest.raises(CafeError, match=r"largest of 6 examples, .* does not fit in 0\.0 GiB"):
        find_micro_batch_size(joint, batches, memory_limit_gib=0.001)


def test_micro_batch_size_is_measured_with_a_logged_step(model, batches, monkeypatch):
    """Such a step keeps one gradient per loss, for their norms, and takes more memory."""

    def runs_out(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a gradient.")

    monkeypatch.setattr("cafe.training.gradients.global_grad_norm", runs_out)
    with pytest.raises(CafeError, match=r"largest of 6 examples, .* does not fit"):
        find_micro_batch_size(JointStep(model.lvlm, ObjectiveConfig()), batches)


def test_memory_is_flat_over_a_long_run_of_varying_sizes(model, batches):
    """No tensor that a step makes outlives it, whatever its size: tensors and their bytes are counted."""
    joint = JointStep(model.lvlm, ObjectiveConfig())
    optimizer = torch.optim.AdamW(joint.parameters())
    sizes = [MicroBatchSize(tokens=tokens) for tokens in (None, 900, 500, 300)]
    small = ContrastiveBatchDataset(batches.sources, batches.chat_processor, 2, seed=0, packing=batches.packing)

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        return len(tensors), sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    counts = []
    for step in range(40):
        data = (batches if step % 10 == 9 else small).with_micro_batch_size(sizes[step % 4])
        joint.forward_backward(data[step], log_grad_norms=step % 3 == 0)
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 20, 39):
            counts.append(alive())
    assert counts[0] == counts[1] == counts[2]
