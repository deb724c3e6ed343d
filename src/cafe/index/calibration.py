"""Turn cosine similarities into scores that mean the same in every collection, for every model.

A model's similarities lie where its training left them: 0.3 may be a match for one and nothing for another. So the
model is asked once, about a sample of the collection's own images: how similar are texts to the image that they
describe, and to the most similar of the others? The texts are the model's own captions. For queries by images alone, an
image is compared with the middle of itself. A logistic curve between both (linear discriminant analysis with equal
variances) gives the score: at 0.5, an image is as likely to be a match as to be the best of 63 images that are none.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image

from cafe.content import Content
from cafe.index.manifest import Calibration, Logistic
from cafe.lvlm.prompts import DESCRIBE_PROMPT
from cafe.model import Cafe

NUM_SAMPLES = 64  # images of the sample
MIN_SAMPLES = 8  # with fewer, similarities are shown as they are
GROWTH = 10  # a collection that has grown so much is calibrated again
MAX_CAPTION_TOKENS = 32
_MARGIN = 0.125  # of an image's side, cut off on each side
_MAX_SLOPE = 200.0  # where matches and others lie apart completely


def calibrate(
    model: Cafe, images: Sequence[Image.Image], vectors: Float32[np.ndarray, "images dim"], num_images: int
) -> Calibration:
    """Measure how similarities of matches and of others are distributed.

    Args:
        model: the collection's model.
        images: a sample of its images.
        vectors: their embeddings.
        num_images: the number of images in the collection.
    """
    if len(images) < MIN_SAMPLES:
        return Calibration(num_images)
    captions = model.generate_batch(_prompts(images), max_new_tokens=MAX_CAPTION_TOKENS)
    # An empty caption describes nothing.
    described = [row for row, caption in enumerate(captions) if caption]
    words = None
    if len(described) >= MIN_SAMPLES:
        words = fit_logistic(model.embed([captions[row] for row in described]) @ vectors[described].T)
    return Calibration(num_images, words, fit_logistic(model.embed([_middle(image) for image in images]) @ vectors.T))


def fit_logistic(similarities: Float[np.ndarray, "queries queries"]) -> Logistic | None:
    """Fit the curve that tells matches, on the diagonal, from the best of the others; None if these are as similar.

    Args:
        similarities: of each query with the image of each.
    """
    matches = np.diagonal(similarities).astype(np.float64)
    # Of the others, the one that a search would find.
    others = np.where(np.eye(len(similarities), dtype=bool), -np.inf, similarities).max(1).astype(np.float64)
    # Linear discriminant analysis in one dimension.
    difference = matches.mean() - others.mean()
    variance = (matches.var() + others.var()) / 2
    if not difference > 0:
        return None
    slope = min(difference / max(variance, 1e-12), _MAX_SLOPE)
    middle = (matches.mean() + others.mean()) / 2
    return Logistic(float(slope), float(-slope * middle))


def apply_logistic(curve: Logistic | None, similarities: Float[np.ndarray, " images"]) -> Float[np.ndarray, " images"]:
    """Return the scores of similarities; these themselves if there is no curve."""
    if curve is None:
        return similarities
    logits = curve.slope * similarities.astype(np.float64) + curve.offset
    return 1 / (1 + np.exp(-np.clip(logits, -50, 50)))


def needs_calibration(calibration: Calibration | None, num_images: int) -> bool:
    """Return whether a collection is to be calibrated: for the first time, or because it has grown."""
    if calibration is None:
        return num_images > 0
    if calibration.num_images < MIN_SAMPLES <= num_images:  # there were too few images
        return True
    return num_images >= GROWTH * max(calibration.num_images, 1)


def _prompts(images: Sequence[Image.Image]) -> list[Content]:
    """Ask for a caption of each image."""
    return [Content.of([image, DESCRIBE_PROMPT]) for image in images]


def _middle(image: Image.Image) -> Image.Image:
    """Return an image without its margins."""
    # As much on each side, so that what is in the middle stays there.
    width, height = image.size
    left, top = int(width * _MARGIN), int(height * _MARGIN)
    return image.crop((left, top, width - left, height - top))
