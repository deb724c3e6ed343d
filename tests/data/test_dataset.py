"""Which records a batch holds: the seed's order, ranks, and what is trained of each."""

import json

import pytest

from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import CafeError


def test_a_record_with_nothing_to_train_on_is_skipped(chat_processor, scenes):
    """Such as a dialogue, where only the contrastive loss is trained."""
    sources = [
        open_source(Source(path=str(scenes / "llava_train.json"))),
        open_source(Source(path=str(scenes / "vqa_train.json"), use_pairs=False)),
    ]
    both = ContrastiveBatchDataset(sources, chat_processor, batch_size=16, seed=3)
    alone = ContrastiveBatchDataset(sources, chat_processor, batch_size=16, seed=3, language=False)
    pairs, dialogues = 0, 0
    for number in range(3):
        expected = [name for name in both[number].record_names if "llava_train" in name]
        assert alone[number].record_names == expected and len(alone[number].target_ids) == len(expected)
        assert len(both[number].record_names) == 16 and len(both[number].target_ids) == len(expected)
        pairs, dialogues = pairs + len(expected), dialogues + 16 - len(expected)
    assert pairs > 10 and dialogues > 10
    assert len(alone.largest_examples(16)) < 16 == len(both.largest_examples(16))


def test_two_ranks_share_a_global_batch(chat_processor, llava_dataset, scenes):
    whole = ContrastiveBatchDataset(
        [open_source(Source(path=str(scenes / "llava_train.json")))], chat_processor, batch_size=16, seed=3
    )
    parts = [llava_dataset(rank=rank, world_size=2)[1].record_names for rank in (0, 1)]
    assert whole[1].record_names == parts[0] + parts[1]


def test_half_of_a_character_is_a_bad_record(chat_processor, scenes, tmp_path):
    records = json.loads((scenes / "llava_train.json").read_text())[:8]
    records[3]["conversations"][1]["value"] = "a \ud83d"
    (tmp_path / "cut.json").write_text(json.dumps(records))
    batches = ContrastiveBatchDataset(
        [open_source(Source(path=str(tmp_path / "cut.json"), images=str(scenes)))], chat_processor, 8, 3
    )
    [bad] = batches[0].bad_records
    assert "record 3" in bad and "half of a character" in bad and len(batches[0].record_names) == 7


def test_data_without_anything_to_train_on_is_an_error(chat_processor, scenes):
    source = open_source(Source(path=str(scenes / "vqa_train.json"), use_pairs=False))
    with pytest.raises(CafeError, match="None of the first 48 records holds a pair"):
        ContrastiveBatchDataset([source], chat_processor, batch_size=8, seed=0, language=False)


def test_fewer_records_than_a_batch_are_an_error(chat_processor, scenes):
    with pytest.raises(CafeError, match="48 records, fewer than one batch of 64"):
        ContrastiveBatchDataset(
            [open_source(Source(path=str(scenes / "llava_train.json")))], chat_processor, batch_size=64, seed=0
        )
