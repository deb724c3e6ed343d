"""Rerank what a search found, by asking the same model of each image whether it matches the query."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from cafe.content import Content
from cafe.errors import CafeError
from cafe.index.manifest import Root
from cafe.index.pixels import load_image
from cafe.index.query import Query
from cafe.index.searching import Hit
from cafe.lvlm.forward import forward_packed
from cafe.mining.judge import yes_probability
from cafe.model import Cafe
from cafe.packing import pack

NUM_RERANKED = 20  # images that the model is asked about
BATCH_SIZE = 8  # images per forward pass
QUESTION = "\nDo these match? Answer yes or no."
_SMALLEST = 1e-6  # probability, so that its logarithm is finite


def rerank_hits(model: Cafe, query: Query, hits: Sequence[Hit], roots: Sequence[Root]) -> list[Hit]:
    """Put those of the best hits first that the model says match the query.

    The odds of "yes" against "no" are multiplied by odds of a match by the search, which fall as 1 / rank. By rank and
    not by score, because the order comes from captions and names too, of which the score knows nothing.

    Args:
        model: answers.
        query: what is searched for; terms that exclude something are not asked about.
        hits: what was found, the best first.
        roots: what the collection was made of.
    """
    wanted = [part for term in query.terms if term.weight > 0 for part in term.content.parts]
    contents, judged = [], []
    for hit in hits[:NUM_RERANKED]:
        try:
            image = load_image(hit.id, hit.path, hit.page, roots)
        except CafeError:  # gone since it was indexed: it stays behind those that can be judged
            continue
        contents.append(Content((*Content.of(image).parts, "\n", *wanted, QUESTION)))
        judged.append(hit)
    if not judged:
        return list(hits)
    odds = _log_odds(_ask(model, contents)) - np.log(np.arange(1, len(judged) + 1))
    best_first = [judged[row] for row in np.argsort(-odds, kind="stable")]
    ids = {hit.id for hit in judged}
    return best_first + [hit for hit in hits if hit.id not in ids]


@torch.inference_mode()
def _ask(model: Cafe, contents: Sequence[Content]) -> Float[np.ndarray, " contents"]:
    """Return the probability that the model says yes to each prompt."""
    probabilities = []
    for start in range(0, len(contents), BATCH_SIZE):
        prompts = [[model.encode_prompt(content)] for content in contents[start : start + BATCH_SIZE]]
        hidden, _ = forward_packed(model.lvlm, pack(prompts, [[]] * len(prompts), model.packing))
        probabilities.append(yes_probability(model, hidden).float().cpu().numpy())
    return np.concatenate(probabilities)


def _log_odds(probabilities: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the logarithm of the odds of probabilities."""
    clipped = np.clip(probabilities.astype(np.float64), _SMALLEST, 1 - _SMALLEST)
    return np.log(clipped) - np.log1p(-clipped)
