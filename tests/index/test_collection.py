"""Collections as a whole: made, opened, refused, rebuilt, verified and removed."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from collection_samples import (
    FAST,
    add,
    as_nobody,
    full_disk,
    image_row,
    images_of,
    keys_of,
    place,
    store_of,
    write_images,
)
from samples import noise, png

from cafe.errors import CafeError
from cafe.index import golden, indexing
from cafe.index.collection import Collection
from cafe.index.lock import writer_lock
from cafe.index.manifest import read_manifest, write_manifest
from cafe.model import Cafe


@pytest.fixture(scope="session")
def other(tiny: Cafe) -> Cafe:
    """A model that gives other embeddings."""
    return tiny.with_prompts(image_instruction="What is it?", text_instruction="What is it?")


def change_manifest(collection, **changes):
    generation = collection._generation()
    write_manifest(generation, replace(read_manifest(generation), **changes))


def test_a_collection_is_made_when_something_is_added(own_folders, photos, tiny, random_base):
    with pytest.raises(CafeError, match=r"There is no collection .*: make one by `cafe index FOLDER --model"):
        Collection.open("mine")
    collection = Collection.open("mine", tiny)
    assert not collection.exists and not collection.directory.exists() and collection.name == "mine"
    uses = (collection.remove, collection.failures, collection.verify, collection.refresh)
    for use in (*uses, lambda: collection.reindex(tiny)):
        with pytest.raises(CafeError, match="There is no collection"):
            use()
    assert add(collection, photos) == {"added": 5}
    assert collection.directory == own_folders / "cafe" / "collections" / "mine" and len(collection) == 5
    manifest = Collection.open("mine").manifest
    assert (manifest.model, manifest.fingerprint) == (str(random_base), tiny.fingerprint())
    assert manifest.prompts == tiny.chat_processor.prompts and manifest.dim == 160
    assert Collection.open("mine").model.fingerprint() == tiny.fingerprint()  # loaded by its name
    info = collection.info()
    assert (info["images"], info["places"], info["failures"], info["roots"]) == (5, 5, 0, [str(photos)])
    assert info["bytes"] > 1000 and json.dumps(info)


def test_options_are_as_they_were_unless_they_are_given(collection, photos):
    add(collection, photos, hidden=True, exclude=["a"])
    add(collection, photos)
    [root] = collection.manifest.roots
    assert root.hidden and root.exclude == ("a",) and not root.describe
    add(collection, photos, exclude=[])
    assert collection.manifest.roots[0].exclude == ()
    with pytest.raises(CafeError, match="is no source of records"):
        add(collection, photos, overrides=["split=test"])


def test_a_relative_path_and_a_link_are_roots_by_their_absolute_paths(collection, photos, monkeypatch, tmp_path):
    monkeypatch.chdir(photos.parent)
    assert add(collection, "photos") == {"added": 5}
    assert add(collection, photos) == {"unchanged": 5}
    (tmp_path / "link").symlink_to(photos)
    assert add(collection, "link") == {"moved": 5}  # another name of the same images
    assert [root.path for root in collection.manifest.roots] == [str(photos), str(tmp_path / "link")]
    assert len(collection) == 5
    monkeypatch.chdir(tmp_path)
    photos.rename(tmp_path / "elsewhere")
    with pytest.raises(CafeError, match="is not mounted"):  # although nothing has that name now
        add(collection, "photos")


def test_another_model_is_refused_with_the_command_that_helps(collection, photos, other, random_base):
    add(collection, photos)
    opened = Collection.open(collection.directory, replace(other, name="other/model"))
    command = f"cafe collections reindex {collection.directory} --model other/model"
    for use in (lambda: add(opened, photos), lambda: opened.search("x")):
        with pytest.raises(CafeError, match=rf"was made with {random_base}, and other/model gives other .*`{command}`"):
            use()
    # A checkpoint that has changed has the name that the manifest has.
    changed = Collection.open(collection.directory, other)
    with pytest.raises(CafeError, match=rf"{random_base} has changed since it made .*reindex"):
        changed.search("x")
    assert len(changed) == 5  # what needs no model works


def test_a_model_in_memory_is_asked_for(collection, photos, tiny):
    nameless = Collection.open(collection.directory, replace(tiny, name=""))
    add(nameless, photos)
    with pytest.raises(CafeError, match="does not say where its model is: open it with the model"):
        Collection.open(collection.directory).search("x")
    assert Collection.open(collection.directory, tiny).search("x")


def test_reindexing_builds_beside_and_swaps_while_readers_go_on(collection, photos, tiny, other, monkeypatch):
    add(collection, photos)
    reader = Collection.open(collection.directory, tiny)
    before = [hit.id for hit in reader.search("x", k=5)]
    first = collection._generation()
    found = []
    embed_rows = indexing.embed_rows

    def embed(*arguments):
        found.append([hit.id for hit in reader.search("x", k=5)])
        return embed_rows(*arguments)

    monkeypatch.setattr(indexing, "embed_rows", embed)
    reports = collection.reindex(other, FAST)
    assert found == [before] and {path: report.added for path, report in reports.items()} == {str(photos): 5}
    assert collection._generation().name == "2" and not first.exists()
    [vector] = other.embed([photos / "0.png"])
    row = images_of(collection).to_pylist()[0]
    [path] = [Path(id) for id, key in keys_of(collection).items() if key == row["key"]]
    assert np.array(row["vector"]) @ other.embed([path])[0] > 0.9999 and vector.shape == (160,)
    # The reader's model is not the one of the collection any more; one that names no model takes the new one.
    with pytest.raises(CafeError, match=r"gives other embeddings|has changed"):
        reader.search("x")
    assert len(collection.search("x", k=9)) == 5


def test_a_reader_takes_the_model_of_a_new_generation(collection, photos, tiny, other, monkeypatch):
    add(collection, photos)
    reader = Collection.open(collection.directory)
    models = [tiny, other]
    monkeypatch.setattr(golden, "load_model", lambda model: model if isinstance(model, Cafe) else models.pop(0))
    assert reader.model is tiny
    collection.reindex(other, FAST)
    assert len(reader.search("x", k=9)) == 5 and reader.model is other and not models


def test_an_interrupted_reindexing_is_resumed_and_changes_nothing_before(
    collection, photos, other, embedded, interrupted
):
    add(collection, photos)
    with interrupted(), pytest.raises(KeyboardInterrupt):
        collection.reindex(other, replace(FAST, batch_size=2))
    assert collection._generation().name == "1" and len(collection.search("x", k=9)) == 5
    assert len(embedded) == 5 + 4
    collection.reindex(other, FAST)
    assert len(embedded) == 5 + 5 and collection._generation().name == "2" and len(collection) == 5
    assert sorted(entry.name for entry in collection.directory.iterdir()) == ["2", "current", "writer.lock"]


def test_a_reindexing_begun_with_another_model_is_begun_anew(collection, photos, other, tiny, monkeypatch):
    add(collection, photos)
    third = tiny.with_prompts(image_instruction="Describe it:")
    with monkeypatch.context() as context:
        context.setattr(indexing, "embed_rows", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collection.reindex(third, FAST)
    assert (collection.directory / "2").is_dir()
    collection.reindex(other, FAST)
    assert Collection.open(collection.directory, other).verify() == []


def test_a_second_writer_is_one_clear_error_and_readers_need_no_lock(collection, photos, tiny):
    add(collection, photos)
    with writer_lock(collection.directory):
        for write in (
            lambda: add(collection, photos),
            lambda: collection.refresh(FAST),
            lambda: collection.reindex(tiny),
            collection.remove,
        ):
            with pytest.raises(CafeError, match="is being written by another process"):
                write()
        assert len(Collection.open(collection.directory, tiny).search("x", k=9)) == 5


def test_a_directory_of_other_things_is_left_as_it_is(tmp_path, photos, tiny):
    for name in ("2023", "2024"):  # named as generations are
        write_images(tmp_path / "years" / name, 1)
    collection = Collection.open(tmp_path / "years", tiny)
    with pytest.raises(CafeError, match="holds something that is not a collection"):
        add(collection, photos)
    assert sorted(path.name for path in (tmp_path / "years").rglob("*")) == ["0.png", "0.png", "2023", "2024"]
    with pytest.raises(CafeError, match="is a file"):
        add(Collection.open(photos / "0.png", tiny), photos)


def test_removing_touches_no_image_and_no_other_file(collection, photos, tiny):
    add(collection, photos)
    noise(0, 9, 9).save(collection.directory / "mine.png")
    collection.remove()
    assert [entry.name for entry in collection.directory.iterdir()] == ["mine.png"]
    assert len(list(photos.iterdir())) == 5
    with pytest.raises(CafeError, match="There is no collection"):
        len(collection)
    (collection.directory / "mine.png").unlink()
    assert add(collection, photos) == {"added": 5}  # once more
    collection.remove()
    assert not collection.directory.exists()


@pytest.mark.parametrize("damage", ["images.lance", "places.lance", "collection.json"])
def test_a_damaged_collection_is_one_clear_error_and_can_be_removed(collection, photos, tiny, damage):
    add(collection, photos)
    damaged = collection._generation() / damage
    shutil.rmtree(damaged) if damaged.is_dir() else damaged.write_text("{")
    for use in (lambda: add(Collection.open(collection.directory, tiny), photos), lambda: len(collection)):
        if damage == "collection.json" and use.__code__.co_names[0] == "len":
            continue  # the tables are sound
        with pytest.raises(CafeError, match=r"is damaged|cannot be read"):
            use()
    Collection(collection.directory).remove()
    assert not collection.directory.exists()


def test_a_collection_of_a_newer_version_is_left_as_it_is(collection, photos, tiny):
    add(collection, photos)
    change_manifest(collection, format=2)
    with pytest.raises(CafeError, match=r"was made by a newer version of cafe .*: upgrade cafe"):
        Collection.open(collection.directory, tiny)
    for write in (lambda: add(collection, photos), lambda: collection.reindex(tiny)):
        with pytest.raises(CafeError, match="upgrade cafe"):
            write()


def test_a_folder_that_may_not_be_written_is_one_clear_error(open_tmp_path, photos, tiny):
    collection = Collection.open(open_tmp_path / "new" / "collection", tiny)
    with as_nobody(), pytest.raises(CafeError, match="cannot be written to: permission denied"):
        collection._writing().__enter__()


def test_a_full_disk_is_one_clear_error_and_loses_nothing(collection, photos, tmp_path, tiny):
    refused = pytest.raises(CafeError, match=r"The disk of the collection .* is full: free some space and run the same")
    with full_disk(), refused:
        add(collection, photos)
    assert add(collection, photos) == {"added": 5}
    write_images(photos / "more", 3, seed=20)
    (photos / "0.png").unlink()
    with full_disk(), pytest.raises(CafeError, match=r"is full: free some space"):
        add(collection, photos)
    assert len(Collection.open(collection.directory, tiny)) == 5
    assert add(collection, photos) == {"added": 3, "removed": 1, "unchanged": 4} and collection.verify() == []


def test_all_paths_are_refreshed_although_one_of_them_is_gone(collection, photos, tmp_path):
    write_images(tmp_path / "a", 1, seed=20)
    add(collection, tmp_path / "a")
    add(collection, photos)
    shutil.rmtree(tmp_path / "a")
    noise(50, 9, 9).save(photos / "new.png")
    with pytest.raises(CafeError, match=f"{tmp_path / 'a'} does not exist"):
        collection.refresh(FAST)
    assert len(collection) == 7
    reports = collection.refresh(replace(FAST, allow_empty=True))
    assert [report.removed for report in reports.values()] == [1, 0] and len(collection) == 6
    assert list(collection.refresh(FAST)) == [str(photos)]


def test_a_generation_that_changes_while_the_model_is_loaded_is_read_anew(collection, photos, tiny, other, monkeypatch):
    add(collection, photos)
    reader = Collection.open(collection.directory)

    def load(model):
        if isinstance(model, Cafe):
            return model
        if collection._generation().name == "2":
            return other
        collection.reindex(other, FAST)  # as another process may
        return tiny

    monkeypatch.setattr(golden, "load_model", load)
    [hit] = reader.search(photos / "0.png", k=1)
    assert hit.path == str(photos / "0.png") and hit.similarity > 0.999 and reader.model is other


def test_a_wrong_filter_is_said_before_the_model_is_loaded(collection, photos):
    add(collection, photos)
    reader = Collection.open(collection.directory, "no/model")
    for filters in ({"after": "tomorrow"}, {"where": ["year"]}):
        with pytest.raises(CafeError, match="is not of the form"):
            reader.search("x", **filters)


def test_a_file_that_may_not_be_read_is_a_problem_and_others_are_verified(collection, photos, monkeypatch):
    add(collection, photos)
    (photos / "1.png").unlink()
    open_file = Path.open

    def refuse(path, *arguments, **options):
        if path.name == "0.png":
            raise PermissionError(13, "Permission denied")
        return open_file(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert sorted(collection.verify()) == [
        f"{photos / '0.png'} cannot be read: Permission denied.",
        f"{photos / '1.png'} is gone: index again.",
    ]


def test_a_sound_collection_verifies_and_what_is_wrong_with_one_is_said(collection, photos, tiny):
    add(collection, photos)
    assert collection.verify() == []
    key = keys_of(collection)[str(photos / "0.png")]
    store = store_of(collection)
    vector = tiny.embed([photos / "0.png"])[0]
    store.write([image_row("long", 3 * vector)], [place("/gone\x1b.png", "long"), place("/lost.png", "lost")])
    store.images.add(store.read_images(store.images.schema.names, [key]))
    store.places.add(store.read_places().filter(np.array([True] + [False] * 6)))
    (photos / "1.png").unlink()
    noise(60, 9, 9).save(photos / "2.png")
    status = (photos / "3.png").stat()
    data = bytearray((photos / "3.png").read_bytes())
    data[-1] ^= 1
    (photos / "3.png").write_bytes(data)
    __import__("os").utime(photos / "3.png", ns=(status.st_mtime_ns, status.st_mtime_ns))
    change_manifest(collection, golden=tuple(tuple(-x for x in row) for row in collection.manifest.golden))
    problems = "\n".join(collection.verify())
    for expected in (
        f"The image {key} is there 2 times.",
        f"The place {store.read_places(['id'])['id'][0]} is there 2 times.",
        "The image of /lost.png is missing: index it again.",
        "The vector of the image long has the norm 3.",
        f"{photos / '1.png'} is gone: index again.",
        f"{photos / '2.png'} has changed: index again.",
        f"{photos / '3.png'} has other bytes than when it was indexed, at the same time of change.",
        "gives other embeddings now (cosine -1.000).",
        "/gone\\x1b.png is gone",
    ):
        assert expected in problems
    assert len(problems.splitlines()) == 10  # /lost.png is gone, too


def test_one_image_at_two_paths_is_sound(collection, photos):
    (photos / "copy.png").write_bytes((photos / "0.png").read_bytes())
    (photos / "bad.png").write_bytes(png("red")[:20])
    add(collection, photos)
    assert collection.verify() == []


def test_threads_that_search_at_once_load_the_model_once(own_folders, photos, tiny, monkeypatch):
    add(Collection.open("mine", tiny), photos)
    opened, loading = Collection.open("mine"), []

    def load(name):
        loading.append(name)
        time.sleep(0.2)
        return tiny

    monkeypatch.setattr(golden, "load_model", load)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: [hit.path for hit in opened.search("boats")], range(4)))
    assert len(loading) == 1 and len(found[0]) == 5 and all(paths == found[0] for paths in found)


def test_errors_name_a_collection_as_commands_take_it(own_folders, tmp_path, photos, tiny, other):
    for name, argument in (("mine", "mine"), (tmp_path / "there", str(tmp_path / "there"))):
        add(Collection.open(name, tiny), photos)
        with pytest.raises(CafeError, match=f"cafe collections reindex {argument} --model"):
            Collection.open(name, other).search("boats")


def test_indexing_with_a_model_that_was_moved_records_its_new_path(own_folders, tmp_path, photos, random_base):
    add(Collection.open("mine", shutil.copytree(random_base, tmp_path / "here")), photos)
    (tmp_path / "here").rename(tmp_path / "there")
    add(Collection.open("mine", tmp_path / "there"), photos)
    assert Collection.open("mine").manifest.model == str(tmp_path / "there")
    assert len(Collection.open("mine").search("boats")) == 5


def test_a_model_that_was_moved_is_asked_for(own_folders, tmp_path, photos, tiny):
    collection = Collection.open("mine", tiny)
    add(collection, photos)
    change_manifest(collection, model=str(tmp_path / "gone"))
    with pytest.raises(CafeError, match=r"model of the collection mine, .*gone, does not exist any more: .*--model"):
        Collection.open("mine").search("boats")
    assert len(Collection.open("mine", tiny).search("boats")) == 5
