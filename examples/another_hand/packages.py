"""Fetch the npm packages that hold the drawings and the words, and read single files of theirs.

`npm pack` downloads a package's archive and installs nothing: no script of a package is run. Each archive is compared
with the hash in the committed manifest before it is read.
"""

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

# By hand, that is by who drew them: the package, as npm names it.
DRAWINGS = {
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent": "@iconify-json/fluent-emoji-flat@1.2.6",
    "emojione-v1": "@iconify-json/emojione-v1@1.2.3",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "openmoji": "@iconify-json/openmoji@1.2.29",
}
WORDS = {
    "names": "cldr-annotations-full@48.2.0",
    "keywords": "emojilib@4.0.3",
    "groups": "unicode-emoji-json@0.9.0",
}
PACKAGES = DRAWINGS | WORDS


class PackageError(Exception):
    """A package cannot be fetched, or is not the one that the manifest names."""


def fetch(directory: Path, hashes: dict[str, str]) -> dict[str, str]:
    """Download the packages that are not in the directory yet, and check all of them.

    Args:
        directory: where the archives are kept.
        hashes: by package, the SHA-256 that its archive must have; a package that is not named is not checked.

    Returns:
        by package, the SHA-256 of its archive.

    Raises:
        PackageError: npm is not installed, the registry cannot be reached, or an archive has another hash.
    """
    directory.mkdir(parents=True, exist_ok=True)
    missing = [package for package in PACKAGES.values() if not (directory / _archive(package)).is_file()]
    if missing:
        _pack(missing, directory)
    found = {}
    for package in PACKAGES.values():
        archive = directory / _archive(package)
        found[package] = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found[package] != hashes.get(package, found[package]):
            raise PackageError(f"{archive} is not the {package} of the manifest: its SHA-256 is {found[package]}.")
    return found


def _pack(packages: list[str], directory: Path) -> None:
    """Download packages into a directory with `npm pack`, so that each archive is complete or absent."""
    if not shutil.which("npm"):
        raise PackageError(
            "The drawings come from the npm registry, and npm is not installed (Debian: apt install npm)."
        )
    partial = directory / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(partial), *packages]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise PackageError("The npm registry did not answer within five minutes. Is there a network?") from None
    if result.returncode:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise PackageError(f"npm could not fetch the drawings ({lines[0]}). Is there a network?")
    for package in packages:
        os.replace(partial / _archive(package), directory / _archive(package))
    partial.rmdir()


def _archive(package: str) -> str:
    """Return the file name that `npm pack` gives a package: "@scope/name@1.0" becomes "scope-name-1.0.tgz"."""
    name, _, version = package.rpartition("@")
    return f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"


@cache
def read_json(directory: Path, package: str, path: str) -> Any:
    """Read a JSON file of a package without unpacking it."""
    with tarfile.open(directory / _archive(package)) as archive:
        member = archive.extractfile(f"package/{path}")
        assert member is not None, path
        return json.load(member)
