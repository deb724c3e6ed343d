"""WebDataset tars: rows by key, an index that is kept, and files cut short."""

import io
import json
import random
import tarfile
from contextlib import suppress

import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import png

from cafe.data.readers.tar import Tar
from cafe.errors import CafeError, RecordError


def tar(members: list[tuple[str, bytes]], fmt: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of some files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


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


def test_hidden_files_of_macos_are_skipped(tmp_path):
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
def test_a_truncated_tar_ends_in_a_damaged_row(tmp_path, lost):
    whole = tar([(f"{number}.txt", bytes([65 + number]) * 1000) for number in range(5)])[: 5 * 1536]
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) - lost])
    rows = Tar(str(tmp_path / "a.tar"))
    good = sum(rows.chunks) - 1
    assert [rows[index]["positive"][0] for index in range(good)] == list("ABCDE")[:good]
    assert good == (5 * 1536 - lost) // 1536
    with pytest.raises(CafeError, match="the rest of the file is lost"):
        rows[good]


def rows_of(tmp_path, members: list[tuple[str, bytes]], **options) -> Tar:
    (tmp_path / "a.tar").write_bytes(tar(members))
    return Tar(str(tmp_path / "a.tar"), **options)


def test_a_name_that_occurs_twice_in_a_row_makes_it_bad(tmp_path):
    members = [
        ("1.png", png("red")),
        ("1.txt", b"red"),
        ("1.png", png("green")),
        ("1.txt", b"green"),
        ("2.txt", b"two"),
    ]
    rows = rows_of(tmp_path, members)
    with pytest.raises(RecordError, match=r"the name 1\.png occurs twice"):
        rows[0]
    assert rows.chunks == [2] and rows[1]["positive"] == "two"


@pytest.mark.parametrize("text", ["json", "txt", "caption"])
def test_records_that_dots_in_their_names_make_one_row_are_named(tmp_path, text):
    members = []
    for number, color in enumerate(("red", "green")):
        stem = f"holiday 2023.05.0{number}"
        told = json.dumps({"caption": "a square"}) if text == "json" else color
        members += [(f"{stem}.png", png(color)), (f"{stem}.{text}", told.encode())]
    with pytest.raises(RecordError, match=r"holiday 2023\.05\.00 and holiday 2023\.05\.01 are one row.*rename"):
        rows_of(tmp_path, members)[0]


def test_a_field_that_two_json_members_tell_differently_makes_a_row_bad(tmp_path):
    members = [("a.png", png("red")), ("a.1.json", b'{"caption": "red"}'), ("a.2.json", b'{"caption": "blue"}')]
    with pytest.raises(RecordError, match=r"a\.1\.json and a\.2\.json are one row"):
        rows_of(tmp_path, members)[0]
    members[2] = ("a.2.json", b'{"caption": "red", "id": 7}')
    assert rows_of(tmp_path, members)[0]["caption"] == "red"


def test_several_images_with_one_text_are_one_row_and_a_single_name_with_dots_is_read(tmp_path):
    members = [("a.1.png", png("red")), ("a.2.png", png("blue")), ("a.json", b'{"id": 1}'), ("a.2.json", b'{"box": 2}')]
    assert len(rows_of(tmp_path, members)[0]["image"]) == 2
    members = [("b 2023.05.png", png("red")), ("b 2023.05.json", b'{"caption": "one"}')]
    assert rows_of(tmp_path, members)[0]["caption"] == "one"


def sparse_tar(size: int, kind: str = "png") -> bytes:
    """A tar of a few kilobytes whose member is so large: it has no data, and zeros are not stored."""
    info = tarfile.TarInfo(f"a.{kind}")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:482] = bytes(96)  # no stretches of data
    header[483:495] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # the size of the whole
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + tar([("b.txt", b"good")])


def test_a_sparse_member_is_refused_before_it_takes_memory(tmp_path):
    (tmp_path / "a.tar").write_bytes(sparse_tar(20 * 2**30))
    with tarfile.open(tmp_path / "a.tar") as file:
        assert file.next().size == 20 * 2**30  # as an independent reader sees it
    rows = Tar(str(tmp_path / "a.tar"))
    with pytest.raises(
        RecordError, match=r"21,474,836,480 bytes.*over the limit of 268,435,456 \(data\.max_image_bytes\)"
    ):
        rows[0]
    assert rows[1]["positive"] == "good"


def test_a_row_over_the_limit_is_refused(tmp_path):
    rows = rows_of(tmp_path, [("a.txt", bytes(2000)), ("b.txt", b"b")], max_bytes=2000)
    with pytest.raises(RecordError, match=r"data\.max_image_bytes"):
        rows[0]
    assert rows[1]["positive"] == "b"


@pytest.mark.parametrize(
    "damage",
    [b"", b"nonsense", b"\x93NUMPY\x01\x00", "pickle", "floats", "falls", "cut"],
    ids=lambda damage: str(damage),
)
def test_a_damaged_index_in_the_cache_is_built_again(tmp_path, own_cache, caplog, damage):
    members = [(f"{number}.txt", str(number).encode()) for number in range(3)]
    good = rows_of(tmp_path, members).starts
    [path] = (own_cache / "cafe" / "tars").iterdir()
    match damage:
        case "pickle":
            np.save(path, np.array([Runs(tmp_path / "ran")], object), allow_pickle=True)
        case "floats":
            np.save(path, good.astype(float))
        case "falls":
            np.save(path, good[::-1])
        case "cut":
            path.write_bytes(path.read_bytes()[:-5])
        case _:
            path.write_bytes(damage)
    again = Tar(str(tmp_path / "a.tar"))
    assert np.array_equal(again.starts, good) and [again[index]["positive"] for index in range(3)] == ["0", "1", "2"]
    assert f"The index {path} in the cache is damaged" in caplog.text and not (tmp_path / "ran").exists()
    assert np.array_equal(np.load(path), good) and list(path.parent.iterdir()) == [path]


class Runs:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark) -> None:
        self.mark = mark

    def __reduce__(self):
        return (self.mark.touch, ())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_mutated_tar_has_rows_or_bad_records(tmp_path, seed):
    rng = random.Random(seed)
    whole = tar([("a.png", png("red")), ("a.json", b'{"id": [1]}'), ("ü" * 99 + ".txt", b"text"), ("c.cls", b"3")])
    data = bytearray(whole)
    for _ in range(rng.randint(1, 6)):
        start = rng.randrange(len(data))
        data[start : start + rng.randint(1, 12)] = rng.randbytes(rng.randint(1, 12))
    (tmp_path / "a.tar").write_bytes(data)
    with suppress(CafeError):  # the file or a row
        rows = Tar(str(tmp_path / "a.tar"))
        for index in range(sum(rows.chunks)):
            with suppress(RecordError):
                rows[index]


def test_index_offsets_are_where_an_independent_reader_finds_them(tmp_path):
    data = tar([(f"{number}.{kind}", bytes(number * 700)) for number in range(4) for kind in ("a", "b")])
    (tmp_path / "a.tar").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar") as file:
        expected = [member.offset for member in file.getmembers()][::2]
    assert np.array_equal(Tar(str(tmp_path / "a.tar")).starts[:-1], expected)
