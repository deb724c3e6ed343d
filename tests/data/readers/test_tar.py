"""WebDataset tars: rows by key, an index that is kept, and files cut short."""

import io
import tarfile

import fsspec
import numpy as np
import pytest
from samples import png

from cafe.data.readers.tar import Tar
from cafe.errors import CafeError


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


def test_index_offsets_are_where_an_independent_reader_finds_them(tmp_path):
    data = tar([(f"{number}.{kind}", bytes(number * 700)) for number in range(4) for kind in ("a", "b")])
    (tmp_path / "a.tar").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar") as file:
        expected = [member.offset for member in file.getmembers()][::2]
    assert np.array_equal(Tar(str(tmp_path / "a.tar")).starts[:-1], expected)
