"""Steps of the model: jobs are read together and fail alone, and chats join and leave with right answers."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from engine_samples import IMAGES, Chat, Jobs, answer_alone, contents, poison
from model_samples import make, plain_read
from torch import Tensor

from cafe.lvlm.families import find_vision_tower
from cafe.model import Cafe
from cafe.serving import chats as chats_module
from cafe.serving import model_runner as model_runner_module
from cafe.serving.chats import SlotChats, StaticChats
from cafe.serving.config import EngineConfig
from cafe.serving.jobs import EngineError, Job, Piece, ScoreJob
from cafe.serving.metrics import Metrics
from cafe.serving.model_runner import ModelRunner

JOINING, STATIC = "qwen2_5_vl", "gemma3"
MODELS = [JOINING, "llava_onevision", STATIC]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Cafe:
    """A model whose chats join and leave, one of them under M-RoPE, and one whose chats are static batches."""
    return make(request.param)


@pytest.fixture(scope="module")
def joining() -> Cafe:
    return make(JOINING)


def make_runner(model: Cafe, **config: Any) -> ModelRunner:
    return ModelRunner(model, EngineConfig(**config), Metrics())


def read(runner: ModelRunner, *jobs: Job | Chat) -> None:
    runner.read([job.job if isinstance(job, Chat) else job for job in jobs])


def finish(runner: ModelRunner) -> None:
    """Decode until no chat runs."""
    while runner.num_chats:
        runner.decode()


def tokens_read(runner: ModelRunner) -> float:
    return runner.metrics.registry.get_sample_value("cafe_tokens_total", {"kind": "read"}) or 0.0


def is_failed(job: Job | Chat) -> bool:
    future = job.job.future if isinstance(job, Chat) else job.future
    return isinstance(future.exception(timeout=0), EngineError)


def has_kept_nothing(runner: ModelRunner) -> bool:
    """Tell whether the memory of all chats was given back."""
    sizes = [layer.keys.numel() + layer.values.numel() for layer in runner.slots.cache.layers if layer.is_initialized]
    return not any(sizes) and not runner.static and not runner.slots.cache.lengths


@pytest.mark.parametrize("kernel", ["mask", "blocks"])
@pytest.mark.parametrize("reason", ["NaN", "out of range"])
@pytest.mark.parametrize("family", [JOINING, STATIC])
def test_a_poisoned_job_among_others_fails_alone(family, reason, kernel):
    model = make(family)
    if model.packing.share_prefixes:
        # In one row, where the poison is next to the others.
        model.packing = replace(model.packing, kernel=kernel, max_row_tokens=4096)
    jobs, runner = Jobs(model), make_runner(model)
    expected = [answer_alone(model, jobs.chat(IMAGES[0], "What?")), answer_alone(model, jobs.chat(IMAGES[1], "Hm?"))]
    vector = model.embed_branches([jobs.embed(IMAGES[0]).branch])[0]
    before = jobs.chat(IMAGES[1], "Hm?")
    read(runner, before)
    runner.decode()

    poison(model, "~")
    for _ in range(2):  # the second time from what was kept of the first
        good, good_chat = jobs.embed(IMAGES[0]), jobs.chat(IMAGES[0], "What?")
        bad, bad_chat = jobs.embed(IMAGES[0], "some ~ words"), jobs.chat(IMAGES[0], "What is ~ it?")
        if reason == "out of range":
            for branch in (bad.branch, bad_chat.job.branch):
                branch.input_ids[-1] = 10**6
        read(runner, bad, good, bad_chat, good_chat)
        finish(runner)
        np.testing.assert_allclose(good.future.result(0), vector, atol=1e-5)
        assert good_chat.answer() == expected[0]
        assert is_failed(bad)
        assert is_failed(bad_chat)
    # One that ran before, too.
    assert before.answer() == expected[1]
    assert runner.num_failures == 4


def test_a_poisoned_chat_leaves_nothing_in_its_slot(joining):
    model = make(JOINING)
    jobs, runner = Jobs(model), make_runner(model)
    kept, after = jobs.chat(IMAGES[0], "a long question " * 4, max_tokens=30), jobs.chat("short", max_tokens=20)
    expected = [answer_alone(model, kept), answer_alone(model, after)]
    poison(model, "~")
    read(runner, kept)
    read(runner, jobs.chat("~ " * 20))
    read(runner, after)
    finish(runner)
    assert [kept.answer(), after.answer()] == expected


def fail_while_running(monkeypatch: pytest.MonkeyPatch, runner: ModelRunner, bad: Chat) -> None:
    """Let each forward pass fail that reads the next token of a chat."""
    real = chats_module.read_slots

    def read_slots(lvlm: Any, cache: Any, start: int, counts: list[int], *args: Any) -> Tensor:
        """Fail, or read."""
        if any(chat.job is bad.job for chat in runner.slots.chats[start : start + len(counts)]):
            raise RuntimeError("out of memory")
        return real(lvlm, cache, start, counts, *args)

    monkeypatch.setattr(chats_module, "read_slots", read_slots)


def give_nan(monkeypatch: pytest.MonkeyPatch, runner: ModelRunner, bad: Chat) -> None:
    """Let the logits of a chat be NaN."""
    for kind in (SlotChats, StaticChats):

        def next_logits(batch: Any, start: int, stop: int, real: Callable[..., Tensor] = kind.next_logits) -> Tensor:
            """Compute logits, and spoil those of the chat."""
            rows = [chat.job is bad.job for chat in batch.chats[start:stop]]
            return real(batch, start, stop).masked_fill(torch.tensor(rows)[:, None], torch.nan)

        monkeypatch.setattr(kind, "next_logits", next_logits)


def refuse_pieces(monkeypatch: pytest.MonkeyPatch, runner: ModelRunner, bad: Chat) -> None:
    """Let nobody take a chat's pieces."""

    def on_piece(piece: Piece) -> None:
        """Fail."""
        raise RuntimeError("the loop is closed")

    bad.job.on_piece = on_piece


