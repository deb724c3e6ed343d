"""Write Tux Paint's photographs as a retrieval test, and the drawings of the same package as training data for it.

    python -m another_hand.photographs runs/another-hand    # with examples/ on PYTHONPATH

| folder in `data/` | contents |
|---|---|
| `photographs/` | Karpathy's split file, all in "test": each photograph whose sentence is no other stamp's |
| `stamp-drawings/train/` | LLaVA records: the drawings, described by their sentences |

The images are not redistributed; `photographs.json`, beside this file, says which ones they are. Without learned
features there is no floor but chance, since photographs and sentences have nothing in common before training:
`chance_recall`.
"""

import argparse
import hashlib
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image
from tqdm import tqdm

from another_hand.packages import PackageError
from another_hand.stamps import PACKAGE, VERSION, Stamp, fetch_stamps, read_stamps
from another_hand.words import DESCRIBE
from cafe.utils.atomic import commit, staging_path

MANIFEST = Path(__file__).with_suffix(".json")
SIDE = 96  # pixels


def build(directory: Path, language: str = "en") -> dict[str, Path]:
    """Fetch the package, compare it with the manifest, and write both folders; complete ones are kept.

    Returns:
        by "photographs" and "drawings", the folder.

    Raises:
        PackageError: the package cannot be fetched, or is not the one of the manifest.
    """
    stamps = read_stamps(fetch_stamps(directory))
    check(stamps, json.loads(MANIFEST.read_text()))
    suffix = "" if language == "en" else f"-{language}"
    folders = {
        "photographs": directory / "data" / f"photographs{suffix}",
        "drawings": directory / "data" / "stamp-drawings" / "train",
    }
    write_photographs(stamps, folders["photographs"], language)
    write_drawings(stamps, folders["drawings"])
    return folders


def choose_photographs(stamps: Iterable[Stamp]) -> list[Stamp]:
    """Choose the photographs with a sentence of their own: any other would be right for several images."""
    return [stamp for stamp in stamps if stamp.photograph and stamp.own]


def write_photographs(stamps: Iterable[Stamp], directory: Path, language: str = "en") -> None:
    """Write the photographs with one sentence each, as Karpathy's split file and `images/`.

    In another language than English, photographs without a sentence, or with one that another has too, are left out.
    """
    if directory.is_dir():
        return
    said = [(stamp, _sentence(stamp, language)) for stamp in choose_photographs(stamps)]
    frequency = Counter(sentence for _, sentence in said)
    chosen = [(stamp, sentence) for stamp, sentence in said if sentence and frequency[sentence] == 1]
    if not chosen:
        raise PackageError(f"No photograph has a sentence in the language {language!r}.")
    rows = []
    for number, (stamp, sentence) in enumerate(chosen):
        path = Path("images", f"{stamp.name}.png")
        row = {"filename": path.name, "filepath": path.parent.as_posix(), "split": "test", "imgid": number}
        rows.append({**row, "sentences": [{"raw": sentence, "tokens": sentence.strip(".").split()}]})
    shown = [stamp for stamp, _ in chosen]
    _write_folder(directory, shown, "dataset_photographs.json", {"dataset": "photographs", "images": rows})


def _sentence(stamp: Stamp, language: str) -> str | None:
    """Return a stamp's sentence in a language, if it has one."""
    return stamp.sentence if language == "en" else stamp.translations.get(language)


def write_drawings(stamps: Iterable[Stamp], directory: Path) -> None:
    """Write the drawings as LLaVA records, in which the sentence describes the image, and `images/`."""
    if directory.is_dir():
        return
    drawings = [stamp for stamp in stamps if not stamp.photograph]
    records = []
    for stamp in drawings:
        turns = [
            {"from": "human", "value": f"<image>\n{DESCRIBE}"},
            {"from": "gpt", "value": stamp.sentence},
        ]
        records.append({"id": stamp.name, "image": f"images/{stamp.name}.png", "conversations": turns})
    _write_folder(directory, drawings, "llava_train.json", records)


