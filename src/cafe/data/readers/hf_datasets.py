"""Datasets of the Hugging Face `datasets` library."""

from pathlib import Path
from typing import Any

from cafe.errors import CafeError


class HFDataset:
    """A dataset of the Hugging Face `datasets` library, which the extra "datasets" installs.

    A folder that `save_to_disk` wrote is opened as it is; another folder, or the name behind `dataset:`, goes to
    `load_dataset`, which knows pictures in folders (imagefolder), parquet, CSV and the Hub. Pictures are not decoded.
    """

    def __init__(self, name: str, split: str, subset: str) -> None:
        try:
            import datasets
        except ImportError:
            raise CafeError(f"{name} needs the datasets library: pip install 'cafe-lvlm[datasets]'.") from None
        self.name = name
        path = name.removeprefix("dataset:")
        try:
            if any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json")):
                found = datasets.load_from_disk(path)
            else:
                found = datasets.load_dataset(path, subset or None)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise CafeError(f"{name} cannot be read as a dataset: {error}") from None
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise CafeError(f"{name} has no split {split!r}; there are {', '.join(found)}.")
            found = found[split]
        self.table = found.with_format("arrow")
        self.chunks = [len(found)]

    def __getitem__(self, index: int) -> Any:
        return self.table[index].to_pylist()[0]
