"""MMEB's files as queries with candidates: the records of images and videos, and the corpora of documents."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from cafe.content import Content, ImageRef
from cafe.data.formats.mmeb import MARK
from cafe.data.image_fields import list_frames, place_images
from cafe.errors import CafeError
from cafe.evaluation.io import evenly_spaced, json_lines, parquet_rows, read_text
from cafe.evaluation.suites.mmeb.datasets import find_in_folders, list_folders, parquet_files
from cafe.evaluation.suites.mmeb.video import VIDEO_FORMATS, to_records
from cafe.utils.text import escape_controls, shorten

NUM_FRAMES = 8  # of a video, evenly spaced, as in VLM2Vec
PAGE_QUERY = "Find a document image that matches the given query: "
PAGE = "Understand the content of the provided document image."
FOLDERS = ("", "images", "mmeb_eval", "mmeb_eval/images", "image-tasks", "video-tasks/frames")  # of images
FIELDS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


@dataclass(frozen=True)
class Side:
    """Hold a query or a candidate: its text, and its images by name (a folder holds frames) or encoded."""

    text: str
    images: tuple[str | bytes, ...] = ()


@dataclass(frozen=True)
class Query:
    """Hold a query, its candidates, and the gain of each right one by its number."""

    side: Side
    candidates: Sequence[Side]
    gains: dict[int, float] = field(default_factory=lambda: {0: 1.0})
    id: str | int = 0


def read_records(
    path: Path, limit: int | None = None, *, video: str = "", rank_all: bool = False, data: Path = Path()
) -> list[Query]:
    """Read rows of MMEB-eval: `qry_text`, `qry_img_path`, and the lists `tgt_text` and `tgt_img_path`, the right first.

    `qry_inst` and `tgt_inst`, if given, come before the query's text, and before the text of a candidate with an
    image. An image field may be a list, or name a folder of a video's frames. Repeated candidates count once.

    Args:
        path: parquet or JSON lines.
        limit: the first rows.
        video: the name of a dataset of videos, whose rows may have the Hub's own columns.
        rank_all: every query ranks the candidates of all these rows, and those named in `NAME_labels.txt` next to it.
        data: the folder of evaluation files, where frames are.

    Raises:
        CafeError: a row lacks a field, has no candidate, or lists of different lengths.
    """
    rows = _read_rows(path, limit, video, data)
    queries = [_to_query(row, number, path) for number, row in enumerate(rows)]
    if not rank_all:
        return queries
    # Some classes have no row within the limit, or none at all; a file of labels adds those.
    return _share_candidates(queries, _read_labels(path.with_name(f"{video or path.stem}_labels.txt")))


def _read_labels(path: Path) -> list[Side]:
    """Read the names of classes, one a line; a dataset need not have this file."""
    if not path.is_file():
        return []
    names = map(str.strip, read_text(path).splitlines())
    return list(map(Side, filter(None, names)))


def _share_candidates(queries: Sequence[Query], others: Sequence[Side]) -> list[Query]:
    """Let every query rank the candidates of all queries, and some others; its own first one is right."""
    own = chain.from_iterable(query.candidates for query in queries)
    # One list for all, by which `embed` knows that they share it.
    candidates = list(dict.fromkeys(chain(own, others)))
    number_of = {candidate: number for number, candidate in enumerate(candidates)}
    return [Query(query.side, candidates, {number_of[query.candidates[0]]: 1.0}, query.id) for query in queries]


def _to_query(row: dict[str, Any], number: int, path: Path) -> Query:
    """Make a query of a record of MMEB-eval.

    Args:
        row: the record.
        number: its number, which becomes the query's id.
        path: its file, for the error.

    Raises:
        CafeError: it has no candidate, or lists of different lengths.
    """
    try:
        query = _parse_query(row, number, path)
        hash(query.side)  # which a list in place of a text does not have
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CafeError(f"Record {number} of {path} is not a record of MMEB: {error!r:.200}.") from None
    return query


def _parse_query(row: dict[str, Any], number: int, path: Path) -> Query:
    """Make a query of a record whose fields may have any types; errors are those of Python."""
    texts = row["tgt_text"]
    if not isinstance(texts, (list, tuple)):
        texts = []  # a text is not a list of its letters
    images = row["tgt_img_path"] or [""] * len(texts)
    if not texts or len(texts) != len(images):
        raise CafeError(f"Record {number} of {path} has {len(texts)} texts and {len(images)} images of candidates.")
    sides = []
    for text, names in zip(texts, images, strict=True):
        # As in MMEB's instruction variant: only candidates with an image have an instruction.
        instruction = row.get("tgt_inst") if names else ""
        sides.append(_to_side(text, names, instruction))
    right = dict.fromkeys(sides[: row.get("right", 1)])  # videos may have several right candidates
    query = _to_side(row["qry_text"], row["qry_img_path"], row.get("qry_inst"))
    return Query(query, list(dict.fromkeys(sides)), dict.fromkeys(range(len(right)), 1.0), number)


def _to_side(text: str | None, images: str | Sequence[str] | None, instruction: str | None) -> Side:
    """Make a side of a row's fields, each of which may be missing.

    Args:
        text: its text.
        images: the name of its image, or several; empty names stand for no image.
        instruction: comes before the text.
    """
    if isinstance(images, str):
        images = [images]
    names = tuple(filter(None, images or ()))
    if not all(isinstance(name, (str, bytes)) for name in names):
        raise TypeError("an image is not named by a text")
    # Spaces alone are cut: a line break after an image's mark belongs to the text.
    stripped = [(part or "").strip(" ") for part in (instruction, text)]
    texts = filter(str.strip, stripped)
    return Side(" ".join(texts), names)


def _read_rows(path: Path, limit: int | None, video: str, data: Path) -> list[dict[str, Any]]:
    """Read the first rows of a file or folder, as records with MMEB-eval's fields.

    Args:
        path: the file or folder.
        limit: the number of rows; all of them if None.
        video: the name of a dataset of videos; empty for others.
        data: the folder of evaluation files, where frames are.
    """
    # A user may have converted a dataset of videos to MMEB-eval's fields.
    row_format = VIDEO_FORMATS.get(video)
    if row_format is None or "qry_text" in _read_fields(path, (), 1)[0]:
        return _read_fields(path, FIELDS, limit)
    return to_records(video, _read_fields(path, row_format.columns, limit), data, path, FOLDERS)


def _read_fields(path: Path, fields: Sequence[str], limit: int | None) -> list[dict[str, Any]]:
    """Read the first rows, which must have the fields."""
    if path.suffix == ".jsonl":
        return json_lines(path, dict.fromkeys(fields, object))[:limit]
    return parquet_rows(parquet_files(path), path, fields, limit)[:limit]


def read_corpus(path: Path, limit: int | None = None) -> list[Query]:
    """Read queries for pages of a corpus: the folders `queries`, `corpus` and `qrels` of parquet files.

    Raises:
        CafeError: a column is missing, or a query has no relevant page in the corpus.
    """
    try:
        return _parse_corpus(path, limit)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CafeError(f"The corpus of {path} is not one of MMEB: {error!r:.200}.") from None


def _parse_corpus(path: Path, limit: int | None) -> list[Query]:
    """Read the queries of a corpus whose columns may have any types; errors are those of Python."""
    pages = _read_part(path, "corpus", "corpus-id", "image")
    candidates = [Side(PAGE, (_page_image(row["image"], path),)) for row in pages]
    number_of = {row["corpus-id"]: number for number, row in enumerate(pages)}

    # Judgments may repeat, or be about pages that the corpus lacks; the highest gain counts.
    gains_of: dict[Any, dict[int, float]] = {}
    for row in _read_part(path, "qrels", "query-id", "corpus-id", "score"):
        if row["score"] <= 0 or row["corpus-id"] not in number_of:
            continue
        gains, number = gains_of.setdefault(row["query-id"], {}), number_of[row["corpus-id"]]
        gains[number] = max(gains.get(number, 0.0), float(row["score"]))

    # A query without a relevant page would score 0 whatever the model does.
    queries = []
    for row in _read_part(path, "queries", "query-id", "query")[:limit]:
        if row["query-id"] not in gains_of:
            raise CafeError(f"The query {row['query-id']} of {path} has no relevant page in its corpus.")
        side = Side(PAGE_QUERY + row["query"])
        queries.append(Query(side, candidates, gains_of[row["query-id"]], row["query-id"]))
    return queries


def _read_part(path: Path, part: str, *columns: str) -> list[dict[str, Any]]:
    """Read one of a corpus' three folders."""
    return parquet_rows(parquet_files(path / part), path / part, columns)


