"""Write-then-rename: what is committed appears as a whole under its name, over whatever was there before."""

from cafe.utils.atomic import atomic_write_text, commit, staging_path


def test_commit_replaces_a_directory_as_a_whole(tmp_path):
    path = tmp_path / "checkpoint"
    (path / "gone").mkdir(parents=True)
    (path / "weights").write_text("old")
    staging_path(path).mkdir()
    (staging_path(path) / "weights").write_text("new")
    assert (path / "weights").read_text() == "old"
    commit(staging_path(path), path)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint"]
    assert [file.name for file in path.iterdir()] == ["weights"]
    assert (path / "weights").read_text() == "new"


def test_atomic_write_replaces_a_file_and_leaves_nothing_behind(tmp_path):
    atomic_write_text(tmp_path / "results.json", "one")
    atomic_write_text(tmp_path / "results.json", "two")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.json", "two")]
