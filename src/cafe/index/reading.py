"""Read images for the model: hash, decode and encode files, pages of PDF files, and the records of a source.

This runs in worker processes, ahead of the model; see `cafe.index.workers`.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from jaxtyping import Shaped
from PIL import Image
from torch.utils.data import Dataset

from cafe.content import Content, Dialogue, Example, ImageLimits, ImageRef, Turn
from cafe.data.image_fields import image_refs
from cafe.data.records import OpenedSource
from cafe.errors import CafeError, RecordError
from cafe.images.appearance import appearance_of
from cafe.images.dates import date_taken
from cafe.images.decoding import open_encoded, upright_size
from cafe.images.files import read_image_file
from cafe.index.pdf import iter_page_ids, read_pages
from cafe.index.store import Place
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import dialogue_messages, embedding_messages
from cafe.packing import Branch

DIGEST_CHARACTERS = 32  # of SHA-256: 128 bits, so that two contents never have the same
PAGES_AT_ONCE = 8
CAPTION_COLUMNS = ("caption", "text", "txt")  # of records that are no examples to train on
MAX_COLUMN = 1000  # characters of a value that comes along with a record

# What a bad image raises, or a bad disk, or a lack of memory.
READ_ERRORS = (RecordError, OSError, MemoryError)

KnownKeys = Shaped[np.ndarray, " keys"]  # sorted byte strings, which take less memory than a set


@dataclass(frozen=True)
class FileItem:
    """Ask for an image file, or for some pages of a PDF file from a page on.

    Attributes:
        place: of the file, without its key.
        first_page: the number of the page, from 1; 0 for an image.
    """

    place: Place
    first_page: int = 0

    @property
    def is_pdf(self) -> bool:
        """Return whether it asks for pages."""
        return self.first_page > 0

    @property
    def num_images(self) -> int:
        """Return how many images it gives at most."""
        return PAGES_AT_ONCE if self.is_pdf else 1


@dataclass(frozen=True)
class RecordItem:
    """Ask for the images of a record of the source, by its number."""

    number: int
    num_images = 1  # of nearly all records
    is_pdf = False


Item = FileItem | RecordItem


@dataclass(frozen=True)
class Encoded:
    """Hold a decoded image as the model reads it, and what is known about it.

    Attributes:
        embedding: the branch whose last token is its readout.
        prompt: the branch that asks for a caption; None if none is wanted.
        width, height: in pixels, upright.
        taken_at: when it was taken; None if it does not say.
        appearance: what it looks like, see `cafe.images.appearance`.
        text: the words on a page, or those that came with a record.
    """

    embedding: Branch
    prompt: Branch | None
    width: int
    height: int
    taken_at: datetime | None
    appearance: bytes
    text: str


@dataclass(frozen=True)
class Reading:
    """Hold what became of an item.

    Attributes:
        place: with the key of its content, or with an error. That of a PDF file has neither.
        encoded: the image; None if there is none or its content is known.
        next_pages: of a PDF file, the numbers of the pages with which further items begin.
    """

    place: Place
    encoded: Encoded | None = None
    next_pages: Sequence[int] = ()


@dataclass
class Reader(Dataset[list[Reading]]):
    """Read lists of items. It is pickled to the workers.

    Attributes:
        chat_processor: encodes the images.
        known: the keys of contents that need not be decoded.
        describe_prompt: what the model is asked for a caption; empty for none.
        limits: of bytes and pixels.
        source: the source of the records; None if there is none.
    """

    chat_processor: ChatProcessor
    known: KnownKeys
    describe_prompt: str
    limits: ImageLimits
    source: OpenedSource | None = None

    def __getitem__(self, items: Sequence[Item]) -> list[Reading]:
        return [reading for item in items for reading in self._read(item)]

    def _read(self, item: Item) -> Iterator[Reading]:
        """Read an item."""
        if isinstance(item, RecordItem):
            yield from self._read_record(item)
        elif item.is_pdf:
            yield from self._read_pages(item.place, item.first_page)
        else:
            yield self._read_image(item.place, lambda: self._read_file(item.place))

    def _read_file(self, place: Place) -> bytes:
        """Read the bytes of a place's file."""
        return read_image_file(Path(place.path), self.limits.max_bytes)

    def _read_image(self, place: Place, read: Callable[[], bytes], text: str = "") -> Reading:
        """Read an image by a function that returns its bytes; what is wrong with it becomes its place's error."""
        try:
            # The digest first: what is known is not decoded.
            data = read()
            place = replace(place, key=_digest(data))
            if self._is_known(place):
                return Reading(place)
            ref = ImageRef(data, self.limits, name=place.id)
            with open_encoded(ref) as (header, _):
                size, taken_at = upright_size(header), date_taken(header)
            # At the size that the model needs, which is less than that of a photograph.
            [image] = self.chat_processor.decode_images([ref])
            return Reading(place, self._encode(image, size, taken_at, text))
        except READ_ERRORS as error:
            return Reading(_failed(place, error))

    def _read_pages(self, place: Place, first: int) -> Iterator[Reading]:
        """Read some pages of a PDF file, and return with its own place the items that are left, or its end."""
        try:
            data = self._read_file(place)
            num_pages, pages = read_pages(data, first, PAGES_AT_ONCE, place.path)
        except READ_ERRORS as error:
            yield Reading(_failed(place, error))
            return
        # Each page is an image of its own, which may be bad by itself.
        digest = _digest(data)
        numbered = iter_page_ids(place.path, first, len(pages))
        for (number, id), page in zip(numbered, pages, strict=True):
            page_place = replace(place, id=id, page=number, key=f"{digest}#{number}")
            try:
                if isinstance(page, RecordError):
                    raise page
                known = self._is_known(page_place)
                yield Reading(page_place, None if known else self._encode(page[0], page[0].size, None, page[1]))
            except READ_ERRORS as error:
                yield Reading(_failed(page_place, error))
        after = first + len(pages)
        if after > num_pages:
            yield Reading(place)
        elif first == 1:  # all further items at once, so that workers are started once for them
            yield Reading(place, next_pages=range(after, num_pages + 1, PAGES_AT_ONCE))

    def place_of(self, item: Item) -> Place:
        """Return the place of an item, as far as it is known before it is read."""
        if isinstance(item, FileItem):
            return item.place
        assert self.source is not None  # records come from one
        path = self.source.source.path
        _, mtime_ns = _status_of(path)
        return Place(f"{path}#record={item.number}", path, None, f"{Path(path).name} {item.number}", path, 0, mtime_ns)

    def _read_record(self, item: RecordItem) -> Iterator[Reading]:
        """Read the images of a record."""
        assert self.source is not None  # records come from one
        place = self.place_of(item)
        try:
            refs, text = record_images(self.source, item.number)
            place = replace(place, columns=_columns(self.source.row(item.number)[0]))
        except CafeError as error:
            yield Reading(_failed(place, error))
            return
        for index, ref in enumerate(refs):
            yield self._read_ref(ref, place, index, text)

    def _read_ref(self, ref: ImageRef, place: Place, index: int, text: str) -> Reading:
        """Read one of the images of a record."""
        if isinstance(ref.source, Path):
            path = str(ref.source.absolute())
            if not is_text(path):
                return Reading(_failed(place, RecordError("The image's name is not UTF-8: rename the file.")))
            size, mtime_ns = _status_of(path)
            file = replace(place, id=path, path=path, name=ref.source.name, size=size, mtime_ns=mtime_ns)
            return self._read_image(file, lambda: self._read_file(file), text)
        data = ref.source
        assert isinstance(data, bytes)  # records hold no decoded images
        if index:
            place = replace(place, id=f"{place.id}.{index}")
        return self._read_image(place, lambda: data, text)

    def _encode(self, image: Image.Image, size: tuple[int, int], taken_at: datetime | None, text: str) -> Encoded:
        """Encode an image for the model.

        Args:
            image: the image, perhaps reduced.
            size: of the whole image, upright.
            taken_at: when it was taken.
            text: the words on it or with it.
        """
        # Processed once for both branches, which begin with the same image.
        processor = self.chat_processor
        images = processor.process_images([image])
        content = Content.of(image)
        embedding = processor.encode_embedding(embedding_messages(content, processor.prompts), images)
        prompt = None
        if self.describe_prompt:
            question = Turn("user", Content((*content.parts, self.describe_prompt)))
            prompt = processor.encode_prompt(dialogue_messages(Dialogue((question,)), processor.prompts), images)
        return Encoded(embedding, prompt, *size, taken_at, appearance_of(image), text)

    def _is_known(self, place: Place) -> bool:
        """Return whether a place's content is known."""
        # By bisection.
        key = (place.key or "").encode()
        row = int(np.searchsorted(self.known, key))
        return row < len(self.known) and bool(self.known[row] == key)