FAULTS = [fail_while_running, give_nan, refuse_pieces]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_an_error_in_decoding_fails_one_chat_alone(model, fault, place, monkeypatch):
    if fault is fail_while_running and not model.packing.share_prefixes:
        pytest.skip("A static batch cannot be read again: it fails as a whole.")
    jobs, runner = Jobs(model), make_runner(model)
    all_chats = [jobs.chat(IMAGES[number % 2], "What? " * (number + 1), max_tokens=12) for number in range(4)]
    expected = [answer_alone(model, chat) for chat in all_chats]
    read(runner, *all_chats)
    runner.decode()
    bad = all_chats[place]
    fault(monkeypatch, runner, bad)
    finish(runner)
    assert is_failed(bad)
    assert [chat.answer() for chat in all_chats if chat is not bad] == [*expected[:place], *expected[place + 1 :]]
    assert runner.num_failures == 1
    assert has_kept_nothing(runner)


def test_a_token_that_was_read_without_logits_is_not_read_twice(joining, monkeypatch):
    jobs, runner = Jobs(joining), make_runner(joining)
    all_chats = [jobs.chat(IMAGES[number], "What?", max_tokens=12) for number in range(2)]
    expected = [answer_alone(joining, chat) for chat in all_chats]
    read(runner, *all_chats)
    real, failures = chats_module.compute_logits, [RuntimeError("out of memory")]

    def compute_logits(*args: Any) -> Tensor:
        """Fail at first, and then compute."""
        if failures:
            raise failures.pop()
        return real(*args)

    monkeypatch.setattr(chats_module, "compute_logits", compute_logits)
    finish(runner)
    assert not failures
    assert [chat.answer() for chat in all_chats] == expected
    assert runner.num_failures == 0


