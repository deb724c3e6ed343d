"""Where collections are, and what they may be called."""

from pathlib import Path

import pytest

from cafe.errors import CafeError
from cafe.index.locations import collections_home, list_collections, locate_collection, no_collection


def test_a_name_is_in_the_users_data_folder_and_a_path_where_it_says(own_folders, monkeypatch):
    home = own_folders / "cafe" / "collections"
    assert collections_home() == home
    for name in ("default", "my photos", "ünï-2024", "a.b", "日本"):
        assert locate_collection(name) == home / name
    assert locate_collection("/x/y") == Path("/x/y") and locate_collection(Path("y")) == Path.cwd() / "y"
    assert locate_collection("./y") == Path.cwd() / "y"
    monkeypatch.setenv("HOME", "/home/me")
    assert locate_collection("~/y") == Path("/home/me/y")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert collections_home() == Path("/home/me/.local/share/cafe/collections")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-x", " x", ".hidden", "a\nb", "a\n", "x" * 256, "日" * 86, "<b>", "~no"]
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(CafeError, match=r"A collection cannot be called .*: a name has letters"):
        locate_collection(name)


def test_collections_are_listed_by_the_file_that_makes_them_one(own_folders):
    home = collections_home()
    assert list_collections() == []
    for name in ("b", "a", "none"):
        (home / name).mkdir(parents=True)
    for name in ("b", "a"):
        (home / name / "current").write_text("1\n")
    assert list_collections() == [home / "a", home / "b"]
    assert "make one by `cafe index" in str(no_collection(home / "c"))
