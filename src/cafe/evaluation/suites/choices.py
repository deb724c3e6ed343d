"""Which of several captions fits an image, asked in the two ways that one model can answer.

| method | a caption's score |
|---|---|
| `embedding` | cosine of the image's embedding and the caption's |
| `likelihood` | log-likelihood of the caption as the answer to `DESCRIBE_PROMPT`, in nats (`Cafe.score`) |
| `gain` | the same minus the caption's log-likelihood without the image: what seeing adds |

Likelihood alone prefers plausible and short captions, which a model finds without looking (arXiv 2306.01879); `gain`
corrects for that. The right caption must score higher than every other: ties count against the model.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Float

from cafe.content import Content
from cafe.evaluation.cached_model import CachedModel
from cafe.lvlm.prompts import DESCRIBE_PROMPT

METHODS = ("embedding", "likelihood", "gain")
# Scores closer than this count as equal: equal contents may differ by this much in float32.
MARGINS = {"embedding": 1e-6, "likelihood": 1e-4, "gain": 1e-4}
NUM_AT_ONCE = 2048  # images whose scores are computed before the next are opened

Scores = dict[str, list[Float[np.ndarray, " captions"]]]


def score(model: CachedModel, images: Sequence[Any], captions: Sequence[Sequence[str]]) -> Scores:
    """Score the captions of each image by every method.

    Args:
        model: the model.
        images: whatever `Content.of` takes. An image that comes several times is embedded once.
        captions: some captions for each image.
    """
    texts = list(dict.fromkeys(chain.from_iterable(captions)))
    prompts = [Content((*Content.of(image).parts, DESCRIBE_PROMPT)) for image in images]
    embedding = _cosines(model, images, captions, texts)
    likelihood = model.score(prompts, captions)
    # What the captions get without the image, each text once.
    without_image = model.score([DESCRIBE_PROMPT] * len(texts), [[text] for text in texts])
    prior = {text: scores[0] for text, scores in zip(texts, without_image, strict=True)}
    gain = []
    for scores, choices in zip(likelihood, captions, strict=True):
        gain.append(scores - np.array([prior[caption] for caption in choices]))
    return {"embedding": embedding, "likelihood": likelihood, "gain": gain}


def _cosines(
    model: CachedModel, images: Sequence[Any], captions: Sequence[Sequence[str]], texts: list[str]
) -> list[Float[np.ndarray, " captions"]]:
    """Compute the cosine of each image with its captions; equal images and texts are embedded once."""
    unique = list(dict.fromkeys(images))
    image_vectors = dict(zip(unique, model.embed(unique), strict=True))
    text_vectors = dict(zip(texts, model.embed(texts), strict=True))
    # The vectors have length 1, so their products are cosines.
    cosines = []
    for image, choices in zip(images, captions, strict=True):
        candidates = np.stack([text_vectors[caption] for caption in choices])
        cosines.append(candidates @ image_vectors[image])
    return cosines


def first_is_best(scores: Float[np.ndarray, " captions"], method: str) -> bool:
    """Tell whether the first caption scores higher than each of the others."""
    return bool((scores[0] > scores[1:] + MARGINS[method]).all())


def judge_choices(scores: Scores, number: int, part: str) -> dict[str, Any]:
    """Make an image's output row: its captions' scores, and whether the first caption is best by each method.

    Args:
        scores: what `score` returned.
        number: of the image.
        part: the results that the image counts for, without the method.
    """
    values: dict[str, list[float]] = {}
    marks: dict[str, int] = {}
    for method in METHODS:
        own = scores[method][number]
        values[method] = own.tolist()
        marks[f"{part}/{method}"] = int(first_is_best(own, method))
    return {"scores": values, "marks": marks}
