"""Rows of every kind of file, read in any order; what is damaged is named."""

import csv
import io
import json
import pickle
import random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafe.data.readers.base import open_rows
from cafe.data.readers.parquet import Parquet
from cafe.errors import CafeError

TABLE = [{"query": f"question {number}\nof two lines", "positive": f"answer {number}"} for number in range(20)]


def write(name: str, kind: str) -> None:
    """The table as a file of some kind."""
    out = io.BytesIO()
    if kind == "json":
        out.write(json.dumps(TABLE).encode())
    elif kind in ("csv", "tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, TABLE[0], delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(TABLE)
        out.write(text.getvalue().encode())
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(TABLE), out, row_group_size=6)
    else:
        out.write(b"\n\n".join(json.dumps(row).encode() for row in TABLE))
    fsspec.url_to_fs(name)[0].pipe_file(name, out.getvalue())


@pytest.mark.parametrize("kind", ["json", "jsonl", "ndjson", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("where", ["local", "store"])
def test_every_kind_gives_the_same_rows_in_any_order_after_pickling(tmp_path, kind, where):
    name = str(tmp_path / f"a.{kind}") if where == "local" else f"memory://rows/a.{kind}"
    write(name, kind)
    rows = pickle.loads(pickle.dumps(open_rows(name, max_cached=2)))
    assert sum(rows.chunks) == 20
    for index in random.Random(0).sample(range(20), 20):
        assert rows[index] == TABLE[index]


def test_a_parquet_file_holds_no_more_row_groups_than_it_may(tmp_path):
    write(str(tmp_path / "a.parquet"), "parquet")
    rows = Parquet(str(tmp_path / "a.parquet"), max_cached=2)
    assert rows.chunks == [6, 6, 6, 2] and rows.cached == {}
    for index in (0, 7, 19, 8, 3):
        assert rows[index] == TABLE[index] and len(rows.cached) <= 2
    assert list(rows.cached) == [1, 0]


def test_a_file_of_the_wrong_kind_is_named(tmp_path):
    for name, data, reason in (
        ("a.tar", b"no tar" * 200, "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b'{"id": 1}\n{"id": 2}\n', r"on each line: give it a name that ends in \.jsonl"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"3", "not a list of records"),
        ("a.json", b'"text"', "not a list of records"),
        ("a.csv", b"\xff\xfe", "not UTF-8"),
        ("a.mp3", b"", "of no kind that is read"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(CafeError, match=reason) as error:
            open_rows(str(tmp_path / name), 1)
        assert name in str(error.value)


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path, kind):
    name = tmp_path / f"a.{kind}"
    write(str(name), kind)
    name.write_bytes("\ufeff".encode() + name.read_bytes())
    assert open_rows(str(name), 1)[0] == TABLE[0]


def test_a_damaged_line_spoils_no_other(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": \n{"id": 3}\n' + "[" * 100_000)
    rows = open_rows(str(tmp_path / "a.jsonl"), 1)
    assert [rows[0], rows[2]] == [{"id": 1}, {"id": 3}]
    with pytest.raises(CafeError, match="not valid JSON"):
        rows[1]
    with pytest.raises(CafeError, match="nested too deeply"):
        rows[3]
