"""A `Cafe` whose forward passes run in an engine gives any thread what `Cafe` gives."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event
from typing import Any

import numpy as np
import pytest
from engine_samples import IMAGES, TIMEOUT, contents, never_ending, poison, running, wait_until
from model_samples import SMALL, make

from cafe.content import Content
from cafe.errors import RecordError
from cafe.model import Cafe
from cafe.serving import served_model as served_model_module
from cafe.serving.engine import Engine
from cafe.serving.image_workers import ImageWorkers
from cafe.serving.jobs import DeadlineError, EngineError, NotReadyError, OverloadedError
from cafe.serving.served_model import ServedModel

LONG = 1000  # tokens of an answer that does not end by itself before a test is over


@pytest.fixture(scope="module", params=["qwen2_5_vl", "gemma3", "paligemma"])
def model(request: pytest.FixtureRequest) -> Cafe:
    """A model whose chats join and leave, and two whose chats are static batches."""
    return make(request.param)


@pytest.fixture(scope="module")
def engine(model: Cafe) -> Iterator[Engine]:
    with running(model) as started:
        yield started


def serve(engine: Engine, **options: Any) -> ServedModel:
    return ServedModel.of(engine, ImageWorkers(engine.model.chat_processor, num_workers=0), **options)


@pytest.fixture(scope="module")
def served(engine: Engine) -> ServedModel:
    return serve(engine)


def test_embeddings_are_those_of_the_model(model, served):
    asked = contents(model)
    np.testing.assert_allclose(served.embed(asked), model.embed(asked), atol=1e-5)
    np.testing.assert_allclose(served.embed(asked, dim=8), model.embed(asked, dim=8), atol=1e-5)
    assert served.embed([]).shape == model.embed([]).shape
    # Images that are no bytes, too.
    np.testing.assert_allclose(served.embed([[SMALL]]), model.embed([[SMALL]]), atol=1e-5)


def test_answers_are_those_of_the_model_whole_and_streamed(model, served):
    asked = contents(model)
    assert served.generate_batch(asked, 8) == model.generate_batch(asked, 8)
    for image in IMAGES[:2]:
        expected = model.generate(image, "What?", max_new_tokens=8)
        assert served.generate(image, "What?", max_new_tokens=8) == expected
        assert "".join(served.generate(image, "What?", max_new_tokens=8, stream=True)) == expected


def test_scores_and_descriptions_are_those_of_the_model(model, served):
    asked = contents(model)
    answers = [["yes", "no"], ["a circle"]] * len(asked)
    for own, expected in zip(
        served.score_batch(asked, answers[: len(asked)]), model.score_batch(asked, answers[: len(asked)]), strict=True
    ):
        np.testing.assert_allclose(own, expected, atol=1e-4)
    vectors, texts = served.embed_and_generate_batch(IMAGES[:2], "What?", 6)
    expected_vectors, expected_texts = model.embed_and_generate_batch(IMAGES[:2], "What?", 6)
    np.testing.assert_allclose(vectors, expected_vectors, atol=1e-5)
    assert texts == expected_texts


def test_many_threads_use_it_at_once(model, served):
    expected = [model.generate(IMAGES[0], f"What is {number}?", max_new_tokens=6) for number in range(8)]
    vectors = model.embed([[IMAGES[0], f"What is {number}?"] for number in range(8)])

    def use(number: int) -> bool:
        """Use the model in three ways."""
        prompt = f"What is {number}?"
        answers = {
            served.generate(IMAGES[0], prompt, max_new_tokens=6),
            "".join(served.generate(IMAGES[0], prompt, max_new_tokens=6, stream=True)),
        }
        own = served.embed([[IMAGES[0], prompt]])[0]
        return answers == {expected[number]} and np.allclose(own, vectors[number], atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(8)))


def test_sampled_answers_differ_and_are_bounded(served):
    answers = {served.generate(IMAGES[0], "What?", max_new_tokens=12, temperature=2.0) for _ in range(5)}
    assert len(answers) > 1


def test_other_prompts_run_in_the_same_engine(model, served):
    changes = {"image_instruction": "Name it:"}
    expected = model.with_prompts(**changes).embed([[IMAGES[0]]])
    other = served.with_prompts(**changes)
    assert isinstance(other, ServedModel)
    np.testing.assert_allclose(other.embed([[IMAGES[0]]]), expected, atol=1e-5)
    assert not np.allclose(served.embed([[IMAGES[0]]]), expected, atol=1e-3)


def test_a_stream_that_is_closed_frees_its_place(model, engine, served, monkeypatch):
    never_ending(model, monkeypatch)
    stream = served.generate(IMAGES[0], "What?", max_new_tokens=LONG, stream=True)
    wait_until(lambda: engine.num_chats == 1)
    # Closing waits for the stream's thread, which waits for the engine.
    next(stream)
    stream.close()
    wait_until(lambda: engine.num_chats == engine.num_waiting == 0)
    assert served.embed([[IMAGES[0]]]).shape[0] == 1


def test_a_bad_image_is_the_error_of_its_caller(served):
    with pytest.raises(RecordError):
        served.embed([[b"no image"]])
    with pytest.raises(RecordError):
        "".join(served.generate(b"no image", "What?", stream=True))


def test_one_bad_job_of_several_cancels_the_others():
    model = make("qwen2_5_vl")
    poison(model, "~")
    with running(model) as engine:
        served = serve(engine)
        for call in (
            lambda: served.embed(["fine", "~ bad", "also fine"]),
            lambda: served.generate_batch([Content.of("fine"), Content.of("~ bad")], 4),
            lambda: "".join(served.generate(None, "~ bad", max_new_tokens=4, stream=True)),
        ):
            with pytest.raises(EngineError):
                call()
        wait_until(lambda: engine.num_chats == engine.num_waiting == 0)
        assert np.isfinite(served.embed(["fine"])).all()


@contextmanager
def held_up(engine: Engine) -> Iterator[None]:
    """Hold an engine up between two steps until the context ends."""
    begun, go_on = Event(), Event()

    def wait() -> None:
        """Wait for the end."""
        begun.set()
        assert go_on.wait(TIMEOUT)

    engine.run(wait)
    assert begun.wait(TIMEOUT)
    try:
        yield
    finally:
        go_on.set()


def test_what_is_not_done_in_time_is_given_up():
    with running(make("qwen2_5_vl")) as engine, ThreadPoolExecutor(1) as pool:
        served = serve(engine, timeout=0.05)
        with held_up(engine):
            with pytest.raises(DeadlineError):
                served.score_batch(["late"], [["yes"]])
            late = pool.submit(served.embed, ["late"])
            wait_until(lambda: engine.num_waiting == 1)
            [job] = engine._scheduler.others
            wait_until(lambda: job.is_late(time.monotonic()))
        assert isinstance(late.exception(TIMEOUT), DeadlineError)
        assert serve(engine).embed(["in time"]).shape[0] == 1


def test_nobody_waits_for_an_engine_that_hangs(monkeypatch):
    monkeypatch.setattr(served_model_module, "GRACE_SECONDS", 0.0)
    with running(make("qwen2_5_vl")) as engine:
        served = serve(engine, timeout=0.05)
        with held_up(engine):
            with pytest.raises(DeadlineError):
                served.embed(["words"])
            with pytest.raises(DeadlineError):
                "".join(served.generate(None, "words", stream=True))


def test_what_is_refused_leaves_nothing_behind():
    with running(make("qwen2_5_vl"), max_waiting=2) as engine:
        served = serve(engine)
        with held_up(engine), pytest.raises(OverloadedError):
            served.embed(["one", "two", "three"])
        wait_until(lambda: engine.num_waiting == 0)
        assert engine.metrics.registry.get_sample_value("cafe_step_jobs_count") == 0
        assert served.embed(["one", "two"]).shape[0] == 2
    for call in (lambda: served.embed(["stopped"]), lambda: served.score_batch(["stopped"], [["yes"]])):
        with pytest.raises(NotReadyError):
            call()
