"""Which of several captions fits a picture, asked both ways that one model can answer.

| way | a caption's score |
|---|---|
| `embedding` | cosine of the picture's embedding and the caption's |
| `likelihood` | log-likelihood of the caption as the answer to "Describe the image.", in nats (`Cafe.score`) |
| `gain` | the same less the caption's log-likelihood without the picture: what seeing adds |

Likelihood alone prefers plausible and short captions, which a model finds without looking (arXiv 2306.01879); `gain`
takes that away. The right caption has to score higher than every other: ties count against the model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cafe.content import Content
from cafe.evaluation.cached_model import CachedModel

WAYS = ("embedding", "likelihood", "gain")
PROMPT = "Describe the image."
# Scores this near are one: equal contents may differ by this in float32.
MARGINS = {"embedding": 1e-6, "likelihood": 1e-4, "gain": 1e-4}
AT_ONCE = 2048  # pictures whose scores are computed before the next are opened

Scores = dict[str, list[Float[np.ndarray, " captions"]]]


def score(model: CachedModel, pictures: Sequence[Any], captions: Sequence[Sequence[str]]) -> Scores:
    """By way, the scores of each picture's captions.

    Args:
        model: the model.
        pictures: whatever `Content.of` takes. The same one may come several times: it is embedded once.
        captions: some captions of each picture.
    """
    seen = list(dict.fromkeys(pictures))
    said = list(dict.fromkeys(caption for some in captions for caption in some))
    rows = {picture: row for picture, row in zip(seen, model.embed(seen), strict=True)}
    columns = {caption: row for caption, row in zip(said, model.embed(said), strict=True)}
    asked = [Content((*Content.of(picture).parts, PROMPT)) for picture in pictures]
    likelihood = model.score(asked, captions)
    blind = model.score([PROMPT] * len(said), [[caption] for caption in said])
    prior = {caption: alone[0] for caption, alone in zip(said, blind, strict=True)}
    return {
        "embedding": [
            np.stack([columns[caption] for caption in some]) @ rows[picture]
            for picture, some in zip(pictures, captions, strict=True)
        ],
        "likelihood": likelihood,
        "gain": [
            seen - np.array([prior[caption] for caption in some])
            for seen, some in zip(likelihood, captions, strict=True)
        ],
    }


def first_is_best(scores: Float[np.ndarray, " captions"], way: str) -> bool:
    """Whether the first caption scores higher than each of the others."""
    return bool((scores[0] > scores[1:] + MARGINS[way]).all())


def judge_choices(scores: Scores, number: int, name: str) -> dict[str, Any]:
    """By way, the scores of one picture's captions and the marks whether the first is ahead, for the picture's row.

    Args:
        scores: what `score` gave.
        number: of the picture.
        name: the result that it counts for, less the way.
    """
    found = {way: scores[way][number] for way in WAYS}
    marks = {f"{name}/{way}": int(first_is_best(each, way)) for way, each in found.items()}
    return {"scores": {way: each.tolist() for way, each in found.items()}, "marks": marks}
