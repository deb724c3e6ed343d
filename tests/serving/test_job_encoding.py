"""Jobs hold what `Cafe` would read, know where their images end, and are refused where they are too long."""

import hashlib
from typing import Any

import families
import numpy as np
import pytest
import torch
from engine_samples import IMAGES, Jobs, contents, png
from hypothesis import given
from hypothesis import strategies as st
from model_samples import SMALL, make

from cafe.content import Content, ImageRef
from cafe.errors import RecordError
from cafe.lvlm.prompts import Message
from cafe.model import Cafe
from cafe.serving.config import RequestLimits
from cafe.serving.encoding import MAX_TOKEN_CHARACTERS, ContextLengthError, JobEncoder, image_key
from cafe.serving.jobs import ChatJob, Sampling


@pytest.fixture(scope="module")
def model() -> Cafe:
    return make("qwen2_5_vl")


DEFAULT = Sampling()


def encoder_of(model: Cafe, context_length: int = 2**30, **limits: Any) -> JobEncoder:
    return JobEncoder(model.chat_processor, RequestLimits(**limits), context_length)


def turn(role: str, *parts: str | None) -> Message:
    """A turn as templates take it; None stands for an image."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def chat(encoder: JobEncoder, messages: list[Message], *images: bytes, sampling: Sampling = DEFAULT) -> ChatJob:
    return encoder.chat(messages, [ImageRef(image) for image in images], sampling, lambda piece: None)


def words_of(model: Cafe, job: ChatJob) -> str:
    return str(model.chat_processor.tokenizer.decode(job.branch.input_ids))


def end_of_last(run: list[int], tokens: list[int]) -> int:
    """Return where the last occurrence of some tokens ends."""
    starts = range(len(tokens) - len(run), -1, -1)
    return next(start + len(run) for start in starts if tokens[start : start + len(run)] == run)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_job_holds_the_tokens_of_cafe_and_knows_where_its_images_end(family):
    model = make(family)
    jobs = Jobs(model)
    for content in contents(model):
        embedding, answer = jobs.embed(*content.parts), jobs.chat(*content.parts).job
        for job, branch in ((embedding, model.encode_embedding(content)), (answer, model.encode_prompt(content))):
            assert torch.equal(job.branch.input_ids, branch.input_ids)
            assert torch.equal(job.branch.image_mask, branch.image_mask)
            for name, tensor in branch.image_inputs.items():
                assert torch.equal(job.branch.image_inputs[name], tensor)
            expected = 0
            if content.images:
                run = model.chat_processor.load_images(content.images).token_runs[-1]
                expected = end_of_last(run, branch.input_ids.tolist())
            assert job.prefix_length == expected < len(job.branch)
            assert bool(job.image_key) == bool(content.images)


@given(st.lists(st.binary(max_size=4), max_size=4), st.lists(st.binary(max_size=4), max_size=4))
def test_the_key_of_images_is_that_of_their_bytes_in_order(first, second):
    keys = [image_key([ImageRef(each) for each in images]) for images in (first, second)]
    assert (keys[0] == keys[1]) == (first == second)
    assert bool(keys[0]) == bool(first)


def test_images_that_are_no_bytes_have_no_key(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    refs = [Content.of([SMALL]).images[0], Content.of(tmp_path / "a.png").images[0]]
    for ref in refs:
        assert image_key([ref]) == image_key([ImageRef(IMAGES[0]), ref]) == ""


def test_a_key_is_long_enough_that_nobody_finds_another_image_with_it():
    assert len(image_key([ImageRef(b"a")])) == hashlib.sha256().digest_size * 2


def test_the_models_system_prompt_comes_first_unless_the_chat_has_its_own(model):
    encoder, prompt = encoder_of(model), model.chat_processor.prompts.system
    own = words_of(model, chat(encoder, [turn("user", "hello")]))
    assert own.count("system") == 1
    assert prompt in own
    other = words_of(model, chat(encoder, [turn("system", "Be rude."), turn("user", "hello")]))
    assert other.count("system") == 1
    assert "Be rude." in other
    assert prompt not in other


def test_a_chat_of_several_turns_has_its_images_in_order(model):
    encoder = encoder_of(model)
    messages = [turn("user", None, "one"), turn("assistant", "yes"), turn("user", "and ", None, "?")]
    job = chat(encoder, messages, IMAGES[0], IMAGES[1])
    swapped = chat(encoder, messages, IMAGES[1], IMAGES[0])
    alone = [model.chat_processor.load_images([ImageRef(image)]) for image in IMAGES[:2]]
    expected = torch.cat([images.inputs["pixel_values"] for images in alone])
    assert torch.equal(job.branch.image_inputs["pixel_values"], expected)
    assert int(job.branch.image_mask.sum()) == sum(map(len, (run for each in alone for run in each.token_runs)))
    assert job.image_key != swapped.image_key
    text = words_of(model, job)
    assert text.index("one") < text.index("yes") < text.index("and ")
    assert text.endswith("assistant\n")
    assert job.prefix_length > len(job.branch) // 2


@pytest.mark.parametrize("family", families.FAMILIES)
def test_words_that_are_special_tokens_stay_words(family):
    """A text that held a placeholder would ask for an image that is not there."""
    model = make(family)
    encoder, tokenizer = encoder_of(model), model.chat_processor.tokenizer
    special = sorted(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    plain = chat(encoder, [turn("user", None, "words")], IMAGES[0])
    hostile = chat(encoder, [turn("user", None, "words" + "".join(special))], IMAGES[0])
    numbers = torch.tensor(sorted(tokenizer.added_tokens_decoder))
    counts = [torch.isin(job.branch.input_ids, numbers).sum() for job in (plain, hostile)]
    assert counts[0] == counts[1]
    assert plain.branch.image_mask.sum() == hostile.branch.image_mask.sum()


def test_options_and_limits_are_those_of_the_job(model):
    encoder, sampling = encoder_of(model, timeout=3.5), Sampling(max_tokens=7, stop=("x",))
    job = chat(encoder, [turn("user", "hello")], sampling=sampling)
    assert (job.sampling, job.timeout) == (sampling, 3.5)
    score = encoder.score([turn("user", "hello")], [], (1, 2))
    assert score.token_ids == (1, 2)
    assert torch.equal(score.branch.input_ids, job.branch.input_ids)
    assert encoder.embedding(Content.of("hello")).timeout == 3.5


def test_an_input_of_more_tokens_than_are_allowed_is_refused(model):
    content = Content.of([IMAGES[0], "words"])
    length = len(model.encode_embedding(content))
    encoder_of(model, max_input_tokens=length).embedding(content)
    with pytest.raises(ContextLengthError, match=f"{length:,} tokens, over the limit of {length - 1:,}"):
        encoder_of(model, max_input_tokens=length - 1).embedding(content)


def test_an_answer_ends_where_the_context_does(model):
    messages = [turn("user", "hello")]
    length = len(chat(encoder_of(model), messages).branch)
    for room, asked, expected in ((1, 8, 1), (5, 8, 5), (9, 8, 8)):
        job = chat(encoder_of(model, length + room), messages, sampling=Sampling(max_tokens=asked, stop=("x",)))
        assert job.sampling == Sampling(max_tokens=expected, stop=("x",))
    for context_length in (length, length - 1):
        with pytest.raises(ContextLengthError):
            chat(encoder_of(model, context_length), messages)
    score = encoder_of(model, length).score(messages, [], (1,))
    assert len(score.branch) == length
    embedding = len(model.encode_embedding(Content.of("hello")))
    encoder_of(model, embedding).embedding(Content.of("hello"))
    with pytest.raises(ContextLengthError, match=f"the limit of {embedding - 1}"):
        encoder_of(model, embedding - 1).embedding(Content.of("hello"))


def test_a_text_that_is_far_too_long_is_refused_before_images_are_read(model):
    encoder = encoder_of(model, max_input_tokens=100)
    text = "a" * (MAX_TOKEN_CHARACTERS * 100 + 1)
    for encode in (
        lambda: encoder.embedding(Content.of([b"no image", text])),
        lambda: chat(encoder, [turn("user", None, text)], b"no image"),
        lambda: chat(encoder, [turn("user", text[:1700]), turn("assistant", text[1700:]), turn("user", "?")]),
    ):
        with pytest.raises(ContextLengthError, match="characters"):
            encode()


@pytest.mark.parametrize("data", [b"", b"no image", png(SMALL)[:60], png(SMALL)[:120]])
def test_bytes_that_are_no_image_are_refused(model, data):
    encoder = encoder_of(model)
    with pytest.raises(RecordError):
        encoder.embedding(Content.of([data]))
    with pytest.raises(RecordError):
        chat(encoder, [turn("user", None)], data)


def test_half_of_a_character_is_refused(model):
    with pytest.raises(RecordError, match="half of a character"):
        encoder_of(model).embedding(Content.of("\ud83d"))


def test_turns_that_the_template_refuses_are_refused(model, monkeypatch):
    strict = make("qwen2_vl")
    template = strict.chat_processor.processor.chat_template
    refusal = "{% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    strict.chat_processor.processor.chat_template = refusal + template
    with pytest.raises(RecordError, match="Roles must alternate"):
        chat(encoder_of(strict), [turn("user", "a"), turn("assistant", "b")])


def test_images_of_any_size_are_read(model):
    encoder, rng = encoder_of(model), np.random.default_rng(0)
    for width, height in rng.integers(1, 90, (6, 2)).tolist():
        job = encoder.embedding(Content.of([png(SMALL.resize((width, height)))]))
        assert job.branch.image_mask.any()
