"""Batches in a fixed order, and the quarantine."""

import json
import os
import signal
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from samples import png
from torch.utils.data import get_worker_info

from cafe.content import Content
from cafe.data.dataset import Batch, ContrastiveBatchDataset, MicroBatchSize, Quarantine, content_hash, iterate_batches
from cafe.data.records import Source, open_source
from cafe.errors import CafeError
from cafe.lvlm.loading import load_processor
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts


@pytest.fixture(scope="module")
def processing(random_base):
    return ChatProcessor(load_processor(str(random_base)), Prompts())


def make(chat_processor, path, **options):
    return ContrastiveBatchDataset(
        [open_source(Source(path=str(path)))], chat_processor, batch_size=8, seed=3, **options
    )


def test_the_order_follows_the_seed_whatever_the_workers(chat_processor, scenes):
    batches = make(chat_processor, scenes / "llava_train.json")
    alone = [batch.record_names for batch in iterate_batches(batches, 0, 8, 0)]
    helped = [batch.record_names for batch in iterate_batches(batches, 0, 8, 2)]
    assert alone == helped
    assert sorted(name for batch in alone[:6] for name in batch) == sorted(set(name for b in alone[:6] for name in b))
    assert alone[:2] != alone[6:8]  # the second epoch has its own order


def test_a_batch_holds_every_branch(chat_processor, scenes):
    batch = make(chat_processor, scenes / "llava_train.json")[0]
    (micro_batch,) = batch.micro_batches
    assert micro_batch.embed is micro_batch.joint
    assert len(micro_batch.joint.inputs["pixel_values"]) == 8  # every picture once
    assert len(batch.owners) >= 16
    assert sorted(micro_batch.slots.tolist()) == list(range(16 + len(batch.owners)))
    assert batch.supervised == len(micro_batch.joint.labels) > 0
    assert make(chat_processor, scenes / "llava_train.json", hard_negatives=False)[0].owners.tolist() == []
    assert make(chat_processor, scenes / "llava_train.json", contrast=False)[0].micro_batches[0].slots.tolist() == []
    assert make(chat_processor, scenes / "llava_train.json", language=False)[0].supervised == 0


def test_an_example_with_nothing_to_train_on_is_passed_over(chat_processor, scenes):
    """As of a source of dialogues alone, where the contrastive loss is trained alone."""
    sources = [
        open_source(Source(path=str(scenes / "llava_train.json"))),
        open_source(Source(path=str(scenes / "vqa_train.json"), use_pairs=False)),
    ]
    both = ContrastiveBatchDataset(sources, chat_processor, batch_size=16, seed=3)
    alone = ContrastiveBatchDataset(sources, chat_processor, batch_size=16, seed=3, language=False)
    pairs, dialogues = 0, 0
    for number in range(3):
        kept = [name for name in both[number].record_names if "llava_train" in name]
        assert alone[number].record_names == kept and len(alone[number].target_ids) == len(kept)
        assert len(both[number].record_names) == 16 and len(both[number].target_ids) == len(kept)
        pairs, dialogues = pairs + len(kept), dialogues + 16 - len(kept)
    assert pairs > 10 and dialogues > 10
    assert len(alone.largest_examples(16)) < 16 == len(both.largest_examples(16))


def test_micro_batches_keep_to_their_size_and_hold_all(chat_processor, scenes):
    whole = make(chat_processor, scenes / "llava_train.json")[0]
    for size in (MicroBatchSize(tokens=700), MicroBatchSize(crops=5), MicroBatchSize(tokens=1)):
        batch = make(chat_processor, scenes / "llava_train.json", size=size)[0]
        assert sum(len(part.slots) for part in batch.micro_batches) == len(whole.micro_batches[0].slots)
        assert batch.supervised == whole.supervised
        assert batch.micro_batches[0].embed is batch.micro_batches[0].joint  # read once
        pictures = [part.joint.inputs["pixel_values"] for part in batch.micro_batches]
        assert sum(map(len, pictures)) == 8
        if size.tokens == 1:
            assert len(batch.micro_batches) == 8
        elif size.tokens:
            assert all(part.joint.filled <= size.tokens for part in batch.micro_batches)
            assert all(len(part.embed.labels) == 0 for part in batch.micro_batches[1:])
        else:
            assert all(len(part) * 2 <= size.crops for part in pictures)


