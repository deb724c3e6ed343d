"""Examples become batches of micro-batches."""

import json
from dataclasses import fields, is_dataclass

import torch

from cafe.data.batch import MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source


def test_a_batch_holds_every_branch(llava_dataset):
    batch = llava_dataset()[0]
    (micro_batch,) = batch.micro_batches
    assert micro_batch.embedding_only is micro_batch.joint
    assert len(micro_batch.joint.inputs["pixel_values"]) == 8  # every image once
    assert len(batch.negative_owner) >= 16
    assert sorted(micro_batch.embedding_slots.tolist()) == list(range(16 + len(batch.negative_owner)))
    assert batch.num_supervised == len(micro_batch.joint.labels) > 0
    assert llava_dataset(hard_negatives=False)[0].negative_owner.tolist() == []
    [language_alone] = llava_dataset(contrast=False)[0].micro_batches
    assert language_alone.embedding_slots.tolist() == []
    assert llava_dataset(language=False)[0].num_supervised == 0


def test_micro_batches_respect_their_size_and_hold_everything(llava_dataset):
    whole = llava_dataset()[0]
    [whole_micro_batch] = whole.micro_batches
    for size in (MicroBatchSize(tokens=700), MicroBatchSize(crops=5), MicroBatchSize(tokens=1)):
        batch = llava_dataset(micro_batch_size=size)[0]
        num_slots = [len(part.embedding_slots) for part in batch.micro_batches]
        assert sum(num_slots) == len(whole_micro_batch.embedding_slots)
        assert batch.num_supervised == whole.num_supervised
        assert batch.micro_batches[0].embedding_only is batch.micro_batches[0].joint  # read once
        images = [part.joint.inputs["pixel_values"] for part in batch.micro_batches]
        assert sum(map(len, images)) == 8
        if size.tokens == 1:
            assert len(batch.micro_batches) == 8
        elif size.tokens:
            assert all(part.joint.num_tokens <= size.tokens for part in batch.micro_batches)
            assert all(len(part.embedding_only.labels) == 0 for part in batch.micro_batches[1:])
        else:
            assert all(len(part) * 2 <= size.crops for part in images)


def test_pin_memory_pins_every_tensor_once(llava_dataset, monkeypatch):
    batch = llava_dataset(micro_batch_size=MicroBatchSize(crops=20))[0]
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    copy = batch.pin_memory()
    before, after = ({id(tensor): tensor for tensor in tensors(each)} for each in (batch, copy))
    assert len(batch.micro_batches) > 1 and len(before) > 10
    assert sorted(map(id, pinned)) == sorted(before) and before.keys().isdisjoint(after)
    assert all(torch.equal(one, other) for one, other in zip(before.values(), after.values(), strict=True))
    assert (copy.num_supervised, copy.record_names) == (batch.num_supervised, batch.record_names)

    (one,) = llava_dataset()[0].pin_memory().micro_batches
    assert one.embedding_only is one.joint


def tensors(value):
    """Yields the tensors in nested dataclasses, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif is_dataclass(value):
        yield from tensors([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list):
        for part in value:
            yield from tensors(part)


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
