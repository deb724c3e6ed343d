"""Images with their captions, read from any of the files in which retrieval datasets are published.

| file | what it is |
|---|---|
| `dataset_*.json` | Karpathy's split file; its split "test" is read |
| `*.csv`, `*.jsonl` | an image's name under `image` or `filename`; one caption or a list under `caption` or `raw` |
| `*.parquet`, the folder of a saved dataset | as on the Hub: columns `image` and `caption` |

An image may have several rows, with a caption each. Rows are of one image if they have its name; of images inside a
file, also its bytes.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from cafe.content import ImageRef
from cafe.data.readers.base import open_rows
from cafe.data.readers.delimited import parse_list
from cafe.data.readers.hf_datasets import HFDataset
from cafe.errors import CafeError
from cafe.evaluation.io import find_image, find_one, load_json

CAPTIONS_PER_IMAGE = 5  # the first ones, in the 1K and 5K protocols of Flickr30K and COCO
# A row may have several of these columns; the first with a value counts.
IMAGE_COLUMNS = ("image", "filename")
CAPTION_COLUMNS = ("caption", "captions", "raw", "text")
SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")  # one of them is in a folder written by `save_to_disk`

Image = str | dict[str, Any]  # a name, or a mapping of "bytes" and "path"


@dataclass(frozen=True)
class CaptionedImages:
    """Hold images and their captions.

    Attributes:
        images: what is embedded: paths, or encoded bytes.
        names: the images' names, relative to the folder of evaluation files for those inside it.
        texts: the captions, image by image.
        owner: for each caption, the number of its image.
    """

    images: list[Path | ImageRef]
    names: list[str]
    texts: list[str]
    owner: Int[np.ndarray, " texts"]


@dataclass(frozen=True)
class RetrievalDataset:
    """Say where the captioned images of a suite are, and how many captions are used.

    Attributes:
        name: the suite's.
        patterns: of its file; the first that is there is read.
        exclude: names of files that belong to another suite.
        captions: how many captions of an image are used, the first ones; all if None.
        folders: where its images may be, besides the folder of evaluation files, the file's own, and `images`.
    """

    name: str
    patterns: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    captions: int | None = None
    folders: tuple[str, ...] = ()

    def find(self, data: Path) -> list[Path]:
        """Find its file or files, or the folder of a saved dataset."""
        for pattern in self.patterns:
            paths = self._match(data, pattern)
            if paths:
                return paths
        return []

    def _match(self, data: Path, pattern: str) -> list[Path]:
        """Find what matches one pattern; one that ends in a slash names the folder of a saved dataset."""
        if pattern.endswith(".parquet"):
            return sorted(data.glob(pattern))  # a dataset may have several
        if pattern.endswith("/"):
            folder = data / pattern
            return [folder] if _is_saved_dataset(folder) else []
        return find_one(data, pattern, exclude=self.exclude)

    def read(self, data: Path, limit: int | None) -> CaptionedImages:
        """Read its first `limit` images with their captions.

        Raises:
            CafeError: a file does not have its format, or an image is missing.
        """
        paths = self.find(data)
        source = paths[0]  # for errors
        folders = self._image_folders(data, source)
        images: list[Path | ImageRef] = []
        names: list[str] = []
        texts: list[str] = []
        owner: list[int] = []
        for number, (image, captions) in enumerate(_group_by_image(paths, limit)):
            if not captions:
                raise CafeError(f"Image {number + 1} of the evaluation file {source} has no caption.")
            if not all(map(_is_text, captions)):
                raise CafeError(f"A caption of image {number + 1} of the evaluation file {source} is not text.")
            if isinstance(image, str):
                path = find_image(image, data, source, *folders)
                names.append(str(path))
                images.append(data / path)
            else:
                # Images inside the file need not have a name.
                names.append(image.get("path") or str(number))
                images.append(ImageRef(image["bytes"]))
            used = captions[: self.captions]
            texts += used
            owner += [number] * len(used)
        if not images:
            raise _no_test_image(source, _splits_of(paths))
        return CaptionedImages(images, names, texts, np.array(owner))

    def _image_folders(self, data: Path, path: Path) -> list[str]:
        """List the folders that may hold its images: its own, and those beside its file in a subfolder."""
        if path.parent == data:
            return list(self.folders)
        subfolder = path.parent.relative_to(data)
        beside_file = [f"{subfolder}/{folder}" for folder in ("", "images", *self.folders)]
        return [*self.folders, *beside_file]


def _is_text(caption: Any) -> bool:
    """Tell whether a caption is a text that can be written, with at least one character that is not a space."""
    if not isinstance(caption, str) or not caption.strip():
        return False
    # In JSON, an escape may stand for half of a surrogate pair, which is no character.
    return not any("\ud800" <= character <= "\udfff" for character in caption)


def _is_saved_dataset(path: Path) -> bool:
    """Tell whether `save_to_disk` of the datasets library wrote a folder."""
    return any((path / name).is_file() for name in SAVED_DATASET_FILES)


def _group_by_image(paths: Sequence[Path], limit: int | None) -> list[tuple[Image, list[str]]]:
    """List the first `limit` images, each with its captions.

    Rows that name the same image, as in a file with one caption per row, are merged.

    Args:
        paths: the dataset's files.
        limit: the number of images; all of them if None.
    """
    by_key: dict[str | tuple[str | None, str], tuple[Image, list[str]]] = {}
    for image, captions in _read_records(paths):
        key = image if isinstance(image, str) else (image.get("path"), hashlib.sha256(image["bytes"]).hexdigest())
        if key in by_key:
            by_key[key][1].extend(captions)
        elif limit is None or len(by_key) < limit:
            by_key[key] = (image, captions)
        # Beyond the limit, rows are still read: images within it may have captions further down.
    return list(by_key.values())


def _no_test_image(path: Path, splits: list[str]) -> CafeError:
    """Make the error of a file without any image to test on, which names the splits that it has instead."""
    there = f"; there are the splits {', '.join(map(repr, splits))}" if splits else ""
    return CafeError(f"The evaluation file {path} has no complete image in its split 'test'{there}.")


def _splits_of(paths: Sequence[Path]) -> list[str]:
    """List the splits that the rows of tables name."""
    rows = chain.from_iterable(map(_read_rows, paths))
    return sorted({str(row["split"]) for row in rows if row.get("split")})


def _read_records(paths: Sequence[Path]) -> Iterator[tuple[Image, list[str]]]:
    """Read the test split of files or of a saved dataset: each row's image and captions."""
    if paths[0].suffix == ".json":
        yield from _read_karpathy(paths[0])
        return
    for path in paths:
        yield from _read_table(path)


