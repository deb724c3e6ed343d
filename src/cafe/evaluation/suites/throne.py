"""THRONE: a free description, judged class by class from its text alone (arXiv 2405.05256).

Judges are asked about each class several times in different words whether the description implies that such an object
is present. A pair of image and class counts only if all their answers agree; the others are left out. From the pairs
that count: precision, recall, F1 and F0.5 of each class, averaged over classes ("class"), and over all pairs at once
("overall").

A class that is never stated and never present has no score; one with no correct pair has F = 0. (The authors' code
leaves such classes out of the mean of F.) The questions are ours: the paper words them differently.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite, aggregate
from cafe.evaluation.suites.coco import describe_images, find_instances, read_instances
from cafe.evaluation.suites.judges import require_judges, votes

YEAR = "val2017"
PROMPT = "Describe this image in detail."
MAX_NEW_TOKENS = 512
BETAS = {"F1": 1.0, "F0.5": 0.5}

Pairs = Bool[np.ndarray, "images classes"]


def run(model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
    """Ask for a description of each of the first `limit` images, and the judges about each description."""
    # Descriptions take hours; a judge that is missing should be reported before.
    require_judges(model.judges)
    images = read_instances(find(data)[0], limit)
    described = list(describe_images(model, data, images, YEAR, PROMPT, MAX_NEW_TOKENS))
    # From here on only pairs of an image and a class matter.
    ballots = votes(model, [description for _, _, description in described], images.vocabulary)
    stated, split = agreement(ballots)
    classes = images.vocabulary.classes
    present = np.array([[name in images.objects[number] for name in classes] for number in images.names])

    # An output row lists classes by name.
    rows = []
    for index, (number, path, description) in enumerate(described):
        row: dict[str, Any] = {"id": number, "group": str(path), "image": str(path), "said": description}
        for name, pairs in (("stated", stated), ("split", split), ("objects", present)):
            row[name] = [classes[column] for column in np.flatnonzero(pairs[index])]
        rows.append({**row, "marks": contributions(stated[index], split[index], present[index])})
    results = aggregate(rows) | class_scores(stated, split, present)
    return EvaluationResult(results, {"throne": rows}, {"throne": {"judges": list(model.judges)}})


def agreement(ballots: Bool[np.ndarray, "votes images classes"]) -> tuple[Pairs, Pairs]:
    """Find the pairs that all votes call present, and those on which the votes are split.

    Args:
        ballots: the judges' votes; each is whether the description states the class.
    """
    yes = ballots.sum(axis=0)
    # All no, all yes, or something between.
    unanimous = yes == len(ballots)
    split = (yes > 0) & ~unanimous
    return unanimous, split


def contributions(
    stated: Bool[np.ndarray, " classes"], split: Bool[np.ndarray, " classes"], present: Bool[np.ndarray, " classes"]
) -> dict[str, Any]:
    """Compute what an image contributes to the overall scores: numerators and denominators over pairs that count.

    Args:
        stated: the classes that all votes call present.
        split: the classes on which the votes are split.
        present: the classes that the image shows.
    """
    # Classes with split votes are in none of the counts.
    correct, num_stated, num_present = (int((pairs & ~split).sum()) for pairs in (stated & present, stated, present))
    scores = _score_fractions(correct, num_stated, num_present)
    return {
        **{f"throne/overall/{name}": list(fraction) for name, fraction in scores.items()},
        "throne/overall/split": [int(split.sum()), len(split)],
    }


def class_scores(stated: Pairs, split: Pairs, present: Pairs) -> dict[str, float]:
    """Average each score over the classes for which it is defined, in percent.

    Args:
        stated: the pairs that all votes call present.
        split: the pairs on which the votes are split.
        present: the pairs of an image and a class that it shows.
    """
    # Over the images, so that each count is an array over the classes.
    correct, num_stated, num_present = ((pairs & ~split).sum(axis=0) for pairs in (stated & present, stated, present))
    results = {}
    for name, (numerator, denominator) in _score_fractions(correct, num_stated, num_present).items():
        defined = denominator > 0
        # Where no class is defined, the mean would be NaN.
        mean = np.mean(numerator[defined] / denominator[defined]) if defined.any() else 0.0
        results[f"throne/class/{name}"] = 100 * float(mean)
    return results


def _score_fractions(correct: Any, stated: Any, present: Any) -> dict[str, tuple[Any, Any]]:
    """Write each score as numerator and denominator, for counts of one image or arrays over classes."""
    scores = {"precision": (correct, stated), "recall": (correct, present)}
    for name, beta in BETAS.items():
        # F_beta in terms of counts: (1 + beta²) correct / (stated + beta² present).
        weight = beta * beta
        scores[name] = ((1 + weight) * correct, stated + weight * present)
    return scores


def find(data: Path) -> list[Path]:
    """Find COCO's instances, of 2017 if there are several."""
    return find_instances(data, YEAR)


THRONE = Suite(
    name="throne",
    measures="objects in a free description, judged class by class by language models that must agree (--judge)",
    files=(
        "annotations/instances_val2017.json: COCO's objects, or a file of your own in this format",
        "annotations/synonyms.txt: words for the judge 'exact' (optional)",
        "the images, in the folder itself, images/ or val2017/",
    ),
    download="cocodataset.org (2017 Train/Val annotations, Val images); a small version is written by "
    "`cafe scenes write DIR`; judges: any language model, FLAN-T5 in the paper",
    sources=("arXiv 2405.05256",),
    find_files=find,
    run=run,
    default=False,
    headline=("throne/overall/F1",),
    generation=("throne/overall/F1",),
    no_direction=("throne/overall/split",),
    labels={"throne/overall/F1": "THRONE, F1"},
)