def test_what_a_failed_pass_held_is_freed_before_its_jobs_are_read_again(joining, monkeypatch):
    monkeypatch.setattr(model_runner_module.logger, "disabled", True)  # pytest keeps the errors that are logged
    jobs, runner = Jobs(joining), make_runner(joining)
    all_jobs = [jobs.embed(f"number {number}") for number in range(4)]
    held, is_freed = list[weakref.ref[Tensor]](), list[bool]()

    def run_out_of_memory(some: Any) -> None:
        """Hold a tensor, and fail."""
        is_freed.append(all(tensor() is None for tensor in held))
        states = torch.zeros(1)
        held.append(weakref.ref(states))
        raise RuntimeError("out of memory")

    runner._isolated(all_jobs, run_out_of_memory)
    assert is_freed == [True] * 7
    assert all(is_failed(job) for job in all_jobs)


def test_pieces_that_nobody_takes_from_the_first_on_fail_one_chat_alone(model, monkeypatch):
    jobs, runner = Jobs(model), make_runner(model)
    good, bad, embedding = jobs.chat(IMAGES[0], "What?"), jobs.chat(IMAGES[0], "Hm?"), jobs.embed(IMAGES[0])
    expected = answer_alone(model, good)
    refuse_pieces(monkeypatch, runner, bad)
    read(runner, good, bad, embedding)
    finish(runner)
    assert good.answer() == expected
    assert is_failed(bad)
    assert embedding.future.result(0) is not None


@pytest.mark.parametrize("seed", range(3))
def test_chats_that_join_and_leave_at_any_time_have_right_answers(model, seed):
    rng = Random(seed)
    jobs, runner = Jobs(model), make_runner(model)
    waiting, done = list[Chat](), list[Chat]()
    for content in contents(model) * 3:
        waiting.append(jobs.chat(*content.parts, max_tokens=rng.choice([1, 2, 5, 17])))
    rng.shuffle(waiting)
    while waiting or runner.num_chats:
        joining = [waiting.pop() for _ in range(rng.randint(0, min(3, len(waiting))))]
        read(runner, *joining)
        done += joining
        runner.decode()
        if rng.random() < 0.2:
            running = [chat.job for batch in runner.batches for chat in batch.chats]
            over = set(rng.sample(running, k=min(2, len(running))))
            for job in over:
                job.future.cancel()
            runner.drop(lambda job, over=over: job in over)
    assert has_kept_nothing(runner)
    finished = [chat for chat in done if not chat.job.future.cancelled()]
    assert finished
    assert len(finished) < len(done)
    for chat in finished:
        assert chat.answer() == answer_alone(model, chat)


def test_a_score_is_made_of_the_logits_of_the_first_token(model):
    jobs, runner = Jobs(model), make_runner(model)
    branch, tokens = jobs.chat(IMAGES[0], "Yes or no?").job.branch, (20, 3, 77)
    score = ScoreJob(branch=branch, token_ids=tokens)
    read(runner, score, jobs.embed(IMAGES[0]), jobs.chat(IMAGES[0], "What?"))
    with torch.no_grad():
        model.lvlm.double()
        expected = plain_read(model, branch)[1][-1][list(tokens)]
        model.lvlm.float()
    np.testing.assert_allclose(score.future.result(0), expected.numpy(), atol=1e-4)


def count_crops(model: Cafe, read_jobs: Callable[[], Any]) -> int:
    """Count the rows of pixels that the vision tower is given while some jobs are read."""
    tower, rows = find_vision_tower(model.lvlm), list[int]()
    assert tower is not None
    # By the method that runs on what is not cached; a hook would see what is looked up, too.
    real = tower.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        """Count, and encode."""
        rows.append(len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]))
        return real(*args, **kwargs)

    tower.forward = forward
    try:
        read_jobs()
    finally:
        tower.forward = real
    return sum(rows)


