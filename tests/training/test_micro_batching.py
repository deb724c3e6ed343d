"""Micro-batches that fit: an out-of-memory error changes no gradient, measurement finds a size, memory stays flat."""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_samples import make
from transformers import PreTrainedModel

from cafe.data.dataset import NO_LIMIT, ContrastiveBatchDataset, MicroBatchSize
from cafe.data.records import Source, open_source
from cafe.errors import CafeError
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe
from cafe.packing import PackedBatch, count_crops, count_unique_tokens
from cafe.training.micro_batching import BatchFeed, find_micro_batch_size, run_step_with_oom_retry
from cafe.training.recipe import ObjectiveConfig
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


class RunsOut:
    """A model that runs out of memory over more than so many tokens: after some such readings, so many times."""

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
def test_a_step_that_runs_out_of_memory_is_repeated_exactly_in_halves(model, batches, late, monkeypatch):
    batches = batches.with_micro_batch_size(MicroBatchSize(tokens=700))
    joint = JointStep(model.lvlm, ObjectiveConfig())
    said: list[str] = []
    feed = BatchFeed(batches, None, 0, 2, 1, 0, said.append)
    parts = next(feed)
    count = len(parts[0].micro_batches)
    assert count > 1
    RunsOut(monkeypatch, after=count if late else 0, times=1)
    torch.manual_seed(5)
    (losses,) = run_step_with_oom_retry(joint, parts, feed, measure=False)
    found, state = gradient(joint), torch.get_rng_state()
    assert len(said) == 1 and "Memory ran out at step 1" in said[0]
    assert len(parts[0].micro_batches) > count

    monkeypatch.undo()
    joint.zero_grad()
    torch.manual_seed(5)
    smaller = batches.with_micro_batch_size(feed.measured_size)
    assert len(smaller[0].micro_batches) > count
    unbroken = joint(smaller[0])
    assert torch.equal(found, gradient(joint)) and torch.equal(losses.lm, unbroken.lm)
    assert torch.equal(state, torch.get_rng_state())
    later = next(feed)[0]  # the batches after it are cut alike
    assert [part.joint.num_tokens for part in later.micro_batches] == [
        part.joint.num_tokens for part in smaller[1].micro_batches
    ]


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma4"])
def test_a_family_whose_pictures_are_rows_of_patches_is_cut_by_tokens_alone(family, scenes, monkeypatch):
    model = make(family)
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    batches = ContrastiveBatchDataset([source], model.chat_processor, PAIRS, seed=0, packing=model.packing)
    with monkeypatch.context() as patch:
        RunsOut(patch, 3 * count_unique_tokens(batches.largest_examples(1)[0].all))
        size = find_micro_batch_size(JointStep(model.lvlm, ObjectiveConfig()), batches)
        assert size.tokens and not size.crops
    said: list[str] = []
    feed = BatchFeed(batches, None, 0, 1, 1, 0, said.append)
    parts = next(feed)
    tokens = parts[0].micro_batches[0].joint.num_tokens // 2
    RunsOut(monkeypatch, times=1)
    run_step_with_oom_retry(JointStep(model.lvlm, ObjectiveConfig()), parts, feed, measure=False)
    assert feed.measured_size == MicroBatchSize(tokens) and said[0].endswith(f"in micro-batches of {tokens} tokens.")
    assert 2 <= len(feed.batches[0].micro_batches) < PAIRS


def test_without_dropout_the_gradient_is_that_of_a_step_that_never_broke(model, batches, monkeypatch):
    joint = JointStep(model.lvlm.eval(), ObjectiveConfig())
    joint(batches[0])
    expected = gradient(joint)
    joint.zero_grad()
    feed = BatchFeed(batches, None, 0, 1, 1, 0, lambda line: None)
    RunsOut(monkeypatch, times=2)
    run_step_with_oom_retry(joint, next(feed), feed, measure=False)
    assert feed.measured_size is not None
    assert (gradient(joint) - expected).norm() <= 1e-5 * expected.norm()


def test_a_size_found_before_and_that_of_the_recipe_both_hold(batches):
    """A run that is gone on with may be given smaller micro-batches, as it is told to where a sharded one ran out."""
    for found, of_recipe, expected in [
        (MicroBatchSize(900, 20), NO_LIMIT, MicroBatchSize(900, 20)),
        (MicroBatchSize(900, 20), MicroBatchSize(tokens=300), MicroBatchSize(300, 20)),
        (MicroBatchSize(tokens=300), MicroBatchSize(900, 20), MicroBatchSize(300, 20)),
        (None, MicroBatchSize(crops=20), MicroBatchSize(crops=20)),
    ]:
        assert BatchFeed(batches.with_micro_batch_size(of_recipe), found, 4, 8, 1, 0, print).batches.micro_batch_size == expected


def test_a_process_without_records_takes_the_size_that_the_others_halve(batches, monkeypatch):
    others = iter([1, 600, 30])  # they can be halved; their largest micro-batch
    monkeypatch.setattr("cafe.training.micro_batching.all_reduce_max", lambda number, device: max(number, next(others)))
    feed = BatchFeed(batches, None, 1, 2, 1, 0, lambda line: None)
    feed.halve_micro_batch_size([batches.collate([])], torch.device("cpu"))
    assert feed.batches.micro_batch_size == MicroBatchSize(300, 15)


def test_an_example_that_does_not_fit_by_itself_is_named(model, batches, monkeypatch):
    joint = JointStep(model.lvlm, ObjectiveConfig())
    feed = BatchFeed(batches, None, 0, 1, 1, 0, lambda line: None)
    RunsOut(monkeypatch)
    with pytest.raises(CafeError, match=r"single example at step 1, one of .*llava_train.json, record"):
        run_step_with_oom_retry(joint, next(feed), feed, measure=False)


def test_the_size_that_fits_follows_from_the_memory_there_is(model, batches, monkeypatch):
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
        find_micro_batch_size(joint, batches, limit=0.001)


def test_the_size_that_fits_is_that_of_a_step_which_is_logged(model, batches, monkeypatch):
    """Such a step keeps the losses' gradients apart, for their norms, and takes more."""

    def runs_out(*given: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a gradient.")

    monkeypatch.setattr("cafe.training.step.global_grad_norm", runs_out)
    with pytest.raises(CafeError, match=r"largest of 6 examples, .* does not fit"):
        find_micro_batch_size(JointStep(model.lvlm, ObjectiveConfig()), batches)


def test_memory_is_flat_over_a_long_run_of_varying_sizes(model, batches):
    """Nothing that a step makes is there after it, whatever was its size: tensors are counted, and their bytes."""
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
        joint(
            (batches if step % 10 == 9 else small).with_micro_batch_size(sizes[step % 4])[step], measure=step % 3 == 0
        )
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, 20, 39):
            counts.append(alive())
    assert counts[0] == counts[1] == counts[2]
