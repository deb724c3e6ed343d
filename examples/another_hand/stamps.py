"""Fetch Tux Paint's stamps, with their sentences in many languages, and tell the photographs from the drawings.

The package does not say which image is which. How it was decided, on the 658 PNGs of version 2022.06.04 that have a
sentence, are no copy of an SVG and are not in a folder called "cartoon" (all others are drawings); all were looked at:

- Neighboring pixels of a drawing mostly have the same color, those of a photograph hardly ever do. The share that do,
  `evenness`, is below 0.1 for 89% of the photographs and above 0.6 for 83% of the drawings. A line at 0.45 is wrong for
  44: 42 shaded drawings, and 2 photographs of a mostly black disk.
- Three folders hold drawings and renderings only: `DRAWN_FOLDERS`. 19 errors are left.
- 19 shaded drawings and both disks are listed by name: `DRAWN`, `PHOTOGRAPHED`.
"""

import os
import shutil
import subprocess
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from another_hand.packages import PackageError
from cafe.utils.atomic import commit, staging_path

PACKAGE = "tuxpaint-stamps-default"
VERSION = "2022.06.04-1"  # that was looked at
STAMPS = Path("usr/share/tuxpaint/stamps")  # in the package
KINDS = (".png", ".svg", ".txt")  # what is unpacked; most of the package is sound

EVENNESS = 0.45  # of a photograph, at most
DRAWN_FOLDERS = ("seasonal/easter/", "symbols/faces/", "symbols/money/euro/")
DRAWN = {
    "animals/mammals/aquatic/whale",
    "animals/mammals/cats/tiger_sumatran",
    "clothes/button",
    "naturalforces/fire",
    "seasonal/christmas/hard_candy",
    "seasonal/christmas/Santa",
    "seasonal/christmas/santahat",
    "seasonal/christmas/stocking",
    "seasonal/christmas/xmas_tp_bulb",
    "seasonal/hanukkah/holiday_candle",
    "seasonal/newyears/confetti",
    "seasonal/newyears/fireworks",
    "seasonal/newyears/fireworks2",
    "seasonal/newyears/party-hat",
    "seasonal/newyears/party-horn-in",
    "town/roadsigns/xing_ped",
    "town/roadsigns/xing_school",
    "vehicles/emergency/sedan_police",
    "vehicles/flight/balloon360",
}
PHOTOGRAPHED = {"space/moon/moon_crescent", "space/planets/1_mercury"}


@dataclass(frozen=True)
class Stamp:
    """Hold an image and what is said of it.

    Attributes:
        name: the path in the package's folder of stamps, without suffix.
        image: the file, PNG or SVG.
        sentence: in English.
        translations: by language, as "pt_BR" or "sr@latin".
        photograph: whether it is one; otherwise it is a drawing.
        own: whether no other stamp has the same sentence.
    """

    name: str
    image: Path
    sentence: str
    translations: dict[str, str]
    photograph: bool
    own: bool


def fetch_stamps(directory: Path) -> Path:
    """Download Debian's package and unpack it, both into `directory/packages`; install nothing.

    What is there already is kept.

    Returns:
        the folder of stamps.

    Raises:
        PackageError: APT or dpkg is missing, the archive cannot be reached, or the package cannot be unpacked.
    """
    packages = directory / "packages"
    unpacked = packages / PACKAGE
    if not unpacked.is_dir():
        archives = sorted(packages.glob(f"{PACKAGE}_*.deb"))
        _unpack(archives[-1] if archives else _download(packages), unpacked)
    return unpacked / STAMPS


def _download(directory: Path) -> Path:
    """Download the package with `apt-get download`, which needs no rights."""
    if not shutil.which("apt-get"):
        raise PackageError(
            f"The photographs are in Debian's package {PACKAGE}, which apt-get downloads, and there is no apt-get."
        )
    partial = staging_path(directory / f"{PACKAGE}.deb")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    message = _run_apt("download", PACKAGE, cwd=partial)
    if message:
        # The lists may be old or absent; where they cannot be renewed, the second try gives the reason.
        _run_apt("update", cwd=partial)
        message = _run_apt("download", PACKAGE, cwd=partial)
    if message:
        raise PackageError(f"apt-get could not fetch {PACKAGE} ({message}). Is there a network?")
    (archive,) = partial.glob("*.deb")
    archive = archive.replace(directory / archive.name)
    partial.rmdir()
    return archive


