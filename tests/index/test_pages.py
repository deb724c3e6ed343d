"""PDF files in a collection: their pages are images of their own."""

import os
import shutil

import pytest
from collection_samples import add, images_of, keys_of, store_of, write_images, write_pdf
from samples import noise

from cafe.errors import RecordError
from cafe.index import indexing, pdf, reading
from cafe.index.indexing import IndexConfig


def pages_of(collection, path):
    return sorted(int(id.partition("#page=")[2]) for id in keys_of(collection) if id.startswith(f"{path}#"))


@pytest.fixture
def report(photos, fast_start, monkeypatch):
    monkeypatch.setattr(pdf, "PAGE_SIDE", 100)  # for speed
    return write_pdf(photos / "report.pdf", [f"page {number}" for number in range(1, 12)])


def test_pages_are_images_of_their_own_read_once(collection, photos, report, embedded):
    assert add(collection, photos) == {"added": 5 + 11}
    assert pages_of(collection, report) == list(range(1, 12))  # more than are read at once
    assert sorted(filter(None, images_of(collection)["text"].to_pylist())) == sorted(f"page {n}" for n in range(1, 12))
    version = store_of(collection).version
    assert add(collection, photos) == {"unchanged": 16} and store_of(collection).version == version
    # A move touches places alone; a copy has the same pages.
    report.rename(photos / "moved.pdf")
    shutil.copy(photos / "moved.pdf", photos / "copy.pdf")
    assert add(collection, photos) == {"moved": 22, "unchanged": 5}
    assert len(embedded) == len(collection) == 16 and store_of(collection).version[0] == version[0]
    assert pages_of(collection, report) == []


def test_a_file_with_fewer_pages_and_one_that_is_gone_drop_theirs(collection, photos, report):
    add(collection, report)
    write_pdf(report, ["page 1", "another page"])
    assert add(collection, report) == {"updated": 2, "removed": 9}
    assert pages_of(collection, report) == [1, 2] and len(collection) == 2
    report.write_bytes(report.read_bytes()[:200])
    assert add(collection, report) == {"failed": 1, "removed": 2}
    assert "cannot be read" in collection.failures()[str(report)] and len(collection) == 0
    assert add(collection, photos) == {"added": 5, "failed": 1}
    report.unlink()
    assert add(collection, photos) == {"removed": 1, "unchanged": 5} and not collection.failures()


def test_a_file_whose_reading_was_interrupted_is_completed(collection, report, monkeypatch, embedded):
    embed_rows = indexing.embed_rows

    def embed(model, images, *arguments):
        if len(embedded) >= 8:
            raise KeyboardInterrupt
        return embed_rows(model, images, *arguments)

    with monkeypatch.context() as context:
        context.setattr(indexing, "embed_rows", embed)
        with pytest.raises(KeyboardInterrupt):
            add(collection, report)
    assert pages_of(collection, report) == list(range(1, 9))
    assert add(collection, report) == {"added": 3, "unchanged": 8}
    assert len(embedded) == len(collection) == 11


def test_without_the_package_pages_are_kept_and_files_left_out(collection, photos, report, monkeypatch, caplog):
    add(collection, photos)
    monkeypatch.setattr(indexing, "has_pdfium", lambda: False)
    write_pdf(photos / "new.pdf", ["new"])
    assert add(collection, photos) == {"unchanged": 5} and pages_of(collection, report) == list(range(1, 12))
    assert "2 PDF files are left out: to index their pages, pip install" in caplog.text


def test_a_file_that_ends_its_worker_is_bad_and_all_others_are_read(collection, photos, report, monkeypatch):
    write_pdf(photos / "crash.pdf", ["one"])
    read = reading.read_pages

    def read_pages(data, first, count, name):
        if "crash" in name:
            os._exit(1)
        return read(data, first, count, name)

    monkeypatch.setattr(reading, "read_pages", read_pages)
    assert add(collection, photos) == {"added": 16, "failed": 1}
    path = photos / "crash.pdf"
    assert collection.failures() == {str(path): f"Reading {path} ended the process that did it."}
    assert add(collection, photos) == {"unchanged": 16, "failed": 1}


def test_a_part_of_a_file_that_cannot_be_read_leaves_the_pages_behind_it(collection, report, monkeypatch):
    def read_pages(data, first, count, name):
        if first == 9 and broken:
            raise RecordError("broken")
        return 20, [(noise(page, 20, 30), "") for page in range(first, min(first + count, 21))]

    monkeypatch.setattr(reading, "read_pages", read_pages)
    broken = False
    assert add(collection, report) == {"added": 20}
    assert add(collection, report) == {"unchanged": 20}
    os.utime(report, ns=(1, 1))
    broken = True
    assert add(collection, report) == {"failed": 1, "removed": 8, "unchanged": 12}
    assert pages_of(collection, report) == [*range(1, 9), *range(17, 21)]
    broken = False
    assert add(collection, report, IndexConfig(num_workers=0, retry=True)) == {"added": 8, "unchanged": 12}
    assert add(collection, report) == {"unchanged": 20}


def test_a_collection_with_pages_verifies_by_the_bytes_of_the_file(collection, report):
    add(collection, report)
    assert collection.verify() == []
    status, data = report.stat(), bytearray(report.read_bytes())
    data[-10] ^= 1
    report.write_bytes(data)
    os.utime(report, ns=(status.st_mtime_ns, status.st_mtime_ns))
    [problem] = collection.verify()
    assert problem == f"{report} has other bytes than when it was indexed, at the same time of change."


def test_spawned_workers_read_images_and_pages(collection, tmp_path, tiny):
    [image] = write_images(tmp_path / "photos", 1)
    write_pdf(tmp_path / "photos" / "a.pdf", ["one"])
    assert add(collection, tmp_path / "photos", IndexConfig(num_workers=1)) == {"added": 2}
    table = images_of(collection)
    assert sorted(table["text"].to_pylist()) == ["", "one"]
    page = next(row for row in table.to_pylist() if row["text"])
    assert max(page["width"], page["height"]) == 1600
    key = keys_of(collection)[str(image)]
    [row] = [row for row in table.to_pylist() if row["key"] == key]
    assert tiny.embed([image])[0] @ row["vector"] > 0.9999
