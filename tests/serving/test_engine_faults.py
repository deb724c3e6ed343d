"""An engine survives errors: its thread is seen to die and replaced, and no job waits for a dead one."""

from concurrent.futures import Future
from threading import Event

import numpy as np
import pytest
import torch
from engine_samples import TIMEOUT, Jobs, break_something, end_thread, never_ending, poison, running, wait_until
from model_samples import make

from cafe.model import Cafe
from cafe.serving.engine import MAX_RESTARTS
from cafe.serving.jobs import EngineError, NotReadyError
from cafe.serving.model_runner import ModelRunner
from cafe.serving.scheduler import Scheduler

LONG = 1000  # tokens of an answer that does not end by itself before a test is over


@pytest.fixture(scope="module")
def model() -> Cafe:
    return make("qwen2_5_vl")


# What ends the thread, and where.
FAULTS = {
    "a step is told to exit": (ModelRunner, "read", end_thread),
    "a bug in the scheduler": (Scheduler, "observe_reading", break_something),
    "a bug in decoding": (ModelRunner, "_advance", break_something),
    "a bug between steps": (Scheduler, "take", break_something),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_thread_that_dies_is_seen_and_replaced(model, fault, monkeypatch):
    never_ending(model, monkeypatch)
    owner, name, action = FAULTS[fault]
    jobs, vector = Jobs(model), model.embed(["words"])[0]
    with running(model, max_chats=2) as engine:
        chats = [jobs.chat("running", max_tokens=LONG) for _ in range(2)] + [jobs.chat("waiting")]
        for chat in chats:
            engine.submit(chat.job)
        wait_until(lambda: all(chat.pieces for chat in chats[:2]))

        died, go_on, check = Event(), Event(), engine._check_model

        def wait_and_check() -> None:
            """Hold the new thread up, so that the time without one can be looked at."""
            died.set()
            assert go_on.wait(TIMEOUT)
            check()

        monkeypatch.setattr(engine, "_check_model", wait_and_check)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, action)
            trigger = jobs.embed("trigger")
            engine.submit(trigger)
            assert died.wait(TIMEOUT)
        assert not engine.is_alive
        assert trigger.future.done()
        for chat in chats:
            assert isinstance(chat.job.future.exception(timeout=0), EngineError)
        assert engine.num_waiting == engine.num_chats == 0
        with pytest.raises(NotReadyError):
            engine.submit(jobs.embed("words"))
        with pytest.raises(NotReadyError):
            engine.run(lambda: 1)

        go_on.set()
        wait_until(lambda: engine.is_alive)
        after = jobs.embed("words")
        engine.submit(after)
        np.testing.assert_allclose(after.future.result(TIMEOUT), vector, atol=1e-5)
        assert engine.metrics.registry.get_sample_value("cafe_engine_restarts_total") == 1


def test_a_thread_that_dies_again_and_again_stays_dead(model, monkeypatch):
    jobs = Jobs(model)
    with running(model) as engine:
        monkeypatch.setattr(engine, "_step", break_something)
        engine.submit(jobs.embed("words"))
        assert engine._watch is not None
        engine._watch.join(TIMEOUT)
        assert not engine._watch.is_alive()
        assert not engine.is_alive
        assert engine.metrics.registry.get_sample_value("cafe_engine_restarts_total") == MAX_RESTARTS
        with pytest.raises(NotReadyError):
            engine.submit(jobs.embed("words"))


def test_a_model_that_does_not_work_any_more_is_not_alive():
    model = make("qwen2_5_vl")
    jobs = Jobs(model)
    with running(model) as engine:
        first = jobs.embed("words")
        engine.submit(first)
        first.future.result(TIMEOUT)
        with torch.no_grad():
            for parameter in model.lvlm.parameters():
                parameter.fill_(torch.nan)
        second = jobs.embed("words")
        engine.submit(second)
        assert isinstance(second.future.exception(TIMEOUT), EngineError)
        wait_until(lambda: not engine._watch.is_alive())
        assert not engine.is_alive


def test_jobs_that_fail_alone_do_not_end_the_thread():
    model = make("qwen2_5_vl")
    jobs = Jobs(model)
    poison(model, "~")
    with running(model) as engine:
        bad = [jobs.embed(f"~ number {number}") for number in range(3)]
        for job in bad:
            engine.submit(job)
        assert all(isinstance(job.future.exception(TIMEOUT), EngineError) for job in bad)
        good = jobs.embed("words")
        engine.submit(good)
        assert np.isfinite(good.future.result(TIMEOUT)).all()
        assert engine.metrics.registry.get_sample_value("cafe_engine_restarts_total") == 0


def test_functions_are_failed_with_the_thread_even_if_others_were_cancelled(model):
    with running(model) as engine:
        begun, go_on = Event(), Event()

        def hold_up() -> None:
            """Hold the thread up until more is waiting."""
            begun.set()
            assert go_on.wait(TIMEOUT)

        first = engine.run(hold_up)
        assert begun.wait(TIMEOUT)
        fatal = engine.run(end_thread)
        in_the_same_step: Future[int] = engine.run(lambda: 1)
        go_on.set()
        first.result(TIMEOUT)
        assert isinstance(fatal.exception(TIMEOUT), EngineError)
        assert isinstance(in_the_same_step.exception(TIMEOUT), EngineError)
        wait_until(lambda: engine.is_alive)

        # A cancelled one is no obstacle for those behind it.
        go_on.clear()
        begun.clear()

        def die_later() -> None:
            """Hold the thread up, and end it."""
            hold_up()
            raise SystemExit

        fatal = engine.run(die_later)
        assert begun.wait(TIMEOUT)
        cancelled, waiting = engine.run(lambda: 1), engine.run(lambda: 1)
        cancelled.cancel()
        go_on.set()
        assert isinstance(waiting.exception(TIMEOUT), EngineError)
        wait_until(lambda: engine.is_alive)
        assert engine.run(lambda: 1).result(TIMEOUT) == 1
