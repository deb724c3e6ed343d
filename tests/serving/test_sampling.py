"""Choosing tokens, against formulas in NumPy and transformers' own `generate`."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_samples import make
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from cafe.serving.jobs import EngineError, Sampling
from cafe.serving.sampling import TokenChooser, choose_tokens, keep_nucleus

DEFAULTS = GenerationConfig()
LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0, 2.5, -4.0, 1.0])
NUM_DRAWN = 4000


def chooser(defaults: GenerationConfig = DEFAULTS, prompt: tuple[int, ...] = (), **sampling: object) -> TokenChooser:
    return TokenChooser(Sampling(**sampling), prompt, defaults)  # type: ignore[arg-type]


def nucleus(probabilities: np.ndarray, top_p: float) -> set[int]:
    """Return the smallest set of the likeliest tokens whose probabilities sum up to at least `top_p`."""
    chosen, total = set[int](), 0.0
    for token in np.argsort(-probabilities, kind="stable"):
        if chosen and total >= top_p:
            break
        chosen.add(int(token))
        total += probabilities[token]
    return chosen


def softmax(logits: torch.Tensor, temperature: float) -> np.ndarray:
    scaled = logits.double().numpy() / temperature
    powers = np.exp(scaled - scaled.max())
    return powers / powers.sum()


@given(
    st.lists(st.floats(-8, 8), min_size=1, max_size=30),
    st.floats(0, 1).filter(lambda top_p: top_p < 1),
)
def test_top_p_keeps_the_likeliest_tokens_alone(logits, top_p):
    probabilities = torch.tensor(logits, dtype=torch.float64).softmax(-1)
    kept = keep_nucleus(probabilities, top_p)
    expected = nucleus(probabilities.numpy(), top_p)
    # Of equally likely tokens either may be kept, and a sum may be rounded.
    chosen = kept.nonzero()[:, 0].tolist()
    assert sorted(probabilities[chosen].tolist()) == pytest.approx(sorted(probabilities[list(expected)].tolist()))
    torch.testing.assert_close(kept[chosen], probabilities[chosen])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_tokens_are_drawn_by_their_probabilities(temperature, top_p):
    """A chi-squared test: its statistic is beyond its mean by five deviations once in a million."""
    expected = softmax(LOGITS, temperature)
    kept = nucleus(expected, top_p)
    drawn = chooser(temperature=temperature, top_p=top_p, seed=7)
    counts = np.bincount([drawn.sample(LOGITS) for _ in range(NUM_DRAWN)], minlength=len(LOGITS))
    assert set(np.flatnonzero(counts)) <= kept
    likely = [token for token in kept if expected[token] > 1e-3]
    wanted = expected[likely] / expected[list(kept)].sum() * NUM_DRAWN
    statistic = ((counts[likely] - wanted) ** 2 / wanted).sum()
    assert statistic <= len(likely) + 5 * np.sqrt(2 * len(likely))


def test_a_seed_repeats_and_no_seed_does_not():
    def draw(seed: int | None) -> list[int]:
        drawn = chooser(temperature=1.0, seed=seed)
        return [drawn.sample(LOGITS) for _ in range(40)]

    assert draw(1) == draw(1)
    assert draw(0) == draw(0)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-45, 1e-300])
def test_a_small_temperature_takes_the_likeliest_token(temperature):
    large = LOGITS * 1e4
    assert {chooser(temperature=temperature).sample(large) for _ in range(20)} == {3}


def test_a_large_temperature_draws_evenly():
    drawn = chooser(temperature=1e30, seed=0)
    assert {drawn.sample(LOGITS) for _ in range(400)} == set(range(len(LOGITS)))


def test_tokens_that_are_ruled_out_are_never_drawn():
    ruled_out = LOGITS.index_fill(0, torch.tensor([3, 5]), -torch.inf)
    drawn = chooser(temperature=5.0, top_p=0.99, seed=0)
    assert not {drawn.sample(ruled_out) for _ in range(2000)} & {3, 5}


def test_each_chat_of_a_batch_is_sampled_as_it_asks():
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS, LOGITS])
    likeliest, other, warm = chooser(), chooser(), chooser(temperature=1.0, seed=3)
    penalized = chooser(GenerationConfig(repetition_penalty=2.0), prompt=(3,))
    [expected] = [chooser(temperature=1.0, seed=3).sample(LOGITS)]
    assert choose_tokens(logits, [likeliest, other, warm, penalized]) == [3, 4, expected, 5]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 0}])
def test_logits_that_are_not_finite_fail_one_chat_alone(value, sampling):
    logits = torch.stack([LOGITS, LOGITS, LOGITS])
    logits[1, 6] = value
    first, bad, last = choose_tokens(logits, [chooser(**sampling) for _ in range(3)])
    assert isinstance(bad, EngineError)
    assert isinstance(first, int)
    assert isinstance(last, int)


def test_a_chat_whose_token_cannot_be_drawn_fails_alone():
    broken = chooser(temperature=1.0)
    broken.penalty = "none"  # type: ignore[assignment]
    bad, good = choose_tokens(torch.stack([LOGITS, LOGITS]), [broken, chooser()])
    assert isinstance(bad, EngineError)
    assert good == int(LOGITS.argmax())


def test_a_chat_none_of_whose_tokens_is_possible_fails():
    [bad] = choose_tokens(torch.full((1, 4), -torch.inf), [chooser()])
    assert isinstance(bad, EngineError)


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    prompt = (3, 6)
    own = chooser(GenerationConfig(repetition_penalty=penalty), prompt=prompt)
    context = list(prompt)
    for _ in range(6):
        expected = (
            LOGITS[None]
            if penalty == 1
            else RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([context]), LOGITS[None].clone())
        )
        token = own.sample(LOGITS)
        assert token == int(expected.argmax())
        own.append(token)
        context.append(token)


def test_samples_agree_with_those_of_transformers_in_distribution():
    """The first token of many answers, drawn by both, as a model's logits give them."""
    model = make("llava").lvlm
    prompt = torch.tensor([[60, 70, 80, 90]])
    with torch.no_grad():
        logits = model(input_ids=prompt).logits[0, -1]
    options = {"temperature": 2.0, "top_p": 0.3}
    torch.manual_seed(0)
    answers = model.generate(
        prompt, do_sample=True, max_new_tokens=1, num_return_sequences=NUM_DRAWN, top_k=0, **options
    )
    drawn = chooser(seed=0, **options)
    own = np.bincount([drawn.sample(logits) for _ in range(NUM_DRAWN)], minlength=len(logits)) / NUM_DRAWN
    theirs = np.bincount(answers[:, -1].numpy(), minlength=len(logits)) / NUM_DRAWN
    assert set(np.flatnonzero(own)) == set(np.flatnonzero(theirs))
    np.testing.assert_allclose(own, theirs, atol=0.05)
