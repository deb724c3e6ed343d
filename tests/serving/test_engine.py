"""The engine: the answers of every family are those of `Cafe`, whoever else is served, and it takes what it can."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from threading import Event
from typing import Any

import families
import numpy as np
import pytest
from engine_samples import (
    IMAGES,
    TIMEOUT,
    Jobs,
    answer_alone,
    break_something,
    contents,
    never_ending,
    running,
    wait_until,
)
from model_samples import READ_ONE_BY_ONE, make

from cafe.content import Content
from cafe.lvlm.content_encoder import ContentEncoder
from cafe.model import Cafe
from cafe.serving import engine as engine_module
from cafe.serving.config import EngineConfig
from cafe.serving.engine import Engine
from cafe.serving.jobs import DeadlineError, EngineError, NotReadyError, OverloadedError, ScoreJob

JOINING, STATIC = "qwen2_5_vl", "gemma3"
LONG = 1000  # tokens of an answer that does not end by itself before a test is over
MIN_COSINE = 0.9999
NUM_THREADS = 32


@pytest.fixture(scope="module")
def model() -> Cafe:
    return make(JOINING)


@pytest.fixture(scope="module", params=[JOINING, STATIC])
def either(request: pytest.FixtureRequest) -> Cafe:
    """A model whose chats join and leave, and one whose chats are static batches."""
    return make(request.param)


def answer_of(model: Cafe, content: Content, max_tokens: int) -> str:
    """Answer a content by `Cafe`, alone."""
    *images, words = content.parts
    if images and all(not isinstance(image, str) for image in images):
        return str(model.generate(list(images), words, max_new_tokens=max_tokens))
    return model.generate_batch([content], max_tokens)[0]


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_is_served_what_it_says_alone(family):
    model = make(family)
    model.lvlm.double()  # or rounding, which depends on the others in a batch, could choose another token
    asked, rng = contents(model), Random(0)
    lengths = [rng.choice([1, 3, 9, 14]) for _ in asked]
    vectors = [model.embed([content])[0] for content in asked]
    answers = [answer_of(model, content, length) for content, length in zip(asked, lengths, strict=True)]

    jobs = Jobs(model)
    with running(model, max_chats=5, step_tokens=400) as engine:
        for _ in range(2):  # the second time from what was kept
            embeddings = [jobs.embed(*content.parts) for content in asked]
            chats = [jobs.chat(*each.parts, max_tokens=n) for each, n in zip(asked, lengths, strict=True)]
            others = [jobs.chat(*content.parts, max_tokens=LONG) for content in asked[:2]]
            # Some at first, the others while these run; and some leave before they are done.
            engine.submit(others[0].job)
            for job in [embeddings[0], *(chat.job for chat in chats[1::2])]:
                engine.submit(job)
            wait_until(lambda others=others: engine.num_chats or others[0].job.future.done())
            for job in [others[1].job, *(chat.job for chat in chats[::2]), *embeddings[1:]]:
                engine.submit(job)
            others[0].job.future.cancel()
            wait_until(lambda: not engine.num_waiting)
            others[1].job.future.cancel()
            assert [chat.answer() for chat in chats] == answers
            for job, vector in zip(embeddings, vectors, strict=True):
                assert job.future.result(TIMEOUT) @ vector >= MIN_COSINE
    cached = [job.cached_tokens for job in [*embeddings, *(chat.job for chat in chats)]]
    expected = [bool(content.images) and family not in READ_ONE_BY_ONE for content in asked]
    assert [bool(number) for number in cached] == expected * 2


def test_many_threads_get_right_answers(either):
    asked, jobs = contents(either), Jobs(either)
    answers = [answer_of(either, content, 6) for content in asked]
    vectors = either.embed(asked)
    scores = [either.score_batch([content], [["yes", "no"]])[0] for content in asked]

    def ask(thread: int) -> list[str]:
        """Submit jobs of every kind, some of which are cancelled; return what went wrong."""
        rng, wrong = Random(thread), list[str]()
        for _ in range(6):
            index = rng.randrange(len(asked))
            parts, kind = asked[index].parts, rng.choice(["embed", "chat", "chat", "cancel", "score", "abandon"])
            if kind == "embed":
                job = jobs.embed(*parts)
                engine.submit(job)
                ok = job.future.result(TIMEOUT) @ vectors[index] >= MIN_COSINE
            elif kind == "score":
                branches = [encoder.encode_answers(asked[index], ["yes", "no"])]
                result = engine.run(lambda branches=branches: either._score(branches)).result(TIMEOUT)
                ok = np.allclose(result[0], scores[index], atol=1e-4)
            else:
                chat = jobs.chat(*parts, max_tokens=6 if kind == "chat" else 50)
                engine.submit(chat.job)
                if kind == "chat":
                    ok = chat.answer() == answers[index]
                else:
                    if kind == "cancel":
                        wait_until(lambda chat=chat: chat.pieces or chat.job.future.done())
                    ok = chat.job.future.cancel() or chat.job.future.done()
            if not ok:
                wrong.append(f"{kind} {index}")
        return wrong

    encoder = ContentEncoder(either.chat_processor)
    with running(either) as engine, ThreadPoolExecutor(NUM_THREADS) as pool:
        assert [wrong for wrong in pool.map(ask, range(NUM_THREADS)) if wrong] == []
        wait_until(lambda: engine.num_chats == engine.num_waiting == 0)
        assert engine.is_alive
        assert engine.metrics.registry.get_sample_value("cafe_engine_restarts_total") == 0


def test_stopping_finishes_what_was_taken_and_refuses_what_comes(either):
    jobs = Jobs(either)
    with running(either, max_chats=2) as engine:
        chats = [jobs.chat(IMAGES[0], f"number {number}", max_tokens=20) for number in range(5)]
        expected = [answer_alone(either, chat) for chat in chats]
        embedding = jobs.embed(IMAGES[1])
        for chat in chats:
            engine.submit(chat.job)
        engine.submit(embedding)
        call = engine.run(lambda: "called")
        with ThreadPoolExecutor(1) as pool:
            stopping = pool.submit(engine.stop, TIMEOUT)
            wait_until(lambda: engine._is_stopping)
            for submit in (lambda: engine.submit(jobs.embed("late")), lambda: engine.run(lambda: 1)):
                with pytest.raises(NotReadyError):
                    submit()
            stopping.result(TIMEOUT)
        assert [chat.answer() for chat in chats] == expected
        assert embedding.future.done()
        assert call.result(0) == "called"
        assert not engine.is_alive
        engine.stop()  # once more does nothing


def test_stopping_fails_what_takes_too_long(either, monkeypatch):
    never_ending(either, monkeypatch)
    jobs = Jobs(either)
    with running(either, max_chats=1) as engine:
        chats = [jobs.chat("endless", max_tokens=LONG) for _ in range(2)]
        for chat in chats:
            engine.submit(chat.job)
        wait_until(lambda: chats[0].pieces)
        engine.stop(0.01)
        wait_until(lambda: not engine._watch.is_alive())
        assert all(isinstance(chat.job.future.exception(0), EngineError) for chat in chats)
        assert not engine.is_alive


def test_an_engine_that_was_never_started_takes_nothing_and_stops(model):
    engine = Engine(model)
    with pytest.raises(NotReadyError):
        engine.submit(Jobs(model).embed("words"))
    engine.stop()


def step_by_step(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Hold an engine up before each step; return a function that lets it do one."""
    step, begin, ended = engine._step, Event(), Event()

    def held_up() -> bool:
        """Wait, and do a step."""
        assert begin.wait(TIMEOUT)
        begin.clear()
        is_more = step()
        ended.set()
        return is_more

    def do_step() -> None:
        """Let the engine do a step, and wait for its end."""
        ended.clear()
        begin.set()
        assert ended.wait(TIMEOUT)

    monkeypatch.setattr(engine, "_step", held_up)
    return do_step


