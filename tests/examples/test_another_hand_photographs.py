"""Tux Paint's stamps, on a small folder of stamps made here: what is a photograph, its sentences, what is written."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("resvg_py")

from another_hand import photographs, stamps
from another_hand.packages import PackageError

from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.evaluation.suites.captioned_images import USER_DATASET
from cafe.images.decoding import decode_image

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="2cm" height="1cm"><rect width="2cm" height="1cm" fill="red"/></svg>'
)


def noise(height: int = 20, width: int = 40) -> Image.Image:
    """A texture without two equal neighbors, in a transparent frame."""
    pixels = np.zeros((height + 10, width + 10, 4), np.uint8)
    rng = np.random.default_rng(0)
    pixels[5:-5, 5:-5, :3] = rng.integers(0, 120, (height, width, 3)) * 2 + np.arange(width)[:, None] % 2
    pixels[5:-5, 5:-5, 3] = 255
    return Image.fromarray(pixels)


def flat() -> Image.Image:
    """A drawing: one color."""
    return Image.new("RGBA", (40, 20), "blue")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Stamps as the package has them, in a folder that counts as unpacked."""
    root = tmp_path / "packages" / stamps.PACKAGE / stamps.STAMPS
    made: dict[str, tuple[Image.Image | None, str]] = {
        "animals/tiger": (noise(), "A tiger.\nde.utf8=Ein Tiger.\npt_BR.utf8=Um tigre.\n"),
        "animals/frog": (noise(), "A frog.\nde.utf8=Ein Frosch."),
        "animals/frog-1": (noise(), "A frog."),
        "animals/cartoon/cow": (noise(), "A cow."),
        "symbols/star": (flat(), "A star."),
        "symbols/red": (None, "A red thing."),
        "symbols/faces/happy": (noise(), "A happy face."),
    }
    for name, (image, text) in made.items():
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
        if image:
            image.save(path)
        else:
            path.with_suffix(".svg").write_text(SVG)
    noise().save(root / "animals/tiger_mirror.png")  # a variant, without a text
    (root / "symbols/gift.txt").write_text("A gift.")  # a text without an image
    return root


def test_text_has_english_first_and_then_languages(tmp_path: Path) -> None:
    text = "A  tiger.\nde.utf8=Ein Tiger.\nsr@latin.utf8=a = b \nzu.utf8=\nnonsense\n"
    (tmp_path / "tiger.txt").write_text(text, encoding="utf-8")
    assert stamps.read_text(tmp_path / "tiger.txt") == ("A tiger.", {"de": "Ein Tiger.", "sr@latin": "a = b"})


@pytest.mark.parametrize(("content", "message"), [(b"", "has no sentence"), (b"\xff\xfe\xff", "not UTF-8")])
def test_bad_text_gets_a_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "tiger.txt").write_bytes(content)
    with pytest.raises(PackageError, match=message):
        stamps.read_text(tmp_path / "tiger.txt")


def test_evenness_is_the_share_of_equal_opaque_neighbors() -> None:
    pixels = np.random.default_rng(1).integers(0, 2, (9, 13, 4), dtype=np.uint8)
    pixels[..., 3] *= 255
    pairs = [(row[i], row[i + 1]) for row in pixels.tolist() for i in range(12)]
    opaque = [(a, b) for a, b in pairs if a[3] == b[3] == 255]
    assert stamps.evenness(pixels) == pytest.approx(sum(a == b for a, b in opaque) / len(opaque))
    assert stamps.evenness(np.zeros((3, 3, 4), np.uint8)) == 1


def test_photographs_are_told_from_drawings(root: Path) -> None:
    found = stamps.read_stamps(root)
    assert {stamp.name for stamp in found if stamp.photograph} == {"animals/tiger", "animals/frog", "animals/frog-1"}
    assert len(found) == 7  # neither the mirror image nor the text alone
    assert [stamp.name for stamp in photographs.choose_photographs(found)] == ["animals/tiger"]


def test_png_beside_an_svg_is_a_drawing(root: Path) -> None:
    (root / "animals/tiger.svg").write_text(SVG)
    assert not stamps.is_photograph(root, "animals/tiger")


def test_no_stamps_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no stamps"):
        stamps.read_stamps(tmp_path)


@pytest.mark.parametrize("name", ["animals/tiger.png", "symbols/red.svg"])
def test_picture_is_cut_and_keeps_its_shape(root: Path, name: str) -> None:
    picture = photographs.picture(root / name)
    assert (picture.mode, picture.size) == ("RGB", (96, 96))
    painted = (np.asarray(picture) < 250).any(axis=-1)
    rows, columns = np.flatnonzero(painted.any(axis=1)), np.flatnonzero(painted.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (24, 71, 0, 95)  # twice as wide as high, centered


def test_empty_picture_gets_a_sentence(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4)).save(tmp_path / "ghost.png")
    with pytest.raises(PackageError, match="is empty"):
        photographs.picture(tmp_path / "ghost.png")


