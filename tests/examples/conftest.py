"""The packages with drawings and words, kept between runs; and a small build of all folders."""

import os
import shutil
from pathlib import Path

import pytest

from another_hand.build import BuildConfig, build
from another_hand.concepts import Concept, read_concepts
from another_hand.manifest import read_manifest
from another_hand.packages import fetch


@pytest.fixture(scope="session")
def packages(pytestconfig, tmp_path_factory) -> Path:
    """Return the folder of archives."""
    if not shutil.which("npm"):
        pytest.skip("npm, which fetches the drawings, is not installed")
    kept = pytestconfig.cache.mkdir("another-hand")
    # Fetched elsewhere and moved: several processes may run these tests.
    folder = tmp_path_factory.mktemp("packages")
    for archive in kept.glob("*.tgz"):
        shutil.copy(archive, folder)
    fetch(folder, read_manifest()["archives"])
    for archive in folder.glob("*.tgz"):
        partial = kept / f".{archive.name}.{os.getpid()}"
        shutil.copy(archive, partial)
        os.replace(partial, kept / archive.name)
    return folder


@pytest.fixture(scope="session")
def concepts(packages) -> list[Concept]:
    return read_concepts(packages)


@pytest.fixture(scope="session")
def config() -> BuildConfig:
    return BuildConfig(train_scenes=80, train_singles=40, test_scenes=10, variants=1)


@pytest.fixture(scope="session")
def built(packages, config, tmp_path_factory) -> Path:
    """Build everything, small."""
    directory = tmp_path_factory.mktemp("built")
    shutil.copytree(packages, directory / "packages")
    build(directory, config)
    return directory
