"""Loader workers are forked, also where Python would start processes in another way."""

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
from torch.utils.data import Dataset

from cafe.data.inspection import inspect
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.mining.config import MiningConfig
from cafe.mining.embed import Examples, embed_pairs
from cafe.mining.judge import filter_by_judge
from cafe.model import Cafe
from cafe.scenes.base import train_base
from cafe.utils.dataloader import make_loader


@pytest.fixture(autouse=True)
def forkserver() -> Iterator[None]:
    """Set Python 3.14's default on Linux."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_keeps_the_order_of_a_dataset_that_cannot_be_pickled(workers):
    class Squares(Dataset[int]):
        def __getitem__(self, index: int) -> int:
            return index**2

    assert list(make_loader(Squares(), [3, 1, 2], workers)) == [9, 1, 4]


WAITS = """
import os, sys, time
from torch.utils.data import Dataset
from cafe.utils.dataloader import make_loader

class Waits(Dataset):
    def __getitem__(self, index):
        print(os.getpid(), flush=True)
        time.sleep(600)

next(iter(make_loader(Waits(), [0, 1], 2)))
"""


def test_workers_that_wait_end_when_their_parent_is_killed():
    run = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE, text=True)
    workers = [int(run.stdout.readline()) for _ in range(2)]
    run.kill()
    run.wait()
    deadline = time.monotonic() + 30
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))


def is_running(pid: int) -> bool:
    """Whether a process is there that has not ended, also where nobody has waited for it."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_inspection_mining_and_base_model_load_with_workers(random_base, scenes, tmp_path):
    model = Cafe.load(random_base)
    records = open_source(Source(path=str(scenes / "llava_train.json")))
    [report] = inspect([records], model.chat_processor, sample=2, workers=1)
    assert len(report.stats) == 2
    examples, mining = Examples([records], 0), MiningConfig(workers=1)
    embedded = embed_pairs(model, examples, [(0, 0), (0, 1)], mining)
    assert list(map(len, filter_by_judge(model, examples, embedded, [[1], [0]], mining, threshold=1.1))) == [1, 1]
    train_base(tmp_path / "base", steps=1, batch=2, workers=1, report=lambda line: None)
