"""Datasets of the datasets library, from a disk without a network."""

import json
import pickle
from pathlib import Path

import pytest
from samples import png

from cafe.data.readers.hf_datasets import HFDataset
from cafe.errors import CafeError


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """The datasets library, with no network and a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    return datasets


def test_a_dataset_saved_to_disk_keeps_images_encoded(tmp_path, offline):
    data = [
        {"image": {"bytes": png(color), "path": None}, "caption": [color, f"it is {color}"]}
        for color in ("red", "blue")
    ]
    features = offline.Features({"image": offline.Image(), "caption": offline.List(offline.Value("string"))})
    dataset = offline.Dataset.from_list(data, features=features)
    offline.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "saved")
    rows = pickle.loads(pickle.dumps(HFDataset(str(tmp_path / "saved"), "train", "")))
    assert rows.chunks == [2] and [rows[index] for index in (1, 0)] == data[::-1]
    assert HFDataset(str(tmp_path / "saved"), "test", "")[0] == data[1]
    with pytest.raises(CafeError, match=r"no split 'val'; there are train, test"):
        HFDataset(str(tmp_path / "saved"), "val", "")


def test_a_folder_of_images_with_metadata_is_a_dataset(tmp_path, offline):
    (tmp_path / "train").mkdir()
    for color in ("red", "blue"):
        (tmp_path / "train" / f"{color}.png").write_bytes(png(color))
    lines = [json.dumps({"file_name": f"{color}.png", "text": f"it is {color}"}) for color in ("blue", "red")]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    rows = HFDataset(str(tmp_path), "train", "")
    texts = {Path(rows[index]["image"]["path"]).name: rows[index]["text"] for index in range(2)}
    assert texts == {"red.png": "it is red", "blue.png": "it is blue"}


def test_a_missing_dataset_is_an_error(offline):
    with pytest.raises(CafeError, match="cannot be read as a dataset"):
        HFDataset("dataset:nobody/nothing", "train", "")
