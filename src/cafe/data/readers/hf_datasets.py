"""Datasets of the Hugging Face `datasets` library, an optional dependency."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from cafe.data.files import folder_of
from cafe.errors import CafeError, MissingPackageError


class HFDataset:
    """Read a dataset of the Hugging Face `datasets` library. Images are not decoded.

    A folder that `save_to_disk` wrote is opened as it is; another folder, or the name after `dataset:`, goes to
    `load_dataset`, which reads folders of images (imagefolder), parquet, CSV and the Hub.
    """

    def __init__(self, name: str, split: str, subset: str) -> None:
        self.name = name
        dataset = _load(name, subset)
        if isinstance(dataset, dict):  # a DatasetDict is one
            if split not in dataset:
                raise CafeError(f"{name} has no split {split!r}; there are {', '.join(dataset)}.")
            dataset = dataset[split]
        self.table = dataset.with_format("arrow")  # as it is stored: images stay encoded
        self.chunks = [len(dataset)]

    def __getitem__(self, index: int) -> Any:
        return self.table[index].to_pylist()[0]


def image_folder(name: str) -> str:
    """Return the folder that a dataset's images are in: beside its own, or the cache of what is on the Hub."""
    path = name.removeprefix("dataset:")
    return folder_of(path) if Path(path).is_dir() else HF_HOME


def _load(name: str, subset: str) -> Any:
    """Load a dataset, or a mapping of its splits to datasets.

    Raises:
        MissingPackageError: the library is not installed.
        CafeError: there is no such dataset, or it cannot be read.
    """
    try:
        import datasets
    except ImportError:
        raise MissingPackageError(f"{name} needs the datasets library: pip install 'cafe-lvlm[datasets]'.") from None
    path = os.path.expanduser(name.removeprefix("dataset:"))
    # The library reads what it saved itself by another function than everything else.
    saved_files = Path(path) / "state.json", Path(path) / "dataset_dict.json"
    is_saved = any(map(Path.is_file, saved_files))
    try:
        if is_saved:
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, subset or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise CafeError(f"{name} cannot be read as a dataset: {error}") from None
