"""Fuse rankings of the same images that were made in different ways."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64, Int64

RANK_CONSTANT = 60


def fuse_ranks(rankings: Sequence[Int64[np.ndarray, " _ranked"]], num_images: int) -> Float64[np.ndarray, " images"]:
    """Return for each image the sum of 1 / (60 + rank) over all rankings that have it.

    Reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009).

    Args:
        rankings: the numbers of images, the best first, each image at most once.
        num_images: the number of all images.
    """
    total = np.zeros(num_images)
    for ranking in rankings:
        total[ranking] += 1 / (RANK_CONSTANT + 1 + np.arange(len(ranking)))
    return total
