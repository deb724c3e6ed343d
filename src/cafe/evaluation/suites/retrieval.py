"""Retrieval: pictures find their captions and captions find their picture, among all of a collection.

A query's rank is the number of wrong candidates before its best right one, plus 1; ties count against the model. R@k is
the share of queries whose rank is at most k: a picture finds any of its captions, a caption its one picture.

| a collection's file | what it is |
|---|---|
| `dataset_*.json` | Karpathy's split file; its split "test" is read |
| `*.csv`, `*.jsonl` | a picture's name under `image` or `filename`; one caption or a list under `caption` or `raw` |
| `*.parquet`, a saved dataset's folder | as the Hub has them: columns `image` and `caption` |
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cafe.content import ImageRef
from cafe.data.readers.base import open_rows
from cafe.data.readers.hf_datasets import HFDataset
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.metrics import ranks
from cafe.evaluation.suite import NUM_SAMPLES, EvaluationResult, Suite, aggregate, evenly_spaced, find_image, find_one
from cafe.images.decoding import decode_image
from cafe.images.thumbnails import thumbnail

KS = (1, 5, 10)
KEPT_HITS = 5
PROTOCOL = 5  # captions of a picture in the 1K and 5K protocols of Flickr30K and COCO: the first ones
_PICTURE, _CAPTION = ("image", "filename"), ("caption", "captions", "raw", "text")  # names of columns
_SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder that the datasets library saved


@dataclass(frozen=True)
class Collection:
    """Pictures and captions.

    Attributes:
        pictures: what is embedded: paths, or encoded bytes.
        names: the pictures' names, relative to the folder of evaluation files where they lie in it.
        texts: the captions, picture by picture.
        owner: for each caption, the number of its picture.
    """

    pictures: list[Path | ImageRef]
    names: list[str]
    texts: list[str]
    owner: Int[np.ndarray, " texts"]


@dataclass(frozen=True)
class RetrievalDataset:
    """Where the collection of a suite lies, and how much of it is taken.

    Attributes:
        name: the suite's.
        patterns: of its file, the first that is there; a file that matches none of `exclude`.
        captions: the captions of a picture that are taken, the first ones; all if None.
        folders: where its pictures may lie, besides the folder of evaluation files, the file's own, and `images`.
    """

    name: str
    patterns: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    captions: int | None = None
    folders: tuple[str, ...] = ()

    def find(self, data: Path) -> list[Path]:
        """Its file or files; or the folder of a saved dataset."""
        for pattern in self.patterns:
            if pattern.endswith(".parquet"):
                found = sorted(data.glob(pattern))
            elif pattern.endswith("/"):
                found = [data / pattern] if any((data / pattern / mark).is_file() for mark in _SAVED) else []
            else:
                path = find_one(data, pattern, but=self.exclude)
                found = [path] if path else []
            if found:
                return found
        return []

    def read(self, data: Path, limit: int | None) -> Collection:
        """Its first `limit` pictures with their captions.

        Raises:
            CafeError: a file is not of its format, or a picture is not there.
        """
        paths = self.find(data)
        inside = [str(paths[0].parent.relative_to(data))] if paths[0].parent != data else []
        folders = [*self.folders, *(f"{own}/{folder}" for own in inside for folder in ("", "images", *self.folders))]
        collection = Collection([], [], [], np.zeros(0, np.int64))
        owner: list[int] = []
        for number, (shown, captions) in enumerate(_all_gather(paths, limit)):
            if not all(isinstance(caption, str) and caption.strip() for caption in captions):
                raise CafeError(f"A caption of picture {number + 1} of the evaluation file {paths[0]} is no text.")
            if isinstance(shown, str):
                name = str(find_image(shown, data, paths[0], *folders))
                collection.pictures.append(data / name)
            else:
                name = shown.get("path") or str(number)
                collection.pictures.append(ImageRef(shown["bytes"]))
            collection.names.append(name)
            collection.texts.extend(captions[: self.captions])
            owner += [number] * len(captions[: self.captions])
        return Collection(collection.pictures, collection.names, collection.texts, np.array(owner))

    def run(self, model: CachedModel, data: Path, limit: int | None) -> EvaluationResult:
        """Measures both ways; `limit` pictures with their captions make a smaller and easier collection."""
        collection = self.read(data, limit)
        names, texts, owner = collection.names, collection.texts, collection.owner
        images, captions = embed(model, collection)
        numbers = np.arange(len(names))
        mapped = {"images": images[:500], "texts": captions[:1000], "owner": owner[:1000]}
        done = EvaluationResult(samples=_samples(data, collection, images, captions), embeddings=mapped)
        for way, rank in (
            ("image_to_text", ranks(images, captions, numbers, owner)),
            ("text_to_image", ranks(captions, images, owner, numbers)),
        ):
            by_image = way == "image_to_text"
            rows = [
                {
                    "id": number,
                    "group": names[number if by_image else owner[number]],
                    **({"image": names[number]} if by_image else {"text": texts[number]}),
                    "rank": int(place) + 1,
                    "marks": {f"{self.name}/{way}/R@{k}": int(place < k) for k in KS},
                }
                for number, place in enumerate(rank)
            ]
            done.outputs[f"{self.name}/{way}"] = rows
            done.results |= aggregate(rows)
            done.results[f"{self.name}/{way}/median_rank"] = float(np.median(rank) + 1)
            done.results[f"{self.name}/{way}/mean_rank"] = float(np.mean(rank) + 1)
        return done


def embed(
    model: CachedModel, collection: Collection
) -> tuple[Float[np.ndarray, "pictures dim"], Float[np.ndarray, "texts dim"]]:
    """Unit rows of both sides."""
    return model.embed(collection.pictures), model.embed(collection.texts)


def _samples(
    data: Path,
    collection: Collection,
    images: Float[np.ndarray, "pictures dim"],
    captions: Float[np.ndarray, "texts dim"],
) -> dict[str, Any]:
    """Queries both ways with their first hits. A picture that is not in the folder is shown by a small copy."""
    texts, owner = collection.texts, collection.owner

    def shown(number: int) -> str:
        picture = collection.pictures[number]
        if isinstance(picture, ImageRef):
            return thumbnail(decode_image(picture))
        return str(picture.relative_to(data) if picture.is_relative_to(data) else picture)

    asking, showing = evenly_spaced(len(texts), NUM_SAMPLES), evenly_spaced(len(images), NUM_SAMPLES // 2)
    found, said = _top(captions[asking] @ images.T), _top(images[showing] @ captions.T)
    return {
        "text_queries": [
            {
                "text": texts[query],
                "hits": [{"image": shown(hit), "right": bool(owner[query] == hit)} for hit in hits],
            }
            for query, hits in zip(asking, found, strict=True)
        ],
        "image_queries": [
            {
                "image": shown(query),
                "hits": [{"text": texts[hit], "right": bool(owner[hit] == query)} for hit in hits],
            }
            for query, hits in zip(showing, said, strict=True)
        ],
    }


def _top(scores: Float[np.ndarray, "queries candidates"]) -> Int[np.ndarray, "queries hits"]:
    return np.argsort(-scores, axis=1, kind="stable")[:, :KEPT_HITS]


def _all_gather(paths: Sequence[Path], limit: int | None) -> list[tuple[str | dict[str, Any], list[str]]]:
    """The first `limit` pictures (a name, or a mapping of "bytes" and "path"), each with its captions.

    Rows that name the same picture, as in a file of a caption a row, are one picture's.
    """
    found: dict[str | int, tuple[str | dict[str, Any], list[str]]] = {}
    for number, (shown, captions) in enumerate(_records(paths)):
        key = shown if isinstance(shown, str) else number
        if key in found:
            found[key][1].extend(captions)
        elif limit is None or len(found) < limit:
            found[key] = (shown, captions)
        elif key == number:
            break
    return list(found.values())


def _records(paths: Sequence[Path]) -> Iterator[tuple[Any, list[str]]]:
    if paths[0].suffix == ".json":
        for row in _karpathy_test(paths[0]):
            yield str(Path(row.get("filepath", "")) / row["filename"]), [said["raw"] for said in row["sentences"]]
        return
    for path in paths:
        number = 0
        for number, row in enumerate(_rows(path), 1):
            if row.get("split", "test") not in ("test", None):
                continue
            yield _image(_field(row, _PICTURE, path, number)), _captions(_field(row, _CAPTION, path, number))
        if not number:
            raise CafeError(f"The evaluation file {path} is empty.")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    rows = HFDataset(str(path), "test", "") if path.is_dir() else open_rows(str(path), max_cached=1)
    for number in range(sum(rows.chunks)):
        try:
            row = rows[number]
        except CafeError as error:
            raise CafeError(f"Record {number + 1} of the evaluation file {path} is damaged: {error}") from None
        if not isinstance(row, dict):
            raise CafeError(f"Record {number + 1} of the evaluation file {path} should be an object with named fields.")
        yield row


def _field(row: dict[str, Any], names: tuple[str, ...], path: Path, number: int) -> Any:
    """The value under the first of these names that a row has."""
    for name in names:
        if row.get(name):
            return row[name]
    raise CafeError(f"The evaluation file {path} lacks the field {names[0]!r} in record {number}.")


def _image(value: Any) -> str | dict[str, Any]:
    """A picture's name, or a mapping of "bytes" and "path", which may be without a name."""
    if isinstance(value, dict):
        return value if value.get("bytes") else str(value.get("path"))
    return {"bytes": value} if isinstance(value, bytes) else str(value)