def _read_table(path: Path) -> Iterator[tuple[Image, list[str]]]:
    """Read the image and the captions of each row of a table, those of the test split if its rows name a split."""
    number = 0  # stays 0 if there is no row
    for number, row in enumerate(_read_rows(path), 1):
        # Some files on the Hub have all splits in one table. An empty cell names none.
        if row.get("split") not in ("test", None, ""):
            continue
        image = _to_image(_first_field(row, IMAGE_COLUMNS, path, number), path, number)
        yield image, _to_captions(_first_field(row, CAPTION_COLUMNS, path, number))
    if not number:
        raise CafeError(f"The evaluation file {path} is empty.")


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read the rows of a file, or of the test split of a saved dataset.

    Raises:
        CafeError: a row cannot be read, or has no named fields.
    """
    # Rows are read once, in order: one chunk of them in memory is enough.
    rows = HFDataset(str(path), "test", "") if path.is_dir() else open_rows(str(path), max_cached=1)
    for number in range(sum(rows.chunks)):
        try:
            row = rows[number]
        except (CafeError, RecursionError) as error:
            raise CafeError(f"Record {number + 1} of the evaluation file {path} is damaged: {error}") from None
        if not isinstance(row, dict):
            raise CafeError(f"Record {number + 1} of the evaluation file {path} should be an object with named fields.")
        yield row


def _first_field(row: dict[str, Any], names: tuple[str, ...], path: Path, number: int) -> Any:
    """Get the value under the first of these names that a row has.

    Args:
        row: the row.
        names: of columns that may hold it.
        path: the row's file, for the error.
        number: the row's number, from 1, for the error.
    """
    for name in names:
        if row.get(name):
            return row[name]
    raise CafeError(f"The evaluation file {path} lacks the field {names[0]!r} in record {number}.")


def _to_image(value: Any, path: Path, number: int) -> Image:
    """Take an image by its name, or as bytes, which may come without a name.

    Args:
        value: of the row's field.
        path: the row's file, for the error.
        number: the row's number, from 1, for the error.
    """
    if isinstance(value, bytes):
        return {"bytes": value}
    if isinstance(value, dict):
        name, encoded = value.get("path"), value.get("bytes")
        # The datasets library leaves the bytes out of images that it was told not to embed.
        if isinstance(encoded, bytes) and encoded and isinstance(name, str | None):
            return {"bytes": encoded, "path": name}
        value = None if encoded else name
    if not isinstance(value, str):
        raise CafeError(f"The image in record {number} of the evaluation file {path} is neither a name nor an image.")
    return value


def _to_captions(value: Any) -> list[str]:
    """Take one caption or several; in a CSV file, several are a list in JSON."""
    if isinstance(value, str):
        value = parse_list(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    return [value]


def _read_karpathy(path: Path) -> Iterator[tuple[Image, list[str]]]:
    """Read the images and captions of a Karpathy file's split "test", all of which must be complete.

    Raises:
        CafeError: the file has another format, an image or a caption is missing, or the split has no image.
    """
    parsed = load_json(path, "a Karpathy file")
    # Any of these errors means a file of another kind; it is reported before anything is embedded.
    try:
        splits = [row["split"] for row in parsed["images"]]
        rows = [row for row in parsed["images"] if row["split"] == "test"]
        # COCO's images are in a folder for each split, which `filepath` names.
        names = [str(Path(row.get("filepath", "")) / row["filename"]) for row in rows if row["filename"]]
        captions = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]
    except (KeyError, TypeError, AttributeError) as error:
        raise CafeError(f"The evaluation file {path} is not a Karpathy file: {error!r}.") from None
    if not rows:
        raise _no_test_image(path, sorted(set(map(str, splits))))
    if len(names) < len(rows) or not all(texts and texts[0] for texts in captions):
        raise CafeError(f"An image of the split 'test' of the evaluation file {path} lacks its name or its captions.")
    yield from zip(names, captions, strict=True)


USER_DATASET = RetrievalDataset(
    "retrieval",
    ("dataset_*.json", "captions.csv", "captions.jsonl", "captions.parquet"),
    exclude=("dataset_flickr30k.json", "dataset_coco.json"),
)
FLICKR30K_DATASET = RetrievalDataset(
    "flickr30k",
    (
        *("dataset_flickr30k.json", "flickr30k/dataset_flickr30k.json"),
        *("flickr30k/*.csv", "flickr30k/test*.parquet", "flickr30k/data/test*.parquet", "flickr30k/"),
    ),
    captions=CAPTIONS_PER_IMAGE,
    folders=("flickr30k-images", "images_flickr_1k_test"),
)
COCO_DATASET = RetrievalDataset(
    "coco",
    (
        *("dataset_coco.json", "coco/dataset_coco.json"),
        *("coco/*.csv", "coco/test*.parquet", "coco/data/test*.parquet", "coco/"),
    ),
    captions=CAPTIONS_PER_IMAGE,
    folders=("val2014", "images_mscoco_2014_5k_test"),
)
PARAGRAPHS_DATASET = RetrievalDataset("paragraphs", ("paragraphs*.csv", "paragraphs*.jsonl", "paragraphs*.parquet"))
