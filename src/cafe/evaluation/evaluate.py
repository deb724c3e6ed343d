"""Measures a model on a folder of evaluation files, whichever of them are there.

| file | what is measured |
|---|---|
| `dataset_*.json` (Karpathy, split "test") | retrieval both ways, geometry |
| `captions_test.jsonl` | captions that are exactly right, objects mentioned |
| `vqa_test.jsonl` | answers, by category |
| `pope/*_{random,popular,adversarial}.json` | POPE |

Pictures are named relative to the folder, or to its subfolder `images` as POPE's own files have them.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cafe.content import Content, ImageRef
from cafe.errors import CafeError
from cafe.evaluation.metrics import (
    alignment,
    binary_scores,
    mentioned_objects,
    modality_gap,
    object_scores,
    parse_yes_no,
    recall_at_k,
    uniformity,
)

KEPT = 12  # samples of each sort, for the report
KEPT_HITS = 5
POPE = ("random", "popular", "adversarial")


class Model(Protocol):
    """What evaluation needs of a model."""

    def embed(self, contents: Any, batch_size: int = 32) -> np.ndarray: ...

    def generate_batch(
        self, prompts: Sequence[Content], max_new_tokens: int = 64, batch_size: int = 64
    ) -> list[str]: ...


@dataclass
class Evaluation:
    """What was measured: flat `suite/part/metric` results, samples to look at, and embeddings by side."""

    results: dict[str, float] = field(default_factory=dict)
    samples: dict[str, Any] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)


def evaluate(model: Model, data: Path, limit: int | None = None, report: Callable[[str], None] = print) -> Evaluation:
    """Runs every suite whose files are in `data`, on the first `limit` records of each.

    Raises:
        CafeError: there is no evaluation file in `data`, or one of them is not what it should be.
    """
    done = Evaluation(samples={"data": str(data.resolve())})
    suites: list[tuple[Path, Callable[[Model, Path, int | None, Evaluation], None]]] = [
        *((path, _retrieval) for path in sorted(data.glob("dataset_*.json"))),
        *((path, _captions) for path in sorted(data.glob("captions_test.jsonl"))),
        *((path, _vqa) for path in sorted(data.glob("vqa_test.jsonl"))),
        *((path, _pope) for path in sorted(data.glob("pope/*.json")) if path.stem.rsplit("_", 1)[-1] in POPE),
    ]
    if not suites:
        raise CafeError(f"There is no evaluation file in {data}.")
    parts = [path.stem.rsplit("_", 1)[-1] if suite is _pope else suite.__name__ for path, suite in suites]
    twice = [path.name for (path, _), part in zip(suites, parts, strict=True) if parts.count(part) > 1]
    if twice:
        raise CafeError(f"{' and '.join(twice)} in {data} measure the same: keep one of them in a folder.")
    for number, (path, suite) in enumerate(suites, 1):
        report(f"[{number}/{len(suites)}] {path.name}")
        suite(model, path, limit, done)
    return done


def write(evaluation: Evaluation, directory: Path) -> None:
    """Writes `results.json`, `samples.json` and `embeddings.npz`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(evaluation.results, indent=2) + "\n")
    (directory / "samples.json").write_text(json.dumps(evaluation.samples) + "\n")
    np.savez_compressed(directory / "embeddings.npz", **evaluation.embeddings)  # type: ignore[arg-type]