def _captions(value: Any) -> list[str]:
    """One caption or several; in a CSV file, several are a list in JSON."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(json.JSONDecodeError):  # then it is a caption that begins with a bracket
            value = json.loads(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _karpathy_test(path: Path) -> list[dict[str, Any]]:
    """The complete records of a Karpathy file's split "test"."""
    try:
        rows = [row for row in json.loads(path.read_text())["images"] if row["split"] == "test"]
        complete = all(row["filename"] and row["sentences"][0]["raw"] for row in rows)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CafeError(f"The evaluation file {path} is not a Karpathy file: {error!r}.") from None
    if not rows or not complete:
        raise CafeError(f"The evaluation file {path} has no complete image in its split 'test'.")
    return rows


OWN = RetrievalDataset(
    "retrieval",
    ("dataset_*.json", "captions.csv", "captions.jsonl", "captions.parquet"),
    exclude=("dataset_flickr30k.json", "dataset_coco.json"),
)
FLICKR = RetrievalDataset(
    "flickr30k",
    (
        *("dataset_flickr30k.json", "flickr30k/dataset_flickr30k.json"),
        *("flickr30k/*.csv", "flickr30k/test*.parquet", "flickr30k/data/test*.parquet", "flickr30k/"),
    ),
    captions=PROTOCOL,
    folders=("flickr30k-images", "images_flickr_1k_test"),
)
MSCOCO = RetrievalDataset(
    "coco",
    (
        *("dataset_coco.json", "coco/dataset_coco.json"),
        *("coco/*.csv", "coco/test*.parquet", "coco/data/test*.parquet", "coco/"),
    ),
    captions=PROTOCOL,
    folders=("val2014", "images_mscoco_2014_5k_test"),
)
LONG = RetrievalDataset("paragraphs", ("paragraphs*.csv", "paragraphs*.jsonl", "paragraphs*.parquet"))