def make_held_up(model: Cafe, monkeypatch: pytest.MonkeyPatch, **config: Any) -> tuple[Engine, Callable[[], None]]:
    engine = Engine(model, EngineConfig(**config))
    do_step = step_by_step(engine, monkeypatch)
    engine.start()
    wait_until(lambda: engine.is_alive)
    return engine, do_step


def test_a_cancelled_chat_frees_its_place_within_a_step(either, monkeypatch):
    never_ending(either, monkeypatch)
    jobs = Jobs(either)
    chats = [jobs.chat(f"number {number}", max_tokens=LONG) for number in range(4)]
    engine, do_step = make_held_up(either, monkeypatch, max_chats=3)
    for chat in chats:
        engine.submit(chat.job)
    do_step()
    assert (engine.num_chats, engine.num_waiting) == (3, 1)
    # Neither the last one nor the first: another moves into its place.
    chats[1].job.future.cancel()
    do_step()
    assert engine.num_chats == 2
    waiting = jobs.chat("cancelled while it waits", max_tokens=LONG)
    engine.submit(waiting.job)
    waiting.job.future.cancel()
    do_step()
    assert engine.num_waiting <= 1
    num_pieces = len(chats[1].pieces)
    do_step()
    assert len(chats[1].pieces) == num_pieces
    for chat in chats:
        chat.job.future.cancel()
    do_step()
    assert engine.num_chats == 0
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(engine.stop, TIMEOUT)
        wait_until(lambda: engine._is_stopping)
        do_step()
        stopping.result(TIMEOUT)


