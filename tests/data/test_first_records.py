"""What a run is to train on is looked for before it starts."""

import json
from dataclasses import replace

import pytest

from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Columns, Source
from cafe.errors import CafeError
from cafe.training.loop import train
from cafe.training.recipe import DataConfig


def turns(*values):
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def opened(path, rows, **options):
    path.write_text(json.dumps(rows))
    return open_source(Source(path=str(path), **options))


@pytest.fixture
def dataset(chat_processor):
    return lambda *sources, **options: ContrastiveBatchDataset(sources, chat_processor, 8, seed=0, **options)


@pytest.mark.parametrize("key", ["image_path", "picture"])
def test_images_under_another_key_are_named_with_the_fields_there_are(dataset, tmp_path, key):
    rows = [{"id": str(n), key: f"{n}.png", "conversations": turns("Describe.", f"Square {n}.")} for n in range(16)]
    source = opened(tmp_path / "a.json", rows)
    with pytest.raises(CafeError, match="None of the first 16 records holds a pair") as error:
        dataset(source)
    for words in ("images under image, images or video", f"has id, {key}, conversations", "contrastive_weight to 0"):
        assert words in str(error.value)
    assert len(dataset(source, contrast=False)) == 2
    right = opened(tmp_path / "a.json", rows, columns=Columns(image=key))
    assert len(dataset(right)) == 2


def test_a_run_without_pairs_ends_before_it_trains(recipe, tmp_path):
    rows = [{"conversations": turns("Describe.", f"Square {n}.")} for n in range(16)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    without = DataConfig(sources=(Source(path=str(tmp_path / "a.json")),), num_workers=0)
    with pytest.raises(CafeError, match="holds a pair to train on"):
        train(replace(recipe, data=without), report=lambda line: None)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_a_column_that_all_first_records_lack_ends_the_run_before_it_trains(dataset, tmp_path, scenes):
    good = open_source(Source(path=str(scenes / "llava_train.json")))
    rows = [{"image": f"{n}.png", "conversations": turns("Describe.", "A square.")} for n in range(16)]
    bad = opened(tmp_path / "a.json", rows, columns=Columns(image="img"))
    with pytest.raises(CafeError, match=r"All of the first 16 records of .*a\.json are bad.*no column 'img'"):
        dataset(bad, good)


def test_a_source_without_pairs_beside_one_with_them_is_fine_however_they_are_mixed(dataset, tmp_path, scenes):
    texts = opened(tmp_path / "a.json", [{"conversations": turns("Hello", f"Hi {n}")} for n in range(300)])
    assert len(dataset(texts, open_source(Source(path=str(scenes / "llava_train.json")))))


def test_pairs_without_dialogues_warn_where_language_is_trained(dataset, tmp_path, caplog):
    source = opened(tmp_path / "a.json", [{"query": f"{n}", "positive": "a"} for n in range(8)], format="pairs")
    dataset(source)
    assert "None of the first 8 records holds a dialogue" in caplog.text
    caplog.clear()
    dataset(source, language=False)
    assert not caplog.text
