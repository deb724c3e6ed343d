"""Measure what is reached without learning features: a drawing is what the nearest training drawing shows.

The results have the names that cafe's suites give theirs, so that a table can show them side by side. For concepts that
were never seen, a ridge regression from edges and colors to bags of words takes the place of the nearest drawing.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from sklearn.metrics import roc_auc_score

from another_hand.concepts import TRAINING_HANDS, read_concepts
from another_hand.measure import evaluation_folders, measure_partners, seen_names
from another_hand.mentions import mentions
from another_hand.nearest import NearestDrawing, Similarities, cut
from another_hand.scenes import pair_up
from another_hand.word_regression import WordRegression
from another_hand.words import NUMBERS, listing
from another_hand.world import plain_drawings
from cafe.evaluation.io import find_image, json_lines, parquet_rows
from cafe.evaluation.metrics import rank_of_match
from cafe.evaluation.suite import aggregate
from cafe.evaluation.suites import captions, chair
from cafe.evaluation.suites.captioned_images import USER_DATASET
from cafe.evaluation.suites.pope import OFFICIAL_SPLITS, split_name
from cafe.lvlm.prompts import Prompts
from cafe.utils.atomic import atomic_write_text

Results = dict[str, float]
Floors = dict[str, Results]  # "floor" and "chance", each by result in percent


class Folder:
    """Read the images of a folder of evaluation files, each once, as similarities of their drawings to the concepts."""

    def __init__(self, nearest: NearestDrawing, data: Path) -> None:
        self.nearest, self.data = nearest, data
        self._seen: dict[Path, Similarities] = {}

    def look(self, image: str | Path) -> Similarities:
        """Compare the drawings of an image, which a record names, with all concepts."""
        path = self.data / find_image(image, self.data, self.data)
        if path not in self._seen:
            self._seen[path] = self.nearest.compare(cut(read_picture(path)))
        return self._seen[path]

    def name(self, image: str) -> list[str]:
        """Name the drawings of an image."""
        return [self.nearest.concepts[number] for number in self.look(image).argmax(axis=1)]

    def columns(self, text: str) -> list[int]:
        """List the numbers of the concepts that a text names, in its order."""
        names = mentions(_without_instruction(text), self.nearest.concepts)
        return [self.nearest.concepts.index(name) for name in names]


def read_picture(path: Path) -> np.ndarray:
    """Read an image in RGB."""
    return np.asarray(Image.open(path).convert("RGB"))


def measure_floors(nearest: NearestDrawing, data: Path) -> Floors:
    """Measure the floors on a folder of evaluation files of seen concepts."""
    folder = Folder(nearest, data)
    measures = (question_floors, description_floors, presence_floors, retrieval_floors, search_floors)
    floors: Floors = {"floor": {}, "chance": {}}
    for measure in measures:
        for kind, results in measure(folder).items():
            floors[kind] |= results
    return floors


def question_floors(folder: Folder) -> Floors:
    """Answer the questions of `vqa_test.jsonl`."""
    right: dict[str, list[float]] = {}
    guessed: dict[str, list[float]] = {}
    for record in _questions(folder.data):
        answer, chance = _answer(folder, record)
        right.setdefault(f"vqa/{record['category']}", []).append(answer == record["answer"])
        guessed.setdefault(f"vqa/{record['category']}", []).append(chance)
    return {"floor": _percent(right), "chance": _percent(guessed)}


def _questions(data: Path) -> list[dict[str, Any]]:
    """Read the questions of the vqa suite."""
    return json_lines(data / "vqa_test.jsonl", {"image": str, "text": str, "answer": str, "category": str})


def _answer(folder: Folder, record: Mapping[str, Any]) -> tuple[str, float]:
    """Answer a question by category, with the probability that a guess is right."""
    nearest, names = folder.nearest, folder.name(record["image"])
    match record["category"]:
        case "name":
            return names[0], 1 / len(nearest.concepts)
        case "choice":
            offered = folder.columns(record["text"])
            best = folder.look(record["image"])[:, offered].max(axis=0).argmax()
            return nearest.concepts[offered[best]], 1 / len(offered)
        case "group":
            return nearest.groups[names[0]], 1 / len(set(nearest.groups.values()))
        case "count":
            return NUMBERS[len(names)], 1 / 4
    raise ValueError(f"There is no floor for questions of the category {record['category']!r}.")


def _percent(lists: Mapping[str, Sequence[float]]) -> Results:
    """Average each list, in percent."""
    return {name: 100 * float(np.mean(values)) for name, values in lists.items()}


def description_floors(folder: Folder) -> Floors:
    """Describe the images of `captions_test.jsonl` by the names of the nearest drawings."""
    rows = []
    fields = {"image": str, "answers": list, "objects": list}
    for number, record in enumerate(json_lines(folder.data / "captions_test.jsonl", fields)):
        named, present = folder.name(record["image"]), set(record["objects"])
        said, correct = f"{listing(named)}.", len(present & set(named))
        marks = captions.contributions(set(named), present) | chair.contributions(named, present)
        marks["captions/exact"] = int(said in record["answers"])
        marks["throne/overall/F1"] = [2 * correct, len(set(named)) + len(present)]
        rows.append({**record, "id": number, "group": record["image"], "said": said, "marks": marks})
    seen = seen_names()
    return {"floor": aggregate(rows) | measure_partners(rows, seen, pair_up(seen)).results}


def presence_floors(folder: Folder) -> Floors:
    """Compute the AUC of each POPE split, with the similarity of the most similar drawing as the margin."""
    floor = {}
    for path in sorted(folder.data.glob("pope/*.json")):
        margins, labels = [], []
        for record in json_lines(path, {"image": str, "text": str, "label": str}):
            (concept,) = folder.columns(record["text"])
            margins.append(folder.look(record["image"])[:, concept].max())
            labels.append(record["label"] == "yes")
        floor[f"pope/{split_name(path)}/auc"] = 100 * float(roc_auc_score(labels, margins))
    official = [floor[name] for split in OFFICIAL_SPLITS if (name := f"pope/{split}/auc") in floor]
    floor["pope/mean/auc"] = float(np.mean(official))
    # A coin answers half of a balanced set right, and ranks nothing.
    return {"floor": floor, "chance": dict.fromkeys([*floor, "pope/mean/accuracy"], 50.0)}


def retrieval_floors(folder: Folder) -> Floors:
    """Find scenes by their captions and captions by their scenes."""
    captioned = USER_DATASET.read(folder.data, None)
    looks = [folder.look(name) for name in captioned.names]
    named = [folder.columns(text) for text in captioned.texts]
    fits = np.array([[fit(look[:, columns]) for columns in named] for look in looks])
    relevant = np.arange(len(looks))[:, None] == np.asarray(captioned.owner)
    both = (("image_to_text", fits, relevant), ("text_to_image", fits.T, relevant.T))
    ranks = {f"retrieval/{direction}": rank_of_match(scores, right) for direction, scores, right in both}
    return _recall(ranks, len(looks), (1, 5, 10))


def fit(similarities: Float[np.ndarray, "cells names"]) -> float:
    """Compute how well a caption's names fit a scene's cells, both in reading order; those of another number do not."""
    cells, names = similarities.shape
    return float(np.diagonal(similarities).mean()) if cells == names else -np.inf


def _recall(ranks: Mapping[str, np.ndarray], candidates: int, ks: Sequence[int]) -> Floors:
    """Compute R@k of some ranks, counted from 0, and what chance gives."""
    floor = {f"{name}/R@{k}": 100 * float((rank < k).mean()) for name, rank in ranks.items() for k in ks}
    chance = {f"{name}/R@{k}": 100 * min(1.0, k / candidates) for name in ranks for k in ks}
    return {"floor": floor, "chance": chance}


def search_floors(folder: Folder) -> Floors:
    """Find names by single drawings and single drawings by names; of other words, chance alone is computed.

    A dictionary would turn keywords and names in other languages into names: that is no floor for a model.
    """
    scores = {"name-image-to-text": _score_names, "name-text-to-image": _score_drawings}
    floor, chance = {}, {}
    for path, rows in _tables(folder.data):
        name = f"mmeb/{path.stem}/P@1"
        chance[name] = _chance(rows)
        if path.stem in scores:
            floor[name] = _search(rows, partial(scores[path.stem], folder))
    return {"floor": floor, "chance": chance}


def _tables(data: Path) -> list[tuple[Path, list[dict[str, Any]]]]:
    """Read MMEB's tables."""
    columns = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    paths = sorted(data.glob("mmeb_eval/*.parquet"))
    return [(path, parquet_rows([path], path, columns)) for path in paths]


