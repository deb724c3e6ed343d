"""Names become files, wherever they are."""

import fsspec
import pytest

from cafe.data.files import expand_pattern, file_version, folder_of, local_path, read
from cafe.errors import CafeError


@pytest.fixture
def store():
    """An object store in memory, with three files."""
    fs = fsspec.filesystem("memory")
    for name in ("a-0.txt", "a-1.txt", "b.txt"):
        fs.pipe(f"/bucket/{name}", name.encode())
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def test_a_pattern_lists_its_files_in_order_locally_and_on_a_store(tmp_path, store):
    for name in ("a-1.txt", "a-0.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    assert expand_pattern(f"{tmp_path}/a-*.txt") == [f"{tmp_path}/a-0.txt", f"{tmp_path}/a-1.txt"]
    assert [read(name) for name in expand_pattern(f"{store}/a-?.txt")] == [b"a-0.txt", b"a-1.txt"]
    assert expand_pattern("x{08..11}.tar") == ["x08.tar", "x09.tar", "x10.tar", "x11.tar"]
    assert expand_pattern("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    with pytest.raises(CafeError, match="No data file matches"):
        expand_pattern(f"{tmp_path}/c-*.txt")


def test_a_file_is_found_though_its_name_looks_like_a_pattern(tmp_path):
    (tmp_path / "[v1]").mkdir()
    (tmp_path / "[v1]" / "a.json").write_text("a")
    assert expand_pattern(f"{tmp_path}/[v1]/a.json") == [f"{tmp_path}/[v1]/a.json"]


def test_byte_ranges_are_read_from_disk_store_and_cache(tmp_path, store):
    (tmp_path / "b.txt").write_text("b.txt")
    for name in (str(tmp_path / "b.txt"), f"file://{tmp_path}/b.txt", f"{store}/b.txt", f"simplecache::{store}/b.txt"):
        assert read(name, 1, 4) == b".tx" and read(name) == b"b.txt", name
    [cached] = expand_pattern(f"simplecache::{store}/b*.txt")
    assert cached.startswith("simplecache::memory://") and read(cached) == b"b.txt"


def test_a_version_changes_with_the_file(tmp_path):
    file = tmp_path / "a"
    file.write_text("one")
    first = file_version(str(file))
    assert first == file_version(str(file))
    file.write_text("two, longer")
    assert first != file_version(str(file))


def test_the_folder_of_a_file_and_the_path_of_a_local_one():
    assert folder_of("s3://bucket/a.json") == "s3://bucket" and folder_of("x/a.json") == "x"
    assert str(local_path("x/a.json")) == "x/a.json" and str(local_path("file:///x/a.json")) == "/x/a.json"
    assert local_path("s3://bucket/a.json") is None


@pytest.mark.parametrize("name", ["none.txt", "memory://none/none.txt", "nosuchprotocol://bucket/a"])
def test_a_file_that_cannot_be_read_is_named(name):
    with pytest.raises(CafeError, match=name):
        read(name)
