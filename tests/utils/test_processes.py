"""What processes send each other, and a script that they do not run."""

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from cafe.utils.processes import dump, restore, without_main_module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_arrive_as_they_were_sent(dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype)
    value = restore(dump({"inputs": [tensor, tensor.T], "other": np.ones(2)}))
    assert torch.equal(value["inputs"][0], tensor) and value["inputs"][0].dtype == dtype
    assert torch.equal(value["inputs"][1], tensor.T)
    value["inputs"][0][0, 0] = 1  # nobody else's memory


def test_the_users_script_is_hidden_from_new_processes_for_a_moment():
    main = sys.modules["__main__"]
    before = dict(vars(main))
    with without_main_module():
        assert main.__spec__ is None and "__file__" not in vars(main)
    assert vars(main) == before


def test_threads_that_hide_the_script_together_restore_it():
    main = sys.modules["__main__"]
    before = dict(vars(main))
    barrier = Barrier(4)

    def hide(_: int) -> None:
        barrier.wait()
        for _ in range(100):
            with without_main_module():
                assert main.__spec__ is None

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(hide, range(4)))
    assert vars(main) == before
