"""One writer at a time."""

import fcntl
import os

import pytest
from collection_samples import as_nobody, full_disk

from cafe.errors import CafeError
from cafe.index.lock import writer_lock
from cafe.index.manifest import LOCK_FILE


def test_a_second_writer_is_one_error_that_names_the_first(tmp_path):
    with (
        writer_lock(tmp_path),
        pytest.raises(CafeError, match=rf"is being written by another process \({os.getpid()}\)"),
        writer_lock(tmp_path),
    ):
        pass
    with writer_lock(tmp_path):  # free again
        pass


def test_the_lock_of_a_collection_that_was_just_removed_is_not_held(tmp_path, monkeypatch):
    flock = fcntl.flock

    def lock(handle, operation):
        (tmp_path / LOCK_FILE).unlink()  # as its last holder may, after this process opened it
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(CafeError, match="has just been removed"), writer_lock(tmp_path):
        pass


def test_two_names_of_a_directory_have_one_lock(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "one")
    with (
        writer_lock(tmp_path / "one"),
        pytest.raises(CafeError, match="another process"),
        writer_lock(tmp_path / "other"),
    ):
        pass


def test_a_directory_that_may_not_be_written_is_one_error(open_tmp_path):
    refused = pytest.raises(CafeError, match="cannot be written to: permission denied")
    with as_nobody(), refused, writer_lock(open_tmp_path):
        pass


def test_a_full_disk_is_locked_all_the_same(tmp_path):
    with full_disk(), writer_lock(tmp_path), pytest.raises(CafeError, match="another process"), writer_lock(tmp_path):
        pass
