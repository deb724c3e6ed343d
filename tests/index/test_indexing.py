"""What a run changes: new, changed, moved and gone images, by content; and what it survives."""

import os
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from collection_samples import FAST, add, images_of, keys_of, store_of, vectors_of, write_images
from samples import noise, png

from cafe.content import ImageLimits
from cafe.errors import CafeError
from cafe.index import indexing
from cafe.index.indexing import IndexConfig, is_below

NAMES = [
    *("ünïcödé 日本.png", "new\nline.png", 'it\'s "it".png', "<img src=x onerror=alert(1)>.png", "%s{0}.png"),
    *("-rf.png", "a;b&c.png", " .png", "#page=2.png", "\\.png", "\x1b[2J.png", "#record=3.png", "*.png"),
]


def names_of(collection, folder):
    """Return the paths of all places, relative to a folder."""
    return sorted(os.path.relpath(id, folder) for id in keys_of(collection))


def test_the_vectors_are_those_of_the_model(collection, photos, tiny):
    assert add(collection, photos) == {"added": 5}
    paths = sorted(photos.iterdir())
    found = vectors_of(collection)
    assert sorted(found) == list(map(str, paths))
    for path, vector in zip(paths, tiny.embed(paths), strict=True):
        assert found[str(path)] @ vector > 0.9999  # in half precision


def test_a_second_run_reads_nothing_and_writes_nothing(collection, photos, embedded, monkeypatch):
    add(collection, photos)
    version = store_of(collection).version
    assert len(embedded) == 5
    monkeypatch.setattr(indexing, "read_ahead", lambda reader, items, *_: iter(1 / 0 for _ in items))
    assert add(collection, photos) == {"unchanged": 5}
    assert store_of(collection).version == version and len(embedded) == 5


def test_moves_and_copies_touch_places_alone(collection, photos, embedded):
    add(collection, photos)
    images, _ = store_of(collection).version
    (photos / "sub").mkdir()
    (photos / "0.png").rename(photos / "sub" / "renamed.png")
    shutil.copy(photos / "1.png", photos / "copy.png")
    assert add(collection, photos) == {"moved": 2, "unchanged": 4}
    assert names_of(collection, photos) == ["1.png", "2.png", "3.png", "4.png", "copy.png", "sub/renamed.png"]
    assert store_of(collection).version[0] == images and len(embedded) == len(collection) == 5
    # Of a content at two places, one may go.
    (photos / "1.png").unlink()
    assert add(collection, photos) == {"removed": 1, "unchanged": 5} and len(collection) == 5


def test_what_changed_is_read_again_and_what_is_gone_is_dropped(collection, photos, embedded, tiny):
    add(collection, photos)
    noise(99, 30, 20).save(photos / "0.png")
    (photos / "1.png").unlink()
    noise(98, 30, 20).save(photos / "new.png")
    assert add(collection, photos) == {"added": 1, "updated": 1, "removed": 1, "unchanged": 3}
    assert len(embedded) == 7 and len(collection) == len(images_of(collection)) == 5
    [vector] = tiny.embed([photos / "0.png"])
    assert vectors_of(collection)[str(photos / "0.png")] @ vector > 0.9999


def test_a_file_that_was_touched_alone_is_read_once_and_not_embedded(collection, photos, embedded):
    add(collection, photos)
    os.utime(photos / "0.png", ns=(1, 1))
    for _ in range(2):
        assert add(collection, photos) == {"unchanged": 5}
    assert len(embedded) == 5
    assert {row["id"]: row["mtime_ns"] for row in store_of(collection).read_places().to_pylist()}[
        str(photos / "0.png")
    ] == 1


def test_the_same_content_twice_in_one_run_is_embedded_once(collection, photos, embedded):
    for number in range(4):
        shutil.copy(photos / "0.png", photos / f"copy_{number}.png")
    assert add(collection, photos, IndexConfig(num_workers=0, batch_size=2)) == {"added": 9}
    assert len(embedded) == len(images_of(collection)) == 5 and len(keys_of(collection)) == 9


