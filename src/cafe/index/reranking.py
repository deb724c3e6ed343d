"""Rerank what a search found for words, by how likely the same model is to describe each image in these words.

An embedding compresses an image into one vector before it knows the query; here the model reads the query with the
image before it. Likelihoods of one text are compared across images, so it does not matter how common its words are.
"""

from collections.abc import Sequence

import numpy as np

from cafe.content import Content
from cafe.errors import CafeError
from cafe.index.manifest import Root
from cafe.index.pixels import load_images
from cafe.index.searching import Hit
from cafe.lvlm.prompts import DESCRIBE_PROMPT
from cafe.model import Cafe

NUM_RERANKED = 20  # images that the model reads again


def rerank_hits(model: Cafe, words: str, hits: Sequence[Hit], roots: Sequence[Root]) -> list[Hit]:
    """Put those of the best hits first whose images the model would most likely describe in the words of the query.

    Args:
        model: the model.
        words: the query.
        hits: what was found, the best first. Images that cannot be read any more are put behind those that can.
        roots: what the collection was made of.

    Raises:
        CafeError: the query has no words, or excludes something.
    """
    if not words.strip():
        raise CafeError("Only a query of words can be reranked, not one with an image or with words that it excludes.")
    loaded = load_images(hits[:NUM_RERANKED], roots)
    read = [hit for hit, _ in loaded]
    unread = [hit for hit in hits[:NUM_RERANKED] if hit not in read]
    contents = [Content.of([image, DESCRIBE_PROMPT]) for _, image in loaded]
    likelihoods = [float(scores[0]) for scores in model.score_batch(contents, [[words]] * len(contents))]
    best_first = [read[row] for row in np.argsort(-np.array(likelihoods), kind="stable")]
    return [*best_first, *unread, *hits[NUM_RERANKED:]]