RETRIEVAL = Suite(
    name="retrieval",
    measures="pictures find their captions and captions their picture, in a collection of your own",
    files=(
        "dataset_*.json (Karpathy, its split 'test'), or captions.csv, .jsonl or .parquet (columns image, caption)",
        "its pictures, in the folder itself or in images/",
    ),
    download="your own pictures with captions; written by `cafe scenes write DIR`",
    find_files=OWN.find,
    run=OWN.run,
)
FLICKR30K = Suite(
    name="flickr30k",
    measures="zero-shot retrieval on Flickr30K's 1,000 test pictures, the first 5 captions each",
    files=(
        "[flickr30k/]dataset_flickr30k.json (Karpathy) and its pictures, in flickr30k-images/ or images/",
        "or flickr30k/: the CSV file and images_flickr_1k_test/, parquet files, or what save_to_disk wrote",
    ),
    download="cs.stanford.edu/people/karpathy/deepimagesent and shannon.cs.illinois.edu/DenotationGraph; "
    "or the Hub dataset nlphuji/flickr_1k_test_image_text_retrieval",
    sources=("arXiv 1412.2306 (split)", "arXiv 2503.19900"),
    find_files=FLICKR.find,
    run=FLICKR.run,
)
COCO = Suite(
    name="coco",
    measures="zero-shot retrieval on the 5,000 test pictures of Karpathy's COCO split, the first 5 captions each",
    files=(
        "[coco/]dataset_coco.json (Karpathy) and COCO's val2014 pictures, in val2014/ or images/",
        "or coco/: the CSV file and images_mscoco_2014_5k_test/, parquet files, or what save_to_disk wrote",
    ),
    download="cs.stanford.edu/people/karpathy/deepimagesent and cocodataset.org (2014 Val images); "
    "or the Hub dataset nlphuji/mscoco_2014_5k_test_image_text_retrieval",
    sources=("arXiv 1412.2306 (split)", "arXiv 2503.19900"),
    find_files=MSCOCO.find,
    run=MSCOCO.run,
)
PARAGRAPHS = Suite(
    name="paragraphs",
    measures="retrieval with captions of several sentences, which short-text encoders cut off",
    files=(
        "paragraphs*.csv, .jsonl or .parquet (columns image, caption)",
        "its pictures, in the folder itself or in images/",
    ),
    download="DOCCI, DCI, Urban1k and others, with their files renamed; written by `cafe scenes write DIR`",
    sources=("arXiv 2403.15378 (Urban1k)", "arXiv 2404.19753 (DOCCI)", "arXiv 2312.08578 (DCI)"),
    find_files=LONG.find,
    run=LONG.run,
)
