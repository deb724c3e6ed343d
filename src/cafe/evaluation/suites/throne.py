"""THRONE: a free description, judged class by class from its text alone (arXiv 2405.05256).

Judges are asked about each class several times in other words whether the description implies that such an object is
there. Only where all their answers agree does the pair of picture and class count; the others are left out. From the
pairs that count: precision, recall, F1 and F0.5 of each class, averaged over classes ("class"), and over all pairs at
once ("overall").

A class that never was said and never was there has no say; one with no right pair has F = 0. (The authors' code leaves
such classes out of the mean of F.) The questions are ours: the paper's have other words.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from cafe.content import Content, ImageRef
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.judges import require_judges, votes
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate, find_image
from cafe.evaluation.suites.coco import find_instances, read_instances

YEAR = "val2017"
PROMPT = "Describe this image in detail."
MAX_NEW_TOKENS = 512  # tokens of a description
BETAS = {"F1": 1.0, "F0.5": 0.5}


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Asks for a description of each of the first `limit` pictures, and the judges about each description."""
    require_judges(model.judges)
    source = find(data)[0]
    pictures = read_instances(source, limit)
    at = {number: find_image(name, data, source, YEAR) for number, name in pictures.names.items()}
    ask = pictures.prompt or PROMPT
    said = model.generate([Content((ImageRef(data / path), ask)) for path in at.values()], MAX_NEW_TOKENS)
    cast = votes(model, said, pictures.vocabulary)
    classes = pictures.vocabulary.classes
    present = np.array([[name in pictures.objects[number] for name in classes] for number in at])
    stated, split = agreement(cast)
    rows = []
    for index, (number, path) in enumerate(at.items()):
        row = {"id": number, "group": str(path), "image": str(path), "said": said[index]}
        for name, which in (("stated", stated), ("split", split), ("objects", present)):
            row[name] = [classes[place] for place in np.flatnonzero(which[index])]
        rows.append({**row, "marks": contributions(stated[index], split[index], present[index])})
    results = aggregate(rows) | class_scores(stated, split, present)
    return EvaluationResult(results, {"throne": rows}, {"throne": {"judges": list(model.judges)}})


Pairs = Bool[np.ndarray, "pictures classes"]


def agreement(cast: Bool[np.ndarray, "votes pictures classes"]) -> tuple[Pairs, Pairs]:
    """The pairs of which all votes say that they are there, and those on which the votes are split."""
    said = cast.sum(axis=0)
    return said == len(cast), (said > 0) & (said < len(cast))


def contributions(
    stated: Bool[np.ndarray, " classes"], split: Bool[np.ndarray, " classes"], present: Bool[np.ndarray, " classes"]
) -> dict[str, Any]:
    """What a picture counts for in the overall scores, which are shares of sums over all pairs that are not split."""
    hits, said, true = (int((which & ~split).sum()) for which in (stated & present, stated, present))
    return {
        "throne/overall/precision": [hits, said],
        "throne/overall/recall": [hits, true],
        **{f"throne/overall/{f}": [(1 + b * b) * hits, said + b * b * true] for f, b in BETAS.items()},
        "throne/overall/split": [int(split.sum()), len(split)],
    }


def class_scores(stated: Pairs, split: Pairs, present: Pairs) -> dict[str, float]:
    """Each score averaged over the classes for which it is defined, in percent."""
    hits, said, true = ((which & ~split).sum(axis=0) for which in (stated & present, stated, present))
    of_class = {
        "precision": (hits, said),
        "recall": (hits, true),
        **{f: ((1 + b * b) * hits, said + b * b * true) for f, b in BETAS.items()},
    }
    results = {}
    for name, (part, whole) in of_class.items():
        defined = whole > 0
        results[f"throne/class/{name}"] = 100 * float(np.mean(part[defined] / whole[defined])) if defined.any() else 0.0
    return results


def find(data: Path) -> list[Path]:
    """COCO's instances, of 2017 where there are several."""
    path = find_instances(data, YEAR)
    return [path] if path else []


THRONE = Suite(
    name="throne",
    measures="objects in a free description, judged class by class by language models that must agree (--judge)",
    files=(
        "annotations/instances_val2017.json: COCO's objects; a file of your own in this format does too",
        "annotations/synonyms.txt: words for the judge 'exact' (may be left out)",
        "the pictures, in the folder itself, images/ or val2017/",
    ),
    download="cocodataset.org (2017 Train/Val annotations, Val images), or written small by `cafe scenes write DIR`; "
    "judges: any language model, in the paper FLAN-T5",
    sources=("arXiv 2405.05256",),
    find_files=find,
    run=run,
    default=False,
)
