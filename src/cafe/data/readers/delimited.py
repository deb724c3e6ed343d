"""Tables of text: CSV, with quotes, and TSV, without."""

import csv
import io
import json
from collections import Counter
from typing import Any

from cafe.data.files import read
from cafe.errors import CafeError, RecordError
from cafe.utils.text import escape_controls

# Added as a last row, to see whether an open quote swallows it. No text holds the control character.
_END = "\x04end"


class DelimitedRows:
    """Hold the rows of a CSV or TSV file in memory. A cell that holds a list as JSON is a list.

    Tabs are not allowed in a cell of a TSV file, so quotes mean nothing there and are read as they stand. Only if the
    rows then do not fit the header, and do fit it by the rules of CSV, the file was written by those.

    Raises:
        CafeError: the file is missing, not UTF-8, names a column twice, or has a quote that is never closed.
    """

    def __init__(self, name: str, delimiter: str) -> None:
        self.name, self.separator = name, "tabs" if delimiter == "\t" else "commas"
        rows = _read_rows(name, delimiter)
        self.header, self.rows = (rows[0], rows[1:]) if rows else ([], [])
        self.chunks = [len(self.rows)]
        repeated = [column for column, count in Counter(filter(None, self.header)).items() if count > 1]
        if repeated:
            raise CafeError(f"The data file {name} names the column {repeated[0]!r} more than once.")

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        # A row of another length was cut at a delimiter or a line break within a text: which one cannot be known.
        if len(row) != len(self.header):
            raise RecordError(
                f"the row has {len(row)} cells and the header {len(self.header)}: a text with {self.separator} or line "
                "breaks should be in quotes."
            )
        return {column: parse_list(text) for column, text in zip(self.header, row, strict=True)}


def parse_list(text: str) -> Any:
    """Return the list that a text holds as JSON, and otherwise the text."""
    if not text.startswith("["):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # a text that begins with a bracket
        return text


def _read_rows(name: str, delimiter: str) -> list[list[str]]:
    """Read all rows, the header first; empty lines are none."""
    # A cell may hold an image in base64; the default limit is 128 KiB.
    csv.field_size_limit(2**31 - 1)
    try:
        text = read(name).decode("utf-8-sig")  # spreadsheets write a byte order mark before the first column's name
    except UnicodeDecodeError as error:
        raise CafeError(f"The data file {name} is not UTF-8 text: {error}.") from None
    if delimiter == "\t":
        literal = _parse(text, delimiter, with_quotes=False)
        if _is_rectangular(literal) or '"' not in text:
            return literal
        quoted = _parse(text, delimiter, with_quotes=True)
        is_quoted = quoted[-1:] == [[_END]] and _is_rectangular(quoted[:-1])
        return quoted[:-1] if is_quoted else literal
    *rows, last = _parse(text, delimiter, with_quotes=True)
    if last != [_END]:
        begins = escape_controls(" ".join(last)[:40])
        raise CafeError(
            f'The data file {name} has a quote that is never closed, after "{begins}": a quote within a text is '
            'written twice ("").'
        )
    return rows


def _parse(text: str, delimiter: str, with_quotes: bool) -> list[list[str]]:
    """Split a text into rows of cells; where quotes are read, a last row shows whether all are closed."""
    if with_quotes:
        rows = csv.reader(io.StringIO(f"{text}\n{_END}\n", newline=""), delimiter=delimiter)
    else:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=csv.QUOTE_NONE)
    return [row for row in rows if len(row) > 1 or "".join(row).strip()]


def _is_rectangular(rows: list[list[str]]) -> bool:
    """Return whether all rows have as many cells as the first."""
    return len(set(map(len, rows))) <= 1