def test_an_image_that_is_asked_several_things_is_read_once(model):
    jobs, runner = Jobs(model), make_runner(model)
    first, second = jobs.embed(IMAGES[0]), jobs.chat(IMAGES[0], "What?")
    third, fourth = jobs.chat(IMAGES[0], "Where?"), jobs.embed(IMAGES[0], "words")
    together = [first, second, third, fourth]
    alone = count_crops(model, lambda: model.embed_branches([first.branch]))
    assert count_crops(model, lambda: read(runner, *together)) == alone
    num_tokens = [len(job.job.branch if isinstance(job, Chat) else job.branch) for job in together]
    if model.packing.share_prefixes:
        assert tokens_read(runner) <= sum(num_tokens) - 3 * int(first.branch.image_mask.sum())
    finish(runner)

    # Later, too: behind the same tokens from what the language model made of it, behind others from its features.
    before = tokens_read(runner)
    again, behind_words = jobs.chat(IMAGES[0], "Why?"), jobs.embed("words before ", IMAGES[0])
    expected = answer_alone(model, again), model.embed_branches([behind_words.branch])[0]
    assert count_crops(model, lambda: read(runner, again, behind_words)) == 0
    finish(runner)
    assert again.answer() == expected[0]
    np.testing.assert_allclose(behind_words.future.result(0), expected[1], atol=1e-5)
    saved = again.job.cached_tokens
    assert tokens_read(runner) - before == len(again.job.branch) + len(behind_words.branch) - saved
    assert bool(saved) == model.packing.share_prefixes


@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_answers_are_right_whatever_the_prefix_cache_has_dropped(joining, num_kept):
    jobs = Jobs(joining)
    runner = make_runner(joining)
    read(runner, jobs.embed(IMAGES[1]))
    # Room for some of the images' prefixes.
    runner = make_runner(joining, cache_bytes=int(3 * (num_kept + 0.5) * runner.prefixes._lru.num_bytes))
    rng = Random(0)
    cached = 0
    for _ in range(20):
        image = rng.choice(IMAGES)
        embedding, chat = jobs.embed(image), jobs.chat(image, rng.choice(["What?", "Where is it?"]))
        expected = joining.embed_branches([embedding.branch])[0], answer_alone(joining, chat)
        read(runner, embedding, chat)
        finish(runner)
        np.testing.assert_allclose(embedding.future.result(0), expected[0], atol=1e-5)
        assert chat.answer() == expected[1]
        cached += bool(embedding.cached_tokens)
        assert runner.prefixes._lru.num_bytes <= runner.prefixes._lru.max_bytes
    assert cached < 20
    assert bool(cached) == bool(num_kept)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_models_own_repetition_penalty_is_applied(model, penalty, monkeypatch):
    monkeypatch.setattr(model.lvlm.generation_config, "repetition_penalty", penalty)
    jobs, runner = Jobs(model), make_runner(model)
    chats = [jobs.chat(IMAGES[0], "What? " * number, max_tokens=20) for number in (1, 3)]
    expected = [answer_alone(model, chat) for chat in chats]
    read(runner, *chats)
    finish(runner)
    assert [chat.answer() for chat in chats] == expected
    monkeypatch.setattr(model.lvlm.generation_config, "repetition_penalty", None)
    assert [answer_alone(model, chat) for chat in chats] != expected


def test_a_chat_whose_answer_ends_in_the_step_that_read_it(model):
    jobs, runner = Jobs(model), make_runner(model)
    one, two = jobs.chat(IMAGES[0], "What?", max_tokens=1), jobs.chat(IMAGES[0], "Where?", max_tokens=2)
    expected = [answer_alone(model, one), answer_alone(model, two)]
    read(runner, one, two)
    assert one.answer() == expected[0]
    finish(runner)
    assert two.answer() == expected[1]
    assert [one.pieces[-1].num_tokens, two.pieces[-1].num_tokens] == [1, 2]
    assert has_kept_nothing(runner)