def _score_names(folder: Folder, row: Mapping[str, Any]) -> list[float]:
    """Score the names among which a drawing's is."""
    (similarities,) = folder.look(row["qry_img_path"])
    return [similarities[folder.columns(text)].max() for text in row["tgt_text"]]


def _score_drawings(folder: Folder, row: Mapping[str, Any]) -> list[float]:
    """Score the drawings among which a name's is."""
    (concept,) = folder.columns(row["qry_text"])
    return [folder.look(image)[0, concept] for image in row["tgt_img_path"]]


def _chance(rows: Sequence[Mapping[str, Any]]) -> float:
    """Compute how often a guess finds the right candidate, in percent."""
    return 100 * float(np.mean([1 / len(row["tgt_text"]) for row in rows]))


def _search(rows: Sequence[Mapping[str, Any]], score: Callable[[Mapping[str, Any]], Any]) -> float:
    """Compute how often the first candidate, which is the right one, has the highest score, in percent."""
    scores = [np.asarray(score(row)) for row in rows]
    return 100 * float(np.mean([each[0] > np.max(each[1:], initial=-np.inf) for each in scores]))


def unseen_floors(regression: WordRegression, data: Path, words: Mapping[str, str]) -> Floors:
    """Find the words of unseen concepts by their drawings, and in MMEB's tables also the drawings by the words.

    Args:
        regression: predicts words.
        data: the folder of evaluation files.
        words: by unseen concept, its name and keywords, among which `unseen/image_to_words` ranks.
    """
    read = cache(lambda image: cut(read_picture(data / find_image(image, data, data)))[0])

    def score(row: Mapping[str, Any]) -> np.ndarray:
        """Score the candidates of a row, whichever side has the images."""
        if row["qry_img_path"]:
            return regression.score([read(row["qry_img_path"])], list(map(_without_instruction, row["tgt_text"])))[0]
        images = list(map(read, row["tgt_img_path"]))
        return regression.score(images, [_without_instruction(row["qry_text"])])[:, 0]

    floor, chance = {}, {}
    for path, rows in _tables(data):
        name = f"mmeb/{path.stem}/P@1"
        chance[name] = _chance(rows)
        if not path.stem.startswith("language"):
            floor[name] = _search(rows, score)
    singles = {record["image"]: record["answer"] for record in _questions(data) if record["category"] == "name"}
    scores = regression.score(list(map(read, singles)), list(words.values()))
    ranks = rank_of_match(scores, np.array([[name == answer for name in words] for answer in singles.values()]))
    ranked = _recall({"unseen/image_to_words": ranks}, len(words), (1, 5))
    return {"floor": floor | ranked["floor"], "chance": chance | ranked["chance"]}


