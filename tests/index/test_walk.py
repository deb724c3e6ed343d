"""What a folder holds: what is found, what is left out, and what a walk survives."""

import os

from samples import png

from cafe.index.walk import is_left_out, walk


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png("red"))


def names_in(found, folder):
    return [os.path.relpath(file.path, folder) for file in found.files]


def test_images_and_pdf_files_are_found_in_order_with_size_and_time(tmp_path):
    write(tmp_path, "b.JPG", "a.png", "c/d.webp", "c/e.Pdf", "notes.txt", "png")
    found = walk(str(tmp_path))
    assert names_in(found, tmp_path) == ["a.png", "b.JPG", "c/d.webp", "c/e.Pdf"]
    assert [file.is_pdf for file in found.files] == [False, False, False, True]
    status = (tmp_path / "a.png").stat()
    assert (found.files[0].size, found.files[0].mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert names_in(walk(str(tmp_path / "a.png")), tmp_path) == ["a.png"]


def test_hidden_folders_and_those_of_tools_are_left_out_unless_asked(tmp_path):
    write(tmp_path, "a.png", ".b.png", ".c/d.png", "@eaDir/e.png", "f/node_modules/g.png", ".git/h.png", "i/j.png")
    assert names_in(walk(str(tmp_path)), tmp_path) == ["a.png", "i/j.png"]
    assert names_in(walk(str(tmp_path), hidden=True), tmp_path) == [".b.png", "a.png", ".c/d.png", "i/j.png"]
    assert names_in(walk(str(tmp_path), exclude=("i", "a.png")), tmp_path) == []
    # What is asked for by its path is not left out.
    assert names_in(walk(str(tmp_path / ".c")), tmp_path) == [".c/d.png"]
    assert is_left_out("x", False, ("x",)) and not is_left_out(".x", True, ())


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    root = tmp_path / "above" / "root"
    write(root, "a/b.png")
    write(tmp_path, "other/c.png", "above/beside.png")
    (root / "circle").symlink_to(root)
    (root / "up").symlink_to(tmp_path / "above")  # which would lead to all that is beside the folder
    (root / "self.png").symlink_to(root / "self.png")
    (root / "to_nothing.png").symlink_to(root / "nothing.png")
    (root / "z").symlink_to(root / "a")
    (root / "link").symlink_to(tmp_path / "other")
    (root / "file.png").symlink_to(root / "a" / "b.png")
    found = walk(str(root))
    assert [name for name in names_in(found, root) if name != "self.png"] == ["file.png", "a/b.png", "link/c.png"]
    assert not found.unreadable
    (tmp_path / "name").symlink_to(root)
    assert names_in(walk(str(tmp_path / "name")), tmp_path / "name") == names_in(found, root)


def test_what_vanishes_while_it_is_walked_is_not_found(tmp_path, monkeypatch):
    write(tmp_path, "a.png", "b/c.png", "d.png")
    scandir = os.scandir

    def scan(folder):
        entries = scandir(folder)
        (tmp_path / "a.png").unlink(missing_ok=True)
        if (tmp_path / "b").exists():
            (tmp_path / "b").rename(tmp_path.with_name("elsewhere"))
        return entries

    monkeypatch.setattr(os, "scandir", scan)
    found = walk(str(tmp_path))
    assert names_in(found, tmp_path) == ["d.png"] and not found.unreadable


def test_a_folder_that_cannot_be_listed_is_named_with_the_reason(tmp_path, monkeypatch):
    write(tmp_path, "a.png", "closed/b.png")
    scandir = os.scandir

    def scan(folder):
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    found = walk(str(tmp_path))
    assert names_in(found, tmp_path) == ["a.png"]
    assert found.unreadable == {str(tmp_path / "closed"): "The folder cannot be listed: Permission denied."}
