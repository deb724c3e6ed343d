"""Data that has changed is told from data that was copied or touched."""

import io
import os
import shutil
import tarfile

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cafe.data.identity import SAMPLE_SIZE, diff_identities, identify_source
from cafe.data.records import open_source
from cafe.data.source import Source

ROWS = [{"query": f"query {number}", "positive": f"answer {number}"} for number in range(40)]


def identify(path):
    return [identify_source(open_source(Source(path=str(path), format="pairs")))]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        path.write_text("query,positive\n" + "".join(f"{row['query']},{row['positive']}\n" for row in rows))
    else:
        path.write_text("\n".join(map(str, rows)).replace("'", '"'))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_change_is_noticed_and_touching_or_copying_is_none(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    write(path, ROWS)
    before = identify(path)
    os.utime(path, (0, 0))
    shutil.copy(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)
    assert diff_identities(before, identify(path)) == []

    write(path, [*ROWS[:-1], ROWS[-1] | {"positive": "answer 93"}])  # as long as before
    assert diff_identities(before, identify(path)) == [f"{path} has other content"]
    write(path, ROWS[:30])
    assert diff_identities(before, identify(path)) == [f"{path} had 40 records and has 30"]


def test_a_large_tar_is_sampled_at_both_ends_and_between(tmp_path):
    def tar(fill):
        data = bytearray(40 * SAMPLE_SIZE)
        data[20 * SAMPLE_SIZE : 24 * SAMPLE_SIZE] = fill * (4 * SAMPLE_SIZE)
        with tarfile.open(tmp_path / "a.tar", "w") as file:
            info = tarfile.TarInfo("0.bin")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        return identify(tmp_path / "a.tar")

    assert tar(b"a") == tar(b"a") != tar(b"b")


def test_files_that_come_and_go_are_named(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", ROWS)
    before = identify(tmp_path / "*.jsonl")
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    assert diff_identities(before, identify(tmp_path / "*.jsonl")) == [
        f"{tmp_path}/a.jsonl is gone",
        f"{tmp_path}/c.jsonl is new",
    ]


def test_a_store_and_a_dataset_have_an_identity_too(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe("/identity/a.jsonl", b'{"query": "a"}')
    before = identify("memory://identity/a.jsonl")
    assert identify("memory://identity/a.jsonl") == before
    fs.pipe("/identity/a.jsonl", b'{"query": "b"}')
    assert identify("memory://identity/a.jsonl") != before
    for name, rows in (("one", ROWS), ("same", ROWS), ("other", ROWS[::-1])):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / name)
    one, same, other = (next(iter(identify(tmp_path / name)[0].values())) for name in ("one", "same", "other"))
    assert one == same != other