def _without_instruction(text: str) -> str:
    """Remove the instruction that follows a text to embed."""
    return text.removesuffix(Prompts().text_instruction)


def gather(drawings: Mapping[tuple[str, str], np.ndarray]) -> dict[str, list[np.ndarray]]:
    """Gather the drawings of each concept, unchanged, from drawings by hand and concept."""
    gathered: dict[str, list[np.ndarray]] = {}
    for (_, name), variants in drawings.items():
        gathered.setdefault(name, []).append(variants[-1])
    return gathered


def measure_all_floors(packages: Path, data: Path) -> dict[str, Floors]:
    """Measure the floors on every folder of evaluation files of a directory, by the folder's name."""
    concepts = read_concepts(packages)
    known = [concept for concept in concepts if concept.seen]
    seen = gather(plain_drawings(packages, TRAINING_HANDS, known))
    nearest = NearestDrawing.of(seen, {concept.name: concept.group for concept in known})
    words = {concept.name: " ".join([concept.name, *concept.keywords]) for concept in concepts}
    regression = WordRegression(seen, words)
    floors = {}
    for folder in evaluation_folders(data):
        print(f"floors: {folder.name}")
        if folder.name == "unseen":
            unseen = {name: text for name, text in words.items() if name not in seen}
            floors["unseen"] = unseen_floors(regression, folder, unseen)
        else:
            floors[folder.name] = measure_floors(nearest, folder)
    return floors


def main() -> None:
    """Measure the floors, and write them as JSON."""
    parser = argparse.ArgumentParser(prog="python -m another_hand.floors", description=main.__doc__)
    parser.add_argument("packages", type=Path, help="the npm packages' archives")
    parser.add_argument("data", type=Path, help="the folders of evaluation files")
    parser.add_argument("target", type=Path, help="the file to write")
    options = parser.parse_args()
    text = json.dumps(measure_all_floors(options.packages, options.data), indent=2)
    atomic_write_text(options.target, text + "\n")


if __name__ == "__main__":
    main()