@pytest.fixture
def build(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Path]]:
    """Building from the small folder, with its own manifest."""
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps(photographs.make_manifest(stamps.read_stamps(root))))
    monkeypatch.setattr(photographs, "MANIFEST", manifest)
    return lambda language="en": photographs.build(tmp_path, language)


def test_photographs_are_read_as_karpathy_data(build: Callable[..., dict[str, Path]]) -> None:
    folder = build()["photographs"]
    row = json.loads((folder / "dataset_photographs.json").read_text())["images"][0]
    assert (folder / row["filepath"] / row["filename"]).is_file()
    read = USER_DATASET.read(folder, None)
    assert (read.texts, len(read.images)) == (["A tiger."], 1)


def test_drawings_are_read_as_llava_records(build: Callable[..., dict[str, Path]]) -> None:
    folder = build()["drawings"]
    records = open_source(Source(path=str(folder / "llava_train.json")))
    pairs = [records.example(index, Random(0)).pair for index in range(4)]
    assert [pair.target.text for pair in pairs] == ["A cow.", "A happy face.", "A red thing.", "A star."]
    red = decode_image(pairs[2].query.images[0])
    assert red.size == (96, 96) and red.getpixel((48, 48)) == (255, 0, 0)


def test_other_language_is_written_beside(build: Callable[..., dict[str, Path]]) -> None:
    folder = build("pt_BR")["photographs"]
    assert folder.name == "photographs-pt_BR"
    assert "Um tigre." in (folder / "dataset_photographs.json").read_text()
    with pytest.raises(PackageError, match="'xx'"):
        build("xx")


def test_complete_folders_are_kept_and_a_new_build_is_the_same(
    build: Callable[..., dict[str, Path]], tmp_path: Path
) -> None:
    def contents() -> dict[str, bytes]:
        files = [path for folder in build().values() for path in sorted(folder.rglob("*")) if path.is_file()]
        return {str(path): path.read_bytes() for path in files}

    first = contents()
    (build()["drawings"] / "llava_train.json").write_text("kept")
    assert contents() != first
    # What an interrupted build left is started over.
    for folder in build().values():
        folder.rename(folder.with_name(f".{folder.name}.partial"))
    assert contents() == first


def test_manifest_names_what_differs(root: Path) -> None:
    manifest = photographs.make_manifest(stamps.read_stamps(root))
    photographs.check(stamps.read_stamps(root), manifest)
    flat().save(root / "symbols/star.png", compress_level=0)
    with pytest.raises(PackageError, match="the drawings differ"):
        photographs.check(stamps.read_stamps(root), manifest)
    (root / "animals/tiger.txt").write_text("A cat.")
    with pytest.raises(PackageError, match="1 photographs differ, first animals/tiger"):
        photographs.check(stamps.read_stamps(root), manifest)


def test_committed_manifest_holds_distinct_sentences() -> None:
    manifest = json.loads(photographs.MANIFEST.read_text())
    sentences = [row["sentence"].casefold() for row in manifest["photographs"].values()]
    assert len(set(sentences)) == len(sentences) == 303
    assert not stamps.DRAWN & manifest["photographs"].keys()
    assert manifest["photographs"].keys() >= stamps.PHOTOGRAPHED
    assert all(len(row["sha256"]) == 64 for row in manifest["photographs"].values())


def test_package_that_cannot_be_fetched_gets_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stamps.shutil, "which", lambda name: f"/usr/bin/{name}")
    failed = subprocess.CompletedProcess([], 100, "", "W: old lists\nE: Failed to fetch it\n")
    monkeypatch.setattr(stamps.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(PackageError, match=r"\(Failed to fetch it\)\. Is there a network\?"):
        stamps.fetch_stamps(tmp_path)
    monkeypatch.setattr(stamps.shutil, "which", lambda name: None)
    with pytest.raises(PackageError, match="no apt-get"):
        stamps.fetch_stamps(tmp_path)
    assert not (tmp_path / "packages" / stamps.PACKAGE).exists()


def test_chance_recall() -> None:
    assert photographs.chance_recall(264) == pytest.approx(100 / 264)
    assert photographs.chance_recall(264, 5) == pytest.approx(500 / 264)
    assert photographs.chance_recall(3, 5) == 100