def _digest(data: bytes) -> str:
    """Return the key of a file's bytes."""
    return hashlib.sha256(data).hexdigest()[:DIGEST_CHARACTERS]


def _status_of(path: str) -> tuple[int, int]:
    """Return the size of a file and when it was changed; zeros for what is no local file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a NUL, as in no file's name
        return 0, 0
    return status.st_size, status.st_mtime_ns


def is_text(path: str) -> bool:
    """Return whether a path is UTF-8; of one that is not, Python keeps the bytes in a form that is not either."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _failed(place: Place, error: Exception) -> Place:
    """Return a place with the reason why its image could not be read."""
    reason = str(error)
    if isinstance(error, OSError):
        reason = f"The file cannot be read: {error.strerror or error}."
    elif isinstance(error, MemoryError):
        reason = "There is not enough memory to read it."
    if not isinstance(error, CafeError):
        place = replace(place, mtime_ns=-1)  # the file may be sound, so that it is read again next time
    return replace(place, key=None, error=reason)


def record_images(opened: OpenedSource, number: int) -> tuple[list[ImageRef], str]:
    """Return the images of a record, and the words that come with them.

    Args:
        opened: the source.
        number: of the record.

    Raises:
        CafeError: the record has no image, or one that it may not name.
    """
    try:
        contents = _contents(opened.example(number, Random(number)))
        refs = [ref for content in contents for ref in content.images]
        text = "\n".join(filter(None, (content.text.strip() for content in contents)))
    except RecordError:
        # What is no example to train on may hold an image all the same.
        row, source = opened.row(number)
        column = source.columns.image
        if isinstance(row, dict) and not row.keys() & set(asdict(source.columns).values()):
            raise RecordError(
                f"{source.path}, record {number}: there is no column {column!r}; there are {', '.join(map(str, row))}: "
                "say which one has the images, as in columns='{image: file}'."
            ) from None
        if not isinstance(row, dict) or row.get(column) is None:
            raise
        refs = image_refs(row[column], source)
        texts = [row.get(name) for name in CAPTION_COLUMNS]
        text = "\n".join(value for value in texts if isinstance(value, str))
    if not refs:
        raise RecordError(f"{opened.source.path}, record {number}: there is no image.")
    return refs, text


def _contents(example: Example) -> list[Content]:
    """Return what a record shows: its pair, or else its dialogue."""
    if example.pair:
        return [example.pair.query, example.pair.target]
    return [turn.content for turn in example.dialogue.turns] if example.dialogue else []


def _columns(row: Any) -> str | None:
    """Return the short values of a row as a JSON object; None if there are none."""
    if not isinstance(row, dict):
        return None
    kept = {}
    for name, value in row.items():
        is_short_text = isinstance(value, str) and len(value) <= MAX_COLUMN
        # JSON has no NaN and no infinity.
        if is_short_text or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
            kept[str(name)] = value
    return json.dumps(kept) if kept else None