def test_files_of_any_name_are_added_moved_and_removed(collection, tmp_path, embedded):
    folder = tmp_path / "<b>'\n"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        noise(number, 9, 9).save(folder / name)
    assert add(collection, folder) == {"added": len(NAMES)}
    assert set(keys_of(collection)) == {str(folder / name) for name in NAMES}
    assert add(collection, folder) == {"unchanged": len(NAMES)}
    folder.rename(tmp_path / 'quote"d\\')
    assert add(collection, tmp_path) == {"moved": len(NAMES)}
    assert len(embedded) == len(NAMES)
    for name in NAMES[1:]:
        (tmp_path / 'quote"d\\' / name).unlink()
    assert add(collection, tmp_path) == {"removed": len(NAMES) - 1, "unchanged": 1}


def test_a_name_that_is_not_utf_8_is_said_and_the_others_are_indexed(collection, photos):
    strange = os.fsencode(photos) + b"/\xff.png"
    with open(strange, "wb") as file:
        file.write(png("red"))
    for counts in ({"added": 5, "failed": 1}, {"unchanged": 5, "failed": 1}):
        report = collection.add(photos, config=FAST)
        assert {name: count for name, count in report.counts().items() if count} == counts
        assert report.failures == {os.fsdecode(strange): "Its name is not UTF-8: rename the file."}


def test_bad_files_are_listed_and_read_again_when_they_change_or_are_asked_for(collection, photos, monkeypatch):
    (photos / "empty.png").touch()
    (photos / "truncated.png").write_bytes((photos / "0.png").read_bytes()[:300])
    assert add(collection, photos) == {"added": 5, "failed": 2}
    failures = collection.failures()
    assert sorted(failures) == [str(photos / "empty.png"), str(photos / "truncated.png")]
    assert all("cannot be decoded" in reason for reason in failures.values())
    read = []
    monkeypatch.setattr(
        indexing.Reader,
        "__getitem__",
        lambda self, items, get=indexing.Reader.__getitem__: read.extend(items) or get(self, items),
    )
    assert add(collection, photos) == {"failed": 2, "unchanged": 5} and not read
    assert add(collection, photos, IndexConfig(num_workers=0, retry=True)) == {"failed": 2, "unchanged": 5}
    assert len(read) == 2
    noise(50, 20, 20).save(photos / "empty.png")
    assert add(collection, photos)["failed"] == 1 and len(read) == 3
    assert list(collection.failures()) == [str(photos / "truncated.png")] and len(collection) == 6


def test_a_good_image_that_becomes_bad_is_dropped_with_its_reason(collection, photos):
    add(collection, photos)
    (photos / "0.png").write_bytes(b"")
    assert add(collection, photos) == {"failed": 1, "unchanged": 4}
    assert list(collection.failures()) == [str(photos / "0.png")] and len(images_of(collection)) == 4


def test_a_limit_that_is_raised_lets_large_images_in_when_asked(collection, photos):
    noise(7, 60, 60).save(photos / "large.png")
    small = IndexConfig(num_workers=0, limits=ImageLimits(max_pixels=2000))
    assert add(collection, photos, small) == {"added": 5, "failed": 1}
    assert "over the limit of 2,000" in collection.failures()[str(photos / "large.png")]
    assert add(collection, photos, IndexConfig(num_workers=0, retry=True)) == {"updated": 1, "unchanged": 5}


def test_an_embedding_that_is_not_finite_is_a_failure_of_its_image_alone(collection, photos, monkeypatch):
    embed_rows = indexing.embed_rows
    bad = []

    def embed(model, images, *arguments):
        rows = embed_rows(model, images, *arguments)
        if not bad:
            bad.append(sorted(rows)[0])
        return {key: row for key, row in rows.items() if key not in bad}

    monkeypatch.setattr(indexing, "embed_rows", embed)
    assert add(collection, photos) == {"added": 4, "failed": 1}
    assert list(collection.failures().values()) == ["The model's embedding of it is not finite."]
    assert len(images_of(collection)) == 4


