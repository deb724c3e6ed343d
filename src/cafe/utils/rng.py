"""Save, restore and replay the states of the random number generators that training draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def get_rng_state() -> dict[str, Any]:
    """Return the state of every random number generator: Python's, NumPy's, and PyTorch's on the CPU and the GPU."""
    numpy_state: Any = np.random.get_state()
    name, keys, *rest = numpy_state
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),  # plain numbers, which a checkpoint holds without pickle
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set every generator to the state that `get_rng_state` returned."""
    name, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def get_device_rng_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return PyTorch's generator state on the CPU and, if `device` is a GPU, on it: what a forward pass draws from."""
    if device.type != "cuda":
        return torch.get_rng_state(), None
    return torch.get_rng_state(), torch.cuda.get_rng_state(device)


@contextmanager
def replay_rng(state: tuple[Tensor, Tensor | None], device: torch.device) -> Iterator[None]:
    """Draw the random numbers that were drawn after `state`, and restore the generators afterwards."""
    cpu_state, cuda_state = state
    # The CPU's generator is always forked; without a list it would be those of all GPUs too.
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.set_rng_state(cpu_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state(cuda_state, device)
        yield
