"""Rows of every kind of file, read in any order; what is damaged is named."""

import csv
import io
import json
import pickle
import random
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import png

from cafe.data.readers.base import open_rows
from cafe.data.readers.hf_datasets import HFDataset
from cafe.data.readers.parquet import Parquet
from cafe.data.readers.tar import Tar
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


def tar(members: list[tuple[str, bytes]], fmt: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of some files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize("kind", ["json", "jsonl", "ndjson", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("where", ["local", "store"])
def test_every_kind_gives_the_same_rows_in_any_order_and_in_another_process(tmp_path, kind, where):
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


@pytest.mark.parametrize("fmt", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("where", ["local", "store"])
def test_a_tar_gives_each_key_as_a_row(tmp_path, fmt, where, own_cache):
    long = "f" * 90 + "/" + "n" * 90  # longer than a plain header holds
    members = [
        ("one.jpg", png("red", kind="JPEG")), ("one.txt", b" a red thing\n"),
        ("x/two.0.png", png("red")), ("x/two.1.png", png("blue")), ("x/two.json", b'{"id": 7, "positive": "two"}'),
        (f"{long}.cls", b"3"), (f"{long}.tags.json", b"[1, 2]"), ("ünï.txt", "ö".encode()),
    ]  # fmt: skip
    name = str(tmp_path / "a.tar") if where == "local" else "memory://tars/a.tar"
    fsspec.url_to_fs(name)[0].pipe_file(name, tar(members, fmt))
    for _ in range(2):  # the second time from the index that was kept
        rows = Tar(name)
        assert rows.chunks == [4]
        assert rows[3] == {"__key__": "ünï", "txt": "ö", "positive": "ö"}
        assert rows[2] == {"__key__": long, "cls": b"3", "tags.json": [1, 2]}
        shown = [members[2][1], members[3][1]]
        assert rows[1] == {"__key__": "x/two", "id": 7, "positive": "two", "image": shown, "query_image": shown}
        assert rows[0]["positive"] == rows[0]["txt"] == "a red thing" and rows[0]["image"] == [members[0][1]]
        assert len(list((own_cache / "cafe" / "tars").iterdir())) == 1


def test_files_that_a_mac_hides_in_a_tar_are_passed_over(tmp_path):
    members = [("./0.jpg", png("red", kind="JPEG")), ("./0.json", b'{"positive": "red"}'), ("./1.txt", b"one")]
    hidden = [(name.replace("./", "./._"), b"about it") for name, _ in members]
    (tmp_path / "a.tar").write_bytes(tar([each for pair in zip(hidden, members, strict=True) for each in pair]))
    rows = Tar(str(tmp_path / "a.tar"))
    assert rows.chunks == [2] and rows[1] == {"__key__": "./1", "txt": "one", "positive": "one"}
    assert rows[0]["positive"] == "red" and rows[0]["image"] == [members[0][1]]


def test_a_tar_is_read_where_its_index_cannot_be_kept(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(tar([("a.txt", b"a"), ("b.txt", b"b")]))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    rows = Tar(str(tmp_path / "a.tar"))
    assert [rows[index]["positive"] for index in range(2)] == ["a", "b"]


def test_a_tar_that_changed_is_indexed_again(tmp_path):
    for names in (["a"], ["a", "b"]):
        (tmp_path / "a.tar").write_bytes(tar([(f"{name}.txt", name.encode()) for name in names]))
        assert Tar(str(tmp_path / "a.tar")).chunks == [len(names)]


@pytest.mark.parametrize("lost", [0, 600, 1030, 1536, 2000])  # bytes; a row takes 1536, then comes the end mark
def test_a_tar_cut_short_keeps_its_whole_rows_and_ends_in_a_damaged_one(tmp_path, lost):
    whole = tar([(f"{number}.txt", bytes([65 + number]) * 1000) for number in range(5)])[: 5 * 1536]
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) - lost])
    rows = Tar(str(tmp_path / "a.tar"))
    good = sum(rows.chunks) - 1
    assert [rows[index]["positive"][0] for index in range(good)] == list("ABCDE")[:good]
    assert good == (5 * 1536 - lost) // 1536
    with pytest.raises(CafeError, match="what follows is lost"):
        rows[good]


def test_what_is_no_such_file_is_named(tmp_path):
    for name, data, reason in (
        ("a.tar", b"no tar" * 200, "cannot be read"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.json", b"{", "not valid JSON"),
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
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n{"id": \n{"id": 3}\n')
    rows = open_rows(str(tmp_path / "a.jsonl"), 1)
    assert [rows[0], rows[2]] == [{"id": 1}, {"id": 3}]
    with pytest.raises(CafeError, match="not valid JSON"):
        rows[1]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The datasets library, with no network and a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return datasets


def test_a_dataset_saved_to_disk_keeps_pictures_encoded(tmp_path, offline):
    data = [
        {"image": {"bytes": png(color), "path": None}, "caption": [color, f"it is {color}"]}
        for color in ("red", "blue")
    ]
    features = offline.Features({"image": offline.Image(), "caption": offline.List(offline.Value("string"))})
    dataset = offline.Dataset.from_list(data, features=features)
    offline.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "saved")
    rows = pickle.loads(pickle.dumps(HFDataset(str(tmp_path / "saved"), "train", "")))
    assert rows.chunks == [2] and [rows[index] for index in (1, 0)] == data[::-1]
    assert HFDataset(str(tmp_path / "saved"), "test", "")[0] == data[1]
    with pytest.raises(CafeError, match=r"no split 'val'; there are train, test"):
        HFDataset(str(tmp_path / "saved"), "val", "")


def test_pictures_in_a_folder_with_their_metadata_are_a_dataset(tmp_path, offline):
    (tmp_path / "train").mkdir()
    for color in ("red", "blue"):
        (tmp_path / "train" / f"{color}.png").write_bytes(png(color))
    lines = [json.dumps({"file_name": f"{color}.png", "text": f"it is {color}"}) for color in ("blue", "red")]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    rows = HFDataset(str(tmp_path), "train", "")
    found = {Path(rows[index]["image"]["path"]).name: rows[index]["text"] for index in range(2)}
    assert found == {"red.png": "it is red", "blue.png": "it is blue"}


def test_a_dataset_that_is_nowhere_is_one_sentence(offline):
    with pytest.raises(CafeError, match="cannot be read as a dataset"):
        HFDataset("dataset:nobody/nothing", "train", "")


def test_index_offsets_are_where_an_independent_reader_finds_them(tmp_path):
    data = tar([(f"{number}.{kind}", bytes(number * 700)) for number in range(4) for kind in ("a", "b")])
    (tmp_path / "a.tar").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar") as file:
        expected = [member.offset for member in file.getmembers()][::2]
    assert np.array_equal(Tar(str(tmp_path / "a.tar")).starts[:-1], expected)