def _retrieval(model: Model, path: Path, limit: int | None, done: Evaluation) -> None:
    rows = _karpathy_test(path)[:limit]
    pictures = [_find(Path(row.get("filepath", "")) / row["filename"], path.parent) for row in rows]
    texts = [sentence["raw"] for row in rows for sentence in row["sentences"]]
    owner = np.array([index for index, row in enumerate(rows) for _ in row["sentences"]])
    images = model.embed([path.parent / picture for picture in pictures])
    captions = model.embed(texts)
    similarity = images @ captions.T
    relevant = np.arange(len(rows))[:, None] == owner[None, :]
    for name, scores, right in (
        ("image_to_text", similarity, relevant),
        ("text_to_image", similarity.T, relevant.T),
    ):
        for k, value in recall_at_k(scores, right).items():
            done.results[f"retrieval/{name}/R@{k}"] = value
    matched = similarity[owner, np.arange(len(texts))]
    mismatched = similarity[~relevant]
    done.results |= {
        "geometry/modality_gap": modality_gap(images, captions),
        "geometry/alignment": alignment(images[owner], captions),
        "geometry/uniformity": uniformity(np.concatenate([images, captions])),
        "geometry/matched_similarity": float(matched.mean()),
        "geometry/mismatched_similarity": float(mismatched.mean()),
    }
    done.embeddings |= {"images": images[:500], "texts": captions[:1000], "owner": owner[:1000]}
    bins = np.linspace(-1, 1, 81)
    done.samples["histogram"] = {
        "bins": bins.tolist(),
        "matched": np.histogram(matched, bins, density=True)[0].tolist(),
        "mismatched": np.histogram(mismatched, bins, density=True)[0].tolist(),
    }
    done.samples["text_queries"] = [
        {
            "text": texts[query],
            "hits": [
                {"image": str(pictures[hit]), "right": bool(relevant[hit, query])} for hit in _top(similarity[:, query])
            ],
        }
        for query in np.linspace(0, len(texts) - 1, min(KEPT, len(texts))).astype(int)
    ]
    done.samples["image_queries"] = [
        {
            "image": str(pictures[query]),
            "hits": [{"text": texts[hit], "right": bool(relevant[query, hit])} for hit in _top(similarity[query])],
        }
        for query in np.linspace(0, len(rows) - 1, min(KEPT // 2, len(rows))).astype(int)
    ]


def _find(picture: str | Path, folder: Path) -> Path:
    """Where a picture that a file names is, relative to the folder of evaluation files."""
    return Path(picture) if (folder / picture).is_file() else Path("images") / picture


def _top(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:KEPT_HITS]


def _answers(model: Model, rows: list[dict[str, Any]], folder: Path, longest: int) -> list[str]:
    prompts = [Content((ImageRef(folder / _find(row["image"], folder)), row["text"])) for row in rows]
    return model.generate_batch(prompts, max_new_tokens=longest)


def _captions(model: Model, path: Path, limit: int | None, done: Evaluation) -> None:
    rows = _json_lines(path, ("image", "text", "answers", "objects"))[:limit]
    said = _answers(model, rows, path.parent, 96)
    vocabulary = {word for row in rows for word in row["objects"]}
    mentioned = [mentioned_objects(text, vocabulary) for text in said]
    exact = [text in row["answers"] for text, row in zip(said, rows, strict=True)]
    done.results["captions/exact"] = 100 * float(np.mean(exact))
    for name, value in object_scores(mentioned, [set(row["objects"]) for row in rows]).items():
        done.results[f"objects/{name}"] = value
    done.samples["captions"] = [
        {"image": str(_find(row["image"], path.parent)), "said": text, "right": right}
        for row, text, right in list(zip(rows, said, exact, strict=True))[:KEPT]
    ]


def _vqa(model: Model, path: Path, limit: int | None, done: Evaluation) -> None:
    rows = _json_lines(path, ("image", "text", "answer", "category"))[:limit]
    said = _answers(model, rows, path.parent, 16)
    right = [text.lower() == row["answer"].lower() for text, row in zip(said, rows, strict=True)]
    by_category: dict[str, list[bool]] = defaultdict(list)
    for row, correct in zip(rows, right, strict=True):
        by_category[row["category"]].append(correct)
    done.results["vqa/all"] = 100 * float(np.mean(right))
    for category, marks in sorted(by_category.items()):
        done.results[f"vqa/{category}"] = 100 * float(np.mean(marks))
    done.samples["answers"] = [
        {
            "image": str(_find(row["image"], path.parent)),
            "asked": row["text"],
            "said": text,
            "answer": row["answer"],
            "right": correct,
        }
        for row, text, correct in list(zip(rows, said, right, strict=True))[: 2 * KEPT : 2]
    ]


def _pope(model: Model, path: Path, limit: int | None, done: Evaluation) -> None:
    rows = _json_lines(path, ("image", "text", "label"))[:limit]
    said = [parse_yes_no(text) for text in _answers(model, rows, path.parents[1], 8)]
    split = path.stem.rsplit("_", 1)[-1]
    for name, value in binary_scores(said, [row["label"] == "yes" for row in rows]).items():
        done.results[f"pope/{split}/{name}"] = value


def _karpathy_test(path: Path) -> list[dict[str, Any]]:
    """The test rows of a Karpathy file."""
    try:
        rows = [row for row in json.loads(path.read_text())["images"] if row["split"] == "test"]
        complete = all(row["filename"] and row["sentences"][0]["raw"] for row in rows)
    except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
        raise CafeError(f"The evaluation file {path} is not a Karpathy file: {error!r}.") from None
    if not rows or not complete:
        raise CafeError(f"The evaluation file {path} has no complete image in its split 'test'.")
    return rows


def _json_lines(path: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The records of a JSON lines file, each of which must have the fields."""
    try:
        rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise CafeError(f"The evaluation file {path} is not valid JSON lines: {error}.") from None
    if not rows:
        raise CafeError(f"The evaluation file {path} is empty.")
    for number, row in enumerate(rows, 1):
        for name in fields:
            if name not in row:
                raise CafeError(f"The evaluation file {path} lacks the field {name!r} in record {number}.")
    return rows