def test_a_part_of_a_folder_is_brought_up_to_date_alone(collection, photos, embedded):
    write_images(photos / "sub", 3, seed=10)
    add(collection, photos)
    (photos / "sub" / "0.png").unlink()
    (photos / "0.png").unlink()
    (photos / "sub" / "1.png").rename(photos / "sub" / "x.png")
    assert add(collection, photos / "sub") == {"moved": 1, "removed": 1, "unchanged": 1}
    assert names_of(collection, photos) == ["0.png", "1.png", "2.png", "3.png", "4.png", "sub/2.png", "sub/x.png"]
    noise(60, 9, 9).save(photos / "1.png")
    assert add(collection, photos / "1.png") == {"updated": 1}
    assert add(collection, photos) == {"removed": 1, "unchanged": 6}


def test_what_one_root_leaves_out_and_another_does_not_is_kept(collection, photos, embedded):
    write_images(photos / ".hidden", 2, seed=20)
    write_images(photos / "sub" / "drafts", 1, seed=30)
    assert add(collection, photos / ".hidden") == {"added": 2}
    assert add(collection, photos, exclude=["drafts"]) == {"added": 5}
    assert add(collection, photos / "sub") == {"added": 1}
    for _ in range(2):
        reports = collection.refresh(FAST)
        assert [report.has_changes for report in reports.values()] == [False] * 3
    assert len(embedded) == 8
    (photos / ".hidden" / "0.png").unlink()
    assert add(collection, photos) == {"unchanged": 5} and add(collection, photos / ".hidden")["removed"] == 1


def test_what_is_left_out_from_now_on_is_dropped(collection, photos):
    write_images(photos / ".hidden", 2, seed=20)
    assert add(collection, photos, hidden=True) == {"added": 7}
    assert add(collection, photos) == {"unchanged": 7}  # as before
    assert add(collection, photos, hidden=False, exclude=["0.png"]) == {"removed": 3, "unchanged": 4}


def test_a_folder_that_cannot_be_listed_keeps_what_it_had(collection, photos, monkeypatch):
    write_images(photos / "sub" / "deep", 2, seed=20)
    add(collection, photos)
    scandir = os.scandir

    def scan(folder):
        if str(folder).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", scan)
    report = collection.add(photos, config=FAST)
    assert report.failures == {str(photos / "sub"): "The folder cannot be listed: Permission denied."}
    assert (report.unchanged, report.failed, report.removed, len(collection)) == (5, 1, 0, 7)


def test_an_empty_or_missing_folder_is_refused_unless_allowed(collection, photos, tmp_path):
    add(collection, photos)
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(CafeError, match="does not exist: if it is on a drive that is not mounted, mount it"):
        add(collection, photos)
    photos.mkdir()  # as where nothing is mounted
    with pytest.raises(CafeError, match=r"Nothing is found in .*, but 5 images of it are in the collection"):
        add(collection, photos)
    assert len(collection) == 5
    allowed = IndexConfig(num_workers=0, allow_empty=True)
    assert add(collection, photos, allowed) == {"removed": 5} and len(collection) == 0
    assert [root.path for root in collection.manifest.roots] == [str(photos)]
    photos.rmdir()
    assert add(collection, photos, allowed) == {} and collection.manifest.roots == ()


def test_what_never_existed_is_not_recorded(collection, photos, tmp_path):
    add(collection, photos)
    for name in ("none.png", "none", "none.csv", "none/"):
        with pytest.raises(CafeError, match="none"):
            add(collection, tmp_path / name)
    assert [root.path for root in collection.manifest.roots] == [str(photos)]


def test_a_folder_that_vanishes_while_it_is_read_loses_nothing(collection, photos, monkeypatch, tmp_path):
    add(collection, photos)
    for path in photos.iterdir():
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr(
        indexing, "_leave_out_pdf_files", lambda found: photos.exists() and photos.rename(tmp_path / "elsewhere")
    )
    with pytest.raises(CafeError, match="has vanished while it was read"):
        add(collection, photos)
    assert len(collection) == 5 and not collection.failures()