def _page_image(image: Any, path: Path) -> str | bytes:
    """Take a page's image as the datasets library keeps it, or its name."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    # An empty name or no bytes at all is as good as none.
    if not image or not isinstance(image, (str, bytes)):
        raise CafeError(f"A page of the corpus of {path} has no image.")
    return image


def to_content(side: Side, data: Path, source: Path) -> Content:
    """Make a side the user's turn: each image at its mark, or all first if the marks do not match them.

    Args:
        side: the query or candidate.
        data: the folder of evaluation files.
        source: the file that names the images.

    Raises:
        CafeError: an image is missing.
    """
    unmarked = Content.of(MARK.sub("", side.text).strip())
    if not side.images:
        return unmarked
    refs = list(chain.from_iterable(_image_refs(image, data, source) for image in side.images))
    num_marks = len(MARK.findall(side.text))
    # A video has one mark for all its frames.
    if num_marks and len(refs) != num_marks:
        return Content((*refs, *unmarked.parts))
    return place_images(side.text, list(refs), MARK)


def _image_refs(image: str | bytes, data: Path, source: Path) -> list[ImageRef]:
    """Refer to an image, or to some frames of a folder, evenly spaced.

    Args:
        image: its name, or its bytes.
        data: the folder of evaluation files.
        source: the file that names the image, for the error.
    """
    if isinstance(image, bytes):
        return [ImageRef(image)]
    path = find_in_folders(data, FOLDERS, image)
    if path is None:
        places = list_folders(data, FOLDERS)
        raise CafeError(f"The image {shorten(escape_controls(image))}, which {source} names, is in none of {places}.")
    if path.is_file():
        return [ImageRef(path)]
    # A folder holds the frames of a video.
    frames = list_frames(str(path))
    return [ImageRef(Path(frames[number])) for number in evenly_spaced(len(frames), NUM_FRAMES)]