def _run_apt(*arguments: str, cwd: Path) -> str:
    """Run apt-get, and return its first error, or nothing."""
    english = {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(
            ["apt-get", "-q", *arguments],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=600,
            env=english,
        )
    except subprocess.TimeoutExpired:
        return "no answer within ten minutes"
    if not result.returncode:
        return ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("E:")]
    return errors[0].removeprefix("E: ") if errors else f"exit status {result.returncode}"


def _unpack(archive: Path, directory: Path) -> None:
    """Unpack the images and the texts of the package; the folder is complete or absent."""
    if not shutil.which("dpkg-deb"):
        raise PackageError(f"{archive} is unpacked by dpkg-deb, which is not installed.")
    partial = staging_path(directory)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as files:
                for file in files:
                    if file.isfile() and file.name.endswith(KINDS):
                        files.extract(file, partial, filter="data")
        except tarfile.TarError as error:
            raise PackageError(f"{archive} cannot be unpacked ({error}): remove it, and it is fetched again.") from None
    if process.returncode:
        raise PackageError(f"{archive} cannot be unpacked: remove it, and it is fetched again.")
    commit(partial, directory)


def read_stamps(root: Path) -> list[Stamp]:
    """Read all stamps that have a sentence, in the order of their names.

    Raises:
        PackageError: there is none, or a text is not UTF-8.
    """
    texts = {}
    for path in sorted(root.rglob("*.txt")):
        images = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
        found = [image for image in images if image.is_file()]
        if found:
            texts[path.relative_to(root).with_suffix("").as_posix()] = (found[0], *read_text(path))
    if not texts:
        raise PackageError(f"There are no stamps in {root}.")
    frequency = Counter(sentence.casefold() for _, sentence, _ in texts.values())
    return [
        Stamp(name, image, sentence, translations, is_photograph(root, name), frequency[sentence.casefold()] == 1)
        for name, (image, sentence, translations) in texts.items()
    ]


def read_text(path: Path) -> tuple[str, dict[str, str]]:
    """Read a stamp's text: the English sentence in the first line, then lines as "de.utf8=Ein Sumatratiger.".

    Returns:
        the sentence, and its translations by language.

    Raises:
        PackageError: the file is empty or not UTF-8.
    """
    try:
        first, *lines = path.read_text(encoding="utf-8-sig").strip().split("\n")
    except UnicodeDecodeError as error:
        raise PackageError(f"{path} is not UTF-8: {error}.") from None
    if not first:
        raise PackageError(f"{path} has no sentence.")
    translations = {}
    for line in lines:
        key, _, sentence = line.partition("=")
        if key.endswith(".utf8") and sentence.strip():
            translations[key.removesuffix(".utf8")] = _one_line(sentence)
    return _one_line(first), translations


def _one_line(text: str) -> str:
    """Write all white space as single spaces."""
    return " ".join(text.split())


def is_photograph(root: Path, name: str) -> bool:
    """Tell a photograph from a drawing, by what the module's docstring says."""
    path = root / f"{name}.png"
    if not path.is_file() or path.with_suffix(".svg").is_file():
        return False
    if "cartoon" in Path(name).parts or name.startswith(DRAWN_FOLDERS) or name in DRAWN:
        return False
    if name in PHOTOGRAPHED:
        return True
    with Image.open(path) as image:
        return evenness(np.asarray(image.convert("RGBA"))) <= EVENNESS


def evenness(pixels: UInt8[np.ndarray, "height width 4"]) -> float:
    """Return the share of opaque pixels whose right neighbor, opaque too, has exactly the same color."""
    opaque = pixels[..., 3] > 250  # soft edges say nothing about the surface
    both = opaque[:, 1:] & opaque[:, :-1]
    same = (pixels[:, 1:, :3] == pixels[:, :-1, :3]).all(axis=-1)
    return float(same[both].mean()) if both.any() else 1.0