def test_a_job_that_is_late_fails_by_its_deadline_waiting_or_running(either, monkeypatch):
    never_ending(either, monkeypatch)
    jobs = Jobs(either)
    with running(either, max_chats=1) as engine:
        chats = [jobs.chat("endless", max_tokens=LONG) for _ in range(2)]
        for chat in chats:
            chat.job.timeout = 0.3
            engine.submit(chat.job)
        assert [type(chat.job.future.exception(TIMEOUT)) for chat in chats] == [DeadlineError, DeadlineError]
        assert chats[0].pieces
        assert not chats[1].pieces
        wait_until(lambda: engine.num_chats == engine.num_waiting == 0)
        assert engine.is_alive


def test_functions_are_called_between_steps_and_their_errors_are_theirs(model, monkeypatch):
    never_ending(model, monkeypatch)
    jobs = Jobs(model)
    with running(model) as engine:
        chat = jobs.chat("endless", max_tokens=LONG)
        engine.submit(chat.job)
        wait_until(lambda: chat.pieces)
        assert engine.run(lambda: engine._runner.num_chats).result(TIMEOUT) == 1
        assert isinstance(engine.run(break_something).exception(TIMEOUT), KeyError)
        chat.job.future.cancel()
        assert engine.is_alive


def test_chats_have_a_token_between_two_functions(model, monkeypatch):
    never_ending(model, monkeypatch)
    jobs = Jobs(model)
    chat = jobs.chat("endless", max_tokens=LONG)
    engine, do_step = make_held_up(model, monkeypatch)
    engine.submit(chat.job)
    do_step()
    [running_chat] = engine._runner.slots.chats
    before = running_chat.num_tokens
    counts = [engine.run(lambda: running_chat.num_tokens) for _ in range(3)]
    for _ in counts:
        do_step()
    assert [count.result(0) for count in counts] == [before, before + 1, before + 2]
    chat.job.future.cancel()
    do_step()
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(engine.stop, TIMEOUT)
        wait_until(lambda: engine._is_stopping)
        do_step()
        stopping.result(TIMEOUT)


def test_more_than_may_wait_is_refused(model):
    jobs = Jobs(model)
    with running(model, max_waiting=2) as engine:
        begun, go_on = Event(), Event()

        def hold_up() -> None:
            """Hold the thread up."""
            begun.set()
            assert go_on.wait(TIMEOUT)

        engine.run(hold_up)
        assert begun.wait(TIMEOUT)
        taken = [jobs.embed("words") for _ in range(2)]
        calls = [engine.run(lambda: 1) for _ in range(2)]
        for job in taken:
            engine.submit(job)
        with pytest.raises(OverloadedError):
            engine.submit(jobs.embed("words"))
        with pytest.raises(OverloadedError):
            engine.run(lambda: 1)
        assert engine.num_waiting == 2
        go_on.set()
        for future in [*calls, *(job.future for job in taken)]:
            future.result(TIMEOUT)


def test_a_thread_that_works_or_waits_gives_signs_of_life(model, monkeypatch):
    monkeypatch.setattr(engine_module, "MAX_IDLE", 0.01)
    with running(model) as engine:
        before = engine._heartbeat
        wait_until(lambda: engine._heartbeat > before)
        assert engine.heartbeat_age < TIMEOUT


def test_scores_are_logits_of_the_model_itself(model):
    jobs = Jobs(model)
    branch = jobs.chat(IMAGES[0], "Yes or no?").job.branch
    with running(model) as engine:
        whole = ScoreJob(branch=branch, token_ids=tuple(range(10)))
        part = ScoreJob(branch=branch, token_ids=(7, 2))
        for job in (whole, part):
            engine.submit(job)
        np.testing.assert_allclose(part.future.result(TIMEOUT), whole.future.result(TIMEOUT)[[7, 2]], atol=1e-5)
