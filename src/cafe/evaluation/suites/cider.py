"""CIDEr: how similar a caption is to those of people, by the words that tell images apart (arXiv 1411.5726).

CIDEr-D as COCO's caption evaluation computes it, by the package pycocoevalcap. Captions are split into words in lower
case without punctuation; the official evaluation uses a Java program for this, so its numbers may differ slightly.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cafe.content import Content
from cafe.errors import MissingPackageError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate
from cafe.evaluation.suites.captioned_images import RetrievalDataset

PROMPT = "Provide a one-sentence caption for the provided image."
MAX_NEW_TOKENS = 64
# In a folder of its own: a folder with files for retrieval should not run this suite too.
DATASET = RetrievalDataset("cider", ("cider/dataset_*.json",), folders=("val2014", "flickr30k-images"))


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Ask for a caption of each of the first `limit` images."""
    captioned = DATASET.read(data, limit)
    references: list[list[str]] = [[] for _ in captioned.images]
    for text, owner in zip(captioned.texts, captioned.owner, strict=True):
        references[owner].append(text)
    prompts = [Content.of([image, PROMPT]) for image in captioned.images]
    captions = model.generate(prompts, MAX_NEW_TOKENS)
    # The weights of words depend on all references, so all captions are scored at once.
    scores = cider(captions, references)
    rows = []
    for number, (name, caption, score) in enumerate(zip(captioned.names, captions, scores, strict=True)):
        # As a result in percent, this is CIDEr as papers report it: 100 times the mean.
        marks = {"cider/CIDEr": float(score)}
        rows.append({"id": number, "group": name, "image": name, "said": caption, "marks": marks})
    return EvaluationResult(aggregate(rows), {"cider": rows})


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " captions"]:
    """Compute CIDEr-D of each caption, from 0 to 10; words are weighted by their counts in these references.

    Args:
        captions: one for each image.
        references: people's captions of each image.

    Raises:
        MissingPackageError: the package pycocoevalcap is not installed.
    """
    if not find_spec("pycocoevalcap"):
        raise MissingPackageError("CIDEr needs the package pycocoevalcap: pip install 'cafe-lvlm[captions]'.")
    from pycocoevalcap.cider.cider import Cider

    # Both by the image's number, as the package wants them.
    candidates = {number: [words(text)] for number, text in enumerate(captions)}
    targets = {number: [words(text) for text in texts] for number, texts in enumerate(references)}
    _, scores = Cider().compute_score(targets, candidates)
    return np.asarray(scores, np.float64)


def words(text: str) -> str:
    """Split a text into words in lower case, joined by single spaces."""
    # A word may hold apostrophes and hyphens, but neither begin nor end with them.
    return " ".join(re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.lower()))


CIDER = Suite(
    name="cider",
    measures="captions by their similarity to those of people",
    files=(
        "cider/dataset_*.json: a Karpathy file, its split 'test'",
        "its images, in the folder itself, images/, val2014/ or flickr30k-images/",
    ),
    download="cs.stanford.edu/people/karpathy/deepimagesent (captions); cocodataset.org (2014 Val images)",
    sources=("arXiv 1411.5726",),
    find_files=DATASET.find,
    run=run,
    default=False,
)
