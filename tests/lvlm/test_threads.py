"""Several threads with one model: each gets what it gets alone, by every method and in every family."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import families
import numpy as np
import pytest
from model_samples import SMALL, TALL, WIDE, make

from cafe import Cafe
from cafe.content import Content

NUM_THREADS = 8
# Of several shapes and lengths, so that a state that one call leaves behind is wrong for the next.
IMAGES = [SMALL, TALL, WIDE]
PROMPTS = ["What?", "Describe what is in this image, in a few words."]


def calls(model: Cafe) -> list[partial[Any]]:
    """Make calls of every method, of different images and texts."""
    made = []
    for image in IMAGES:
        for prompt in PROMPTS:
            made += [
                partial(model.embed_and_generate, image, prompt, max_new_tokens=4),
                partial(model.generate, image, prompt, max_new_tokens=4),
                partial(model.embed, [{"image": image, "text": prompt}, prompt]),
            ]
        made += [
            partial(lambda image: "".join(model.generate(image, "What?", 4, stream=True)), image),
            partial(model.embed_and_generate_batch, [image, *IMAGES], "What?", 4),
            partial(model.generate_batch, [Content.of([image, words]) for words in PROMPTS], 4),
            partial(model.score_batch, [[image, "What?"]], [["a circle", "nothing"]]),
        ]
    return made


@pytest.mark.parametrize("family", families.FAMILIES)
def test_eight_threads_get_what_one_gets(family):
    model = make(family)
    model.lvlm.double()  # or rounding, which depends on nothing here, could choose another token
    work = calls(model)
    alone = [call() for call in work]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        together = list(pool.map(lambda call: call(), work))
    for one, other in zip(alone, together, strict=True):
        assert_same(one, other)


def assert_same(one: Any, other: Any) -> None:
    """Compare texts exactly, and numbers up to rounding."""
    if isinstance(one, str):
        assert one == other
    elif isinstance(one, np.ndarray):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)
    else:
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