def _write_folder(directory: Path, stamps: Iterable[Stamp], name: str, annotations: Any) -> None:
    """Write images with their annotations; the folder is complete or absent."""
    partial = staging_path(directory)
    shutil.rmtree(partial, ignore_errors=True)
    for stamp in tqdm(stamps, desc=directory.name, unit="image"):
        path = partial / "images" / f"{stamp.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(stamp.image).save(path)
    (partial / name).write_text(json.dumps(annotations, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    commit(partial, directory)


def picture(path: Path, side: int = SIDE) -> Image.Image:
    """Draw a PNG or SVG file on a white square: cut to what is not transparent, its longer side the square's.

    Raises:
        PackageError: the image is fully transparent.
    """
    content = path.read_bytes()
    if path.suffix == ".svg":
        # Lengths in centimeters need a resolution. Larger than needed, since what is cut off is not known yet.
        content = resvg_py.svg_to_bytes(svg_string=content.decode(), width=4 * side, dpi=96, skip_system_fonts=True)
    with Image.open(io.BytesIO(content)) as opened:
        image = opened.convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        raise PackageError(f"{path} is empty.")
    image = image.crop(box)
    scale = side / max(image.size)
    image = image.resize([max(1, round(scale * length)) for length in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2), image)
    return square


def make_manifest(stamps: Sequence[Stamp]) -> dict[str, Any]:
    """List the photographs with their sentences and the SHA-256 of the package's files, and sum up the drawings."""
    photographs = {
        stamp.name: {"sentence": stamp.sentence, "sha256": _sha256(stamp)} for stamp in choose_photographs(stamps)
    }
    drawings = [[stamp.name, stamp.sentence, _sha256(stamp)] for stamp in stamps if not stamp.photograph]
    digest = hashlib.sha256(json.dumps(drawings).encode()).hexdigest()
    return {
        "package": PACKAGE,
        "version": VERSION,
        "photographs": photographs,
        "drawings": {"count": len(drawings), "sha256": digest},
    }


def _sha256(stamp: Stamp) -> str:
    """Hash the package's file: how Pillow compresses what is written depends on its version."""
    return hashlib.sha256(stamp.image.read_bytes()).hexdigest()


def check(stamps: Sequence[Stamp], manifest: dict[str, Any]) -> None:
    """Compare the package with the manifest.

    Raises:
        PackageError: a photograph, its sentence, or a drawing differs.
    """
    found = make_manifest(stamps)
    expected, photographs = manifest["photographs"], found["photographs"]
    names = sorted(expected.keys() | photographs.keys())
    different = [name for name in names if expected.get(name) != photographs.get(name)]
    origin = f"{PACKAGE} is not version {manifest['version']}, which the manifest describes"
    if different:
        raise PackageError(f"{origin}: {len(different)} photographs differ, first {different[0]}.")
    if found["drawings"] != manifest["drawings"]:
        raise PackageError(f"{origin}: the drawings differ.")


def chance_recall(count: int, k: int = 1) -> float:
    """Return the R@k of a random order of `count` candidates of which one is right, in percent."""
    return 100 * min(k, count) / count


def main(arguments: Sequence[str] | None = None) -> None:
    """Build from the command line."""
    parser = argparse.ArgumentParser(prog="python -m another_hand.photographs", description="Write the photographs.")
    parser.add_argument("directory", type=Path, help="where packages/ and data/ are written")
    parser.add_argument("--language", default="en", help="of the photographs' sentences, as in pt_BR")
    options = parser.parse_args(arguments)
    try:
        folders = build(options.directory, options.language)
    except PackageError as error:
        sys.exit(str(error))
    rows = json.loads((folders["photographs"] / "dataset_photographs.json").read_text(encoding="utf-8"))["images"]
    print(f"{len(rows)} photographs in {folders['photographs']}; R@1 by chance: {chance_recall(len(rows)):.2f}%")


if __name__ == "__main__":
    main()