def test_every_tensor_of_a_batch_is_pinned_once(chat_processor, scenes, monkeypatch):
    batch = make(chat_processor, scenes / "llava_train.json", size=MicroBatchSize(crops=20))[0]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    copy = batch.pin_memory()
    found, given = ({id(tensor): tensor for tensor in tensors(each)} for each in (batch, copy))
    assert len(batch.micro_batches) > 1 and len(found) > 10
    assert sorted(map(id, pinned)) == sorted(found) and found.keys().isdisjoint(given)
    assert all(torch.equal(one, other) for one, other in zip(found.values(), given.values(), strict=True))
    assert (copy.supervised, copy.sources) == (batch.supervised, batch.sources)

    (one,) = make(chat_processor, scenes / "llava_train.json")[0].pin_memory().micro_batches
    assert one.embed is one.joint


def tensors(value):
    """All of them in some dataclasses, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list):
        for part in value:
            yield from tensors(part)


def test_two_ranks_share_a_global_batch(chat_processor, scenes):
    whole = ContrastiveBatchDataset(
        [open_source(Source(path=str(scenes / "llava_train.json")))], chat_processor, batch_size=16, seed=3
    )
    parts = [make(chat_processor, scenes / "llava_train.json", rank=rank, world=2)[1].sources for rank in (0, 1)]
    assert whole[1].record_names == parts[0] + parts[1]


def test_equal_targets_have_equal_ids(chat_processor, scenes, tmp_path):
    rows = json.loads((scenes / "llava_train.json").read_text())[:8]
    for row in rows[:2]:
        row["conversations"][1]["value"] = "the same words"
    (tmp_path / "a.json").write_text(json.dumps(rows))
    batches = ContrastiveBatchDataset(
        [open_source(Source(path=str(tmp_path / "a.json"), images=str(scenes)))], chat_processor, batch_size=8, seed=0
    )
    ids = batches[0].target_ids
    assert len(torch.unique(ids)) == 7
    for row in rows:
        row["negatives"] = [rows[0]["conversations"][1]["value"], "something else"]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    source = Source(path=str(tmp_path / "b.json"), images=str(scenes))
    batch = ContrastiveBatchDataset([open_source(source)], chat_processor, batch_size=8, seed=0)[0]
    assert batch.negative_owner.tolist() == [pair for pair in range(8) for _ in range(2)]
    assert len(torch.unique(batch.negative_ids)) == 2 and batch.negative_ids[0] in batch.target_ids


def test_contents_have_one_identity_only_where_they_are_equal():
    red, blue, small = (
        Image.new("RGB", size, name) for size, name in (((4, 2), "red"), ((4, 2), "blue"), ((2, 4), "red"))
    )
    coded = [png("red"), png("blue")]
    values = ["red", "", Path("a"), Path("b"), *coded, red, blue, small, [red, blue], [blue, red], [red, "red"]]
    assert len({content_hash(Content.of(value)) for value in values}) == len(values)
    assert content_hash(Content.of(red.copy())) == content_hash(Content.of(red))


def test_bad_records_are_quarantined_and_too_many_stop_the_run(chat_processor, scenes, tmp_path):
    rows = json.loads((scenes / "llava_train.json").read_text())[:16]
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    rows[3]["image"], rows[5]["image"] = "damaged.png", "missing.png"
    for row in rows:
        if not row["image"].endswith(("damaged.png", "missing.png")):
            row["image"] = str(scenes / row["image"])
    rows[7]["conversations"][1]["value"] = " "
    (tmp_path / "a.json").write_text(json.dumps(rows))
    batches = make(chat_processor, tmp_path / "a.json")
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", max_bad_fraction=0.5)
    for number in range(2):
        quarantine.record(batches[number])
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert quarantine.num_bad == len(reasons) == 3 and quarantine.num_records == 16
    for record, word in ((3, "cannot be decoded"), (5, "does not exist"), (7, "is empty")):
        assert any(f"a.json, record {record}" in reason and word in reason for reason in reasons), (record, reasons)

    strict = Quarantine(tmp_path / "strict.jsonl", max_bad_fraction=0.01)
    with pytest.raises(CafeError, match="records are bad"):
        for number in range(20):
            strict.record(batches[number])


def test_a_text_cut_within_a_character_is_a_bad_record(chat_processor, scenes, tmp_path):
    records = json.loads((scenes / "llava_train.json").read_text())[:8]
    records[3]["conversations"][1]["value"] = "a \ud83d"
    (tmp_path / "cut.json").write_text(json.dumps(records))
    batches = ContrastiveBatchDataset(
        [open_source(Source(path=str(tmp_path / "cut.json"), images=str(scenes)))], chat_processor, 8, 3
    )
    [bad] = batches[0].bad_records
    assert "record 3" in bad and "half of a character" in bad and len(batches[0].record_names) == 7


def test_all_bad_from_the_start_stops_a_run_and_one_bad_record_does_not(tmp_path):
    def batch(bad, good):
        empty = torch.empty(0, dtype=torch.long)
        return Batch([], empty, empty, torch.empty(0), empty, 0, ["broken"] * bad, ["fine"] * good)

    quarantine = Quarantine(tmp_path / "one.jsonl", max_bad_fraction=0.5)
    for bad, good in ((0, 1), (1, 0), (1, 0)):
        quarantine.record(batch(bad, good))
    with pytest.raises(CafeError, match="All of the first 9 records are bad"):
        for _ in range(3):
            Quarantine(tmp_path / "all.jsonl", max_bad_fraction=0.5).record(batch(9, 0))


def test_data_without_what_is_trained_is_one_sentence(chat_processor, scenes):
    source = open_source(Source(path=str(scenes / "vqa_train.json"), use_pairs=False))
    with pytest.raises(CafeError, match="None of the first 48 records holds a pair"):
        ContrastiveBatchDataset([source], chat_processor, batch_size=8, seed=0, language=False)


def test_too_little_data_is_one_sentence(chat_processor, scenes):
    with pytest.raises(CafeError, match="48 records, fewer than one batch of 64"):
        ContrastiveBatchDataset(
            [open_source(Source(path=str(scenes / "llava_train.json")))], chat_processor, batch_size=64, seed=0
        )


class Dies(ContrastiveBatchDataset):
    """Kills the worker that makes batch 2, as often as there are files to remove."""

    lives: Path

    def __getitem__(self, number: int) -> Batch:
        if number == 2 and get_worker_info() and (lives := sorted(self.lives.iterdir())):
            lives[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_dies_is_replaced_but_not_again_at_once(chat_processor, scenes, tmp_path, deaths):
    batches = Dies([open_source(Source(path=str(scenes / "llava_train.json")))], chat_processor, batch_size=8, seed=3)
    batches.lives = tmp_path
    for number in range(deaths):
        (tmp_path / str(number)).touch()
    said: list[str] = []
    state = torch.get_rng_state()
    stream = iterate_batches(batches, 0, 4, 1, said.append)
    if deaths == 2:
        with pytest.raises(CafeError, match="workers died twice around batch"):
            list(stream)
        return
    expected = [
        batch.record_names for batch in iterate_batches(make(chat_processor, scenes / "llava_train.json"), 0, 4, 0)
    ]
    assert [batch.record_names for batch in stream] == expected
    assert len(said) == 1 and "died around batch" in said[0]
    assert torch.equal(state, torch.get_rng_state())  # a loader that is made anew draws nothing of the run's


def test_the_quarantine_forgets_what_came_after_the_saved_step(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    file.write_text('{"reason": "one"}\n{"reason": "two"}\n{"reas')
    quarantine = Quarantine(file, 0.5, num_bad=1, num_records=10)
    assert file.read_text() == '{"reason": "one"}\n' and (quarantine.num_bad, quarantine.num_records) == (1, 10)