def test_a_file_that_vanishes_before_it_is_read_is_gone(collection, photos, monkeypatch):
    add(collection, photos)
    noise(70, 9, 9).save(photos / "0.png")
    noise(71, 9, 9).save(photos / "new.png")

    def delete(found):
        (photos / "0.png").unlink()
        (photos / "new.png").unlink()

    monkeypatch.setattr(indexing, "_leave_out_pdf_files", delete)
    assert add(collection, photos) == {"removed": 1, "unchanged": 4}
    assert not collection.failures() and len(collection) == 4


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(collection, photos, monkeypatch, tiny):
    read = indexing.Reader._read_file

    def read_and_replace(self, place):
        data = read(self, place)
        if place.path.endswith("0.png") and data[:8] != b"replaced":
            noise(80, 30, 30).save(place.path)
        return data

    with monkeypatch.context() as context:
        context.setattr(indexing.Reader, "_read_file", read_and_replace)
        assert add(collection, photos) == {"added": 5}
    assert add(collection, photos) == {"updated": 1, "unchanged": 4}
    [vector] = tiny.embed([photos / "0.png"])
    assert vectors_of(collection)[str(photos / "0.png")] @ vector > 0.9999


def test_ctrl_c_keeps_what_was_embedded(collection, photos, embedded, interrupted):
    with interrupted(), pytest.raises(KeyboardInterrupt):
        add(collection, photos, IndexConfig(num_workers=0, batch_size=2))
    assert len(collection) == len(keys_of(collection)) == len(embedded) == 4
    assert add(collection, photos) == {"added": 1, "unchanged": 4} and len(embedded) == 5


def test_captions_are_added_later_from_one_prefill_and_only_once(collection, photos, tiny, embedded):
    config = IndexConfig(num_workers=0, max_new_tokens=4)
    add(collection, photos)
    assert add(collection, photos, config, describe=True) == {"unchanged": 5} and len(embedded) == 10
    paths = sorted(photos.iterdir())
    vectors, captions = tiny.embed_and_generate_batch(paths, max_new_tokens=4)
    table = images_of(collection)
    by_key = dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
    assert [by_key[keys_of(collection)[str(path)]] for path in paths] == captions
    found, of_captions = vectors_of(collection), vectors_of(collection, "caption_vector")
    for path, vector, caption in zip(paths, vectors, tiny.embed(captions), strict=True):
        assert found[str(path)] @ vector > 0.9999 and of_captions[str(path)] @ caption > 0.9999
    version = store_of(collection).version
    assert add(collection, photos, config) == {"unchanged": 5} and len(embedded) == 10  # described as before
    assert store_of(collection).version == version


def test_a_source_is_indexed_by_its_records(collection, tmp_path, embedded, tiny):
    paths = write_images(tmp_path / "images", 3)
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n" + "".join(f"images/{path.name},number {path.stem}\n" * 2 for path in paths))
    assert add(collection, table) == {"added": 3}  # each with two captions
    assert len(embedded) == 3 and sorted(keys_of(collection)) == list(map(str, paths))
    assert sorted(images_of(collection)["text"].to_pylist()) == ["number 0", "number 1", "number 2"]
    for path, vector in zip(paths, tiny.embed(paths), strict=True):
        assert vectors_of(collection)[str(path)] @ vector > 0.9999
    assert add(collection, table) == {"unchanged": 3} and len(embedded) == 3
    table.write_text("image,caption\nimages/0.png,zero\n")
    assert add(collection, table) == {"removed": 2, "unchanged": 1} and len(collection) == 1


def test_images_of_a_source_are_left_to_it_by_the_folder_around_them(collection, tmp_path, embedded):
    write_images(tmp_path / "images", 3)
    table = tmp_path / "t.csv"
    table.write_text("image,caption,year\nimages/0.png,zero,1999\nimages/1.png,one,2000\n")
    add(collection, table)
    assert add(collection, tmp_path / "images") == {"added": 1, "unchanged": 2}
    columns = {row["id"]: row["columns"] for row in store_of(collection).read_places().to_pylist()}
    assert '"year": "1999"' in columns[str(tmp_path / "images" / "0.png")]
    assert [report.has_changes for report in collection.refresh(FAST).values()] == [False, False]
    assert len(embedded) == 3


