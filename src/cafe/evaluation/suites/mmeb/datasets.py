"""MMEB's 36 image, 18 video and 24 visual-document datasets, and which of them a folder holds.

`datasets.json` groups them as VLM2Vec's code does (github.com/TIGER-AI-Lab/VLM2Vec, experiments/report_score_v2.py and
src/data/eval_dataset), under the names that files and the leaderboard use, in the leaderboard's order.
"""

import json
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from cafe.errors import CafeError
from cafe.evaluation.io import is_inside

Modality = Literal["image", "video", "visdoc"]


@dataclass(frozen=True)
class Dataset:
    """Say what is known of a dataset by its name.

    Attributes:
        modality: the part of the leaderboard it belongs to.
        task: its meta-task.
        in_distribution: whether MMEB-train holds its training split; None outside V1, which groups by this.
        ranks_all_candidates: every query ranks the candidates of the whole dataset, not only its own.
    """

    modality: Modality
    task: str
    in_distribution: bool | None = None
    ranks_all_candidates: bool = False


def _read_table() -> dict[str, Dataset]:
    """Read the groups of datasets, by the name of each dataset."""
    groups = json.loads(files(__package__).joinpath("datasets.json").read_text(encoding="utf-8"))
    table: dict[str, Dataset] = {}
    for group in groups:
        names = group.pop("names")  # what remains are the fields of `Dataset`
        table |= dict.fromkeys(names, Dataset(**group))
    return table


DATASETS = _read_table()


def lookup(name: str, path: Path) -> Dataset:
    """Look up a dataset; one with an unknown name is a task by itself, of documents if it has a corpus.

    Args:
        name: the dataset's.
        path: its file or folder.
    """
    modality: Modality = "visdoc" if is_corpus(path) else "image"
    return DATASETS.get(name, Dataset(modality, name))


def find_datasets(data: Path) -> dict[str, Path]:
    """Find the datasets under a folder: a file of records, or a folder with such a file or with a corpus.

    Raises:
        CafeError: a dataset is there twice.
    """
    root = data / "mmeb_eval"
    if not root.is_dir():
        return {}
    paths: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        name = _dataset_name(path)
        if not name:
            continue
        # A file and a folder may have the same name but for the suffix.
        if name in paths:
            raise CafeError(f"{paths[name].name} and {path.name} in {root} measure the same: keep one of them.")
        paths[name] = path
    # Your own datasets come first, then the leaderboard's, in its order.
    own = {name: path for name, path in paths.items() if name not in DATASETS}
    known = {name: paths[name] for name in DATASETS if name in paths}
    return own | known


def _dataset_name(path: Path) -> str:
    """Name the dataset of a file or folder; empty if it is none."""
    if path.suffix in (".parquet", ".jsonl"):
        return path.stem
    if not path.is_dir():
        return ""
    # Other folders hold images.
    if is_corpus(path) or parquet_files(path):
        return path.name
    return ""


def find_in_folders(data: Path, folders: Sequence[str], name: str) -> Path | None:
    """Find a file or folder in the first of some folders that has it.

    Args:
        data: the folder of evaluation files.
        folders: the folders, under `data`.
        name: the name to look for, which does not leave `data`.
    """
    for folder in folders:
        path = data / folder / name
        if is_inside(path, data) and os.path.exists(path):
            return path
    return None


def list_folders(data: Path, folders: Sequence[str]) -> str:
    """List folders under `data`, for an error."""
    return ", ".join(str(data / folder) for folder in folders)


def is_corpus(path: Path) -> bool:
    """Tell whether a folder has the three parts of a visual-document dataset."""
    return all((path / part).is_dir() for part in ("queries", "corpus", "qrels"))


def parquet_files(path: Path) -> list[Path]:
    """List the parquet files of a folder, those of the test split if they are named; or the file itself."""
    if not path.is_dir():
        return [path]
    # The Hub's folders may hold other splits too.
    test_files = sorted(path.glob("test*.parquet"))
    return test_files or sorted(path.glob("*.parquet"))
