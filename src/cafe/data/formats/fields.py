"""The fields of a record, by the names that the source's columns give them."""

from typing import Any

from cafe.content import ImageRef
from cafe.data.image_fields import image_refs
from cafe.data.readers.delimited import parse_list
from cafe.data.source import Columns, Source
from cafe.errors import RecordError


def get_field(row: Any, source: Source, name: str) -> Any:
    """Return a field, None if it is not there; only one that the source renamed must be there.

    Raises:
        RecordError: the source renamed it, and the record has no such field.
    """
    column = getattr(source.columns, name)
    is_required = column != getattr(Columns, name)
    if is_required and column not in row:
        raise missing_column(repr(column), row)
    return row.get(column)


def missing_column(wanted: str, row: Any) -> RecordError:
    """Return the error for a column that is not there, which lists those that are."""
    return RecordError(f"there is no column {wanted}; there are {', '.join(map(str, row))}.")


def get_images(row: Any, source: Source) -> list[ImageRef]:
    """Return the images that a conversation is about: those under `images` if there are none under `image`."""
    refs = image_refs(get_field(row, source, "image"), source)
    if refs or source.columns.image != Columns.image:
        return refs
    return image_refs(row.get("images"), source)


def get_scores(row: Any, source: Source) -> tuple[float, ...]:
    """Return the probability of each negative that it matches after all; CSV holds numbers as texts.

    Raises:
        RecordError: one is not a number.
    """
    scores = as_list(get_field(row, source, "negative_scores"))
    try:
        return tuple(map(float, scores))
    except (TypeError, ValueError, OverflowError):
        raise RecordError(f"{source.columns.negative_scores} should be numbers between 0 and 1.") from None


def as_list(value: Any) -> list[Any]:
    """Return a field's values: it may be a list, a single value or, in a CSV file, a list as JSON."""
    if isinstance(value, str):
        value = parse_list(value)
    # A CSV file has no null: an empty cell is no value.
    match value:
        case None | "":
            return []
        case list() | tuple():
            return list(value)
    return [value]