def test_a_source_whose_images_cannot_be_read_any_more_loses_nothing(collection, tmp_path):
    write_images(tmp_path / "images", 3)
    table = tmp_path / "t.csv"
    table.write_text("image,caption\nimages/0.png,zero\nimages/1.png,one\n")
    add(collection, table)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(CafeError, match=r"No image of .* can be read any more: .* If a drive is not mounted, mount it"):
        add(collection, table)
    assert len(collection) == 2 and not collection.failures()
    allowed = IndexConfig(num_workers=0, allow_empty=True)
    assert add(collection, table, allowed) == {"failed": 2}
    assert len(collection) == 0


def test_a_source_that_is_gone_is_forgotten_when_allowed(collection, photos, tmp_path):
    write_images(tmp_path / "images", 3, seed=20)
    table = tmp_path / "t.csv"
    table.write_text("image,caption\nimages/0.png,zero\nimages/1.png,one\n")
    add(collection, table)
    add(collection, photos)
    table.unlink()
    with pytest.raises(CafeError, match="does not exist: if it is on a drive"):
        collection.refresh(FAST)
    assert len(collection) == 7
    allowed = IndexConfig(num_workers=0, allow_empty=True)
    assert add(collection, table, allowed) == {"removed": 2} and len(collection) == 5
    assert [root.path for root in collection.manifest.roots] == [str(photos)]


def test_images_in_parquet_and_tar_have_no_files(collection, tmp_path, tiny):
    pq.write_table(pa.Table.from_pylist([{"image": png("red"), "caption": "red"}]), tmp_path / "t.parquet")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in (("a.png", png("blue")), ("a.txt", b"a blue thing"), ("b.txt", b"no image")):
            (tmp_path / name).write_bytes(data)
            tar.add(tmp_path / name, name)
            (tmp_path / name).unlink()
    assert add(collection, tmp_path / "t.parquet") == {"added": 1}
    assert add(collection, tmp_path / "t.tar") == {"added": 1, "failed": 1}
    found = vectors_of(collection)
    for kind, color in (("parquet", "red"), ("tar", "blue")):
        (tmp_path / "x.png").write_bytes(png(color))
        [vector] = tiny.embed([tmp_path / "x.png"])
        assert found[f"{tmp_path}/t.{kind}#record=0"] @ vector > 0.9999
    assert sorted(images_of(collection)["text"].to_pylist()) == ["a blue thing", "red"]


def test_images_of_records_are_as_old_as_their_file_or_their_source(collection, tmp_path):
    [path] = write_images(tmp_path / "images", 1)
    (tmp_path / "t.csv").write_text("image,caption\nimages/0.png,zero\n")
    pq.write_table(pa.Table.from_pylist([{"image": png("red"), "caption": "red"}]), tmp_path / "t.parquet")
    for file, seconds in ((path, 1e9), (tmp_path / "t.csv", 5e8), (tmp_path / "t.parquet", 1.1e9)):
        os.utime(file, (seconds, seconds))
    for name in ("t.csv", "t.parquet"):
        add(collection, tmp_path / name)
    years = {hit.id: hit.taken_at.year for hit in collection.search("x")}
    assert years == {str(path): 2001, f"{tmp_path}/t.parquet#record=0": 2004}
    assert collection.verify() == []


def test_folders_are_compared_by_their_whole_names():
    assert is_below("/a/b", "/a") and is_below("/a", "/a") and is_below("/a", "/") and is_below("/a/b", "/a/")
    assert not is_below("/ab", "/a") and not is_below("/", "/a")


def test_the_time_that_the_model_waits_is_part_of_the_whole(collection, photos):
    report = collection.add(photos, config=FAST)
    assert 0 < report.seconds_waited < report.seconds and report.has_changes
    assert np.isfinite(report.seconds) and not collection.add(photos, config=FAST).has_changes
