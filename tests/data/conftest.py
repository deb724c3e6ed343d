"""A cache of the tests' own, and datasets of the small world."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.lvlm.loading import load_processor
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The indices of tars go to a temporary directory."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


@pytest.fixture(scope="package")
def chat_processor(random_base: Path) -> ChatProcessor:
    return ChatProcessor(load_processor(str(random_base)), Prompts())


@pytest.fixture
def llava_dataset(chat_processor: ChatProcessor, scenes: Path) -> Callable[..., ContrastiveBatchDataset]:
    """Makes datasets of the small world's 48 records with image, caption, dialogue and hard negatives."""

    def make(path: Path = scenes / "llava_train.json", **options: Any) -> ContrastiveBatchDataset:
        options = {"batch_size": 8, "seed": 3} | options
        return ContrastiveBatchDataset([open_source(Source(path=str(path)))], chat_processor, **options)

    return make
