"""Workers make batches ahead, and are restarted when one dies."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

from cafe.data.batch import Batch
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.loader import is_worker_crash, iterate_batches
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import CafeError


def test_the_order_depends_on_the_seed_and_not_on_workers(llava_dataset):
    batches = llava_dataset()
    alone = [batch.record_names for batch in iterate_batches(batches, 0, 8, 0)]
    with_workers = [batch.record_names for batch in iterate_batches(batches, 0, 8, 2)]
    assert alone == with_workers
    assert sorted(name for batch in alone[:6] for name in batch) == sorted(set(name for b in alone[:6] for name in b))
    assert alone[:2] != alone[6:8]  # the second epoch has its own order


def test_no_worker_waits_for_a_pipe_or_a_device(llava_dataset, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a square"}]
    names = ["pipe.png", "/dev/zero", "/dev/tty", "folder.png", "good.png"]
    (tmp_path / "a.json").write_text(json.dumps([{"image": name, "conversations": turns} for name in names]))
    [batch] = iterate_batches(llava_dataset(tmp_path / "a.json", batch_size=5), 0, 1, 1)
    assert len(batch.record_names) == 1 and len(batch.bad_records) == 4
    assert sum("a pipe or a device, not a regular file" in reason for reason in batch.bad_records) == 3


class Dies(ContrastiveBatchDataset):
    """Kills the worker that makes batch 2, as often as there are files to remove."""

    lives: Path

    def __getitem__(self, number: int) -> Batch:
        if number == 2 and get_worker_info() and (lives := sorted(self.lives.iterdir())):
            lives[0].unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_worker_that_dies_is_restarted_but_not_twice_in_succession(
    chat_processor, llava_dataset, scenes, tmp_path, deaths
):
    batches = Dies([open_source(Source(path=str(scenes / "llava_train.json")))], chat_processor, batch_size=8, seed=3)
    batches.lives = tmp_path
    for number in range(deaths):
        (tmp_path / str(number)).touch()
    lines: list[str] = []
    state = torch.get_rng_state()
    stream = iterate_batches(batches, 0, 4, 1, lines.append)
    if deaths == 2:
        with pytest.raises(CafeError, match="workers died twice near batch"):
            list(stream)
        return
    expected = [batch.record_names for batch in iterate_batches(llava_dataset(), 0, 4, 0)]
    assert [batch.record_names for batch in stream] == expected
    assert len(lines) == 1 and "died near batch" in lines[0]
    assert torch.equal(state, torch.get_rng_state())  # restarting draws none of the run's random numbers


@pytest.mark.parametrize(
    ("error", "is_crash"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), True),
        (RuntimeError("Pin memory thread exited unexpectedly"), True),  # on a GPU, it fetches the tensors
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."), False),
    ],
)
def test_a_dead_worker_is_told_from_an_error(error, is_crash):
    assert is_worker_crash(error) == is_crash
