"""Bad records are written down, and too many of them stop a run."""

import json

import pytest
import torch

from cafe.data.batch import Batch
from cafe.data.quarantine import Quarantine
from cafe.errors import CafeError


def test_bad_records_are_quarantined_and_too_many_stop_the_run(llava_dataset, scenes, tmp_path):
    rows = json.loads((scenes / "llava_train.json").read_text())[:16]
    (tmp_path / "damaged.png").write_bytes(b"no image")
    rows[3]["image"], rows[5]["image"] = "damaged.png", "missing.png"
    for row in rows:
        if not row["image"].endswith(("damaged.png", "missing.png")):
            row["image"] = str(scenes / row["image"])
    rows[7]["conversations"][1]["value"] = " "
    (tmp_path / "a.json").write_text(json.dumps(rows))
    batches = llava_dataset(tmp_path / "a.json")
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


def test_a_run_stops_if_all_first_records_are_bad(tmp_path):
    def batch(bad, good):
        empty = torch.empty(0, dtype=torch.long)
        return Batch([], empty, empty, empty, torch.empty(0), empty, 0, ["broken"] * bad, ["fine"] * good)

    quarantine = Quarantine(tmp_path / "one.jsonl", max_bad_fraction=0.5)
    for bad, good in ((0, 1), (1, 0), (1, 0)):
        quarantine.record(batch(bad, good))
    with pytest.raises(CafeError, match="All of the first 9 records are bad"):
        for _ in range(3):
            Quarantine(tmp_path / "all.jsonl", max_bad_fraction=0.5).record(batch(9, 0))


def test_resume_drops_quarantined_records_after_the_saved_step(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    file.write_text('{"reason": "one"}\n{"reason": "two"}\n{"reas')
    quarantine = Quarantine(file, 0.5, num_bad=1, num_records=10)
    assert file.read_text() == '{"reason": "one"}\n' and (quarantine.num_bad, quarantine.num_records) == (1, 10)
