"""CIDEr: how like the captions of people a caption is, by the words that tell pictures apart (arXiv 1411.5726).

CIDEr-D as COCO's caption evaluation computes it, by the package pycocoevalcap. Captions are cut into words in lower
case without punctuation; the official evaluation cuts them with a Java program, so its numbers may differ a little.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from jaxtyping import Float

from cafe.content import Content
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate
from cafe.evaluation.suites.retrieval import RetrievalDataset

PROMPT = "Provide a one-sentence caption for the provided image."
MAX_NEW_TOKENS = 64  # tokens of a caption
# A folder of its own: where retrieval is measured, captions are not asked for without a word.
HOME = RetrievalDataset("cider", ("cider/dataset_*.json",), folders=("val2014", "flickr30k-images"))


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Asks for a caption of each of the first `limit` pictures."""
    collection = HOME.read(data, limit)
    references = [
        [text for text, owner in zip(collection.texts, collection.owner, strict=True) if owner == number]
        for number in range(len(collection.pictures))
    ]
    said = model.generate([Content.of([picture, PROMPT]) for picture in collection.pictures], MAX_NEW_TOKENS)
    scores = cider(said, references)
    rows = [
        {"id": number, "group": name, "image": name, "said": text, "marks": {"cider/CIDEr": float(score)}}
        for number, (name, text, score) in enumerate(zip(collection.names, said, scores, strict=True))
    ]
    return EvaluationResult(aggregate(rows), {"cider": rows})


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float[np.ndarray, " captions"]:
    """CIDEr-D of each caption, from 0 to 10; the weights of words are counted in these references.

    Raises:
        CafeError: the package pycocoevalcap is not installed.
    """
    if not find_spec("pycocoevalcap"):
        raise CafeError("CIDEr needs the package pycocoevalcap: pip install 'cafe-lvlm[captions]'.")
    from pycocoevalcap.cider.cider import Cider

    said = {number: [words(text)] for number, text in enumerate(captions)}
    wanted = {number: [words(text) for text in texts] for number, texts in enumerate(references)}
    _, scores = Cider().compute_score(wanted, said)
    return np.asarray(scores, np.float64)


def words(text: str) -> str:
    """The words of a text in lower case, a space between."""
    return " ".join(re.findall(r"[^\W_]+(?:['-][^\W_]+)*", text.lower()))


CIDER = Suite(
    name="cider",
    measures="captions by their likeness to those of people",
    files=(
        "cider/dataset_*.json: a Karpathy file, its split 'test'",
        "its pictures, in the folder itself, images/, val2014/ or flickr30k-images/",
    ),
    download="cs.stanford.edu/people/karpathy/deepimagesent (captions); cocodataset.org (2014 Val images)",
    sources=("arXiv 1411.5726",),
    find_files=HOME.find,
    run=run,
    default=False,
)
