"""The model that mines."""

from pathlib import Path

import pytest

from cafe.model import Cafe


@pytest.fixture(scope="package")
def model(random_base: Path) -> Cafe:
    return Cafe.load(random_base)
