"""A tiny model, a folder of images, and a collection to be made."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from collection_samples import write_images
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from cafe.data.loader import start_workers
from cafe.index import indexing, workers
from cafe.index.collection import Collection
from cafe.model import Cafe


@pytest.fixture(scope="session")
def tiny(random_base: Path) -> Cafe:
    """A model that has learned nothing."""
    return Cafe.load(random_base)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Collections that have a name, and indices of tars, go to a temporary directory."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    return home


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of five images."""
    write_images(tmp_path / "photos", 5)
    return tmp_path / "photos"


@pytest.fixture
def collection(tmp_path: Path, tiny: Cafe) -> Collection:
    """A collection in which nothing is yet."""
    return Collection.open(tmp_path / "collection", tiny)


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The keys of the images that go through the model, as they do."""
    keys: list[str] = []
    embed_rows = indexing.embed_rows

    def embed(model, images, *arguments):
        keys.extend(images)
        return embed_rows(model, images, *arguments)

    monkeypatch.setattr(indexing, "embed_rows", embed)
    return keys


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Within this, Ctrl-C is pressed before the third batch is embedded."""

    @contextmanager
    def interrupt() -> Iterator[None]:
        embed_rows, calls = indexing.embed_rows, []

        def embed(*arguments):
            calls.append(arguments)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return embed_rows(*arguments)

        with monkeypatch.context() as context:
            context.setattr(indexing, "embed_rows", embed)
            yield

    return interrupt


@pytest.fixture
def open_tmp_path() -> Iterator[Path]:
    """A temporary directory that other users may enter, unlike pytest's."""
    with TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def fast_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start workers by forks, and look often whether they are alive: both take seconds otherwise."""

    def start(*arguments: Any, start_method: str = "spawn", **options: Any) -> Iterator[Any]:
        assert start_method == "spawn"
        return start_workers(*arguments, start_method="fork", **options)

    monkeypatch.setattr(workers, "start_workers", start)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
