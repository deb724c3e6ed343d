"""The memory of a process on its device: how much a step takes, and giving it back."""

import gc
import re
from pathlib import Path

import torch
from torch import nn

from cafe.errors import RecipeError


class MemoryMeter:
    """Measures a process's memory in bytes: the GPU allocator's count, or on a CPU what Linux reports.

    Raises:
        RecipeError: there is neither.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        can_measure = self.cuda or Path("/proc/self/clear_refs").exists()
        if not can_measure:
            raise RecipeError(
                "micro_batch: auto needs a GPU or Linux, to measure memory: set micro_batch.tokens instead."
            )

    def used(self) -> float:
        """Return what is in use now."""
        if self.cuda:
            return float(torch.cuda.memory_allocated())
        return _read_proc_kib("/proc/self/status", "VmRSS")

    def free(self) -> float:
        """Return what could be used in addition."""
        if self.cuda:
            # What the allocator holds and no tensor uses is free too.
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            return float(torch.cuda.mem_get_info()[0] + unused)
        # Loader workers and other programs take from it as well.
        return _read_proc_kib("/proc/meminfo", "MemAvailable")

    def reset(self) -> None:
        """Start a new peak."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: see proc(5)

    def peak(self) -> float:
        """Return the most that was in use since `reset`."""
        if self.cuda:
            return float(torch.cuda.max_memory_allocated())
        return _read_proc_kib("/proc/self/status", "VmHWM")


def free_step_memory(module: nn.Module) -> None:
    """Free the gradients of a step and whatever else it left."""
    module.zero_grad()
    gc.collect()  # graphs of a failed step may be in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _read_proc_kib(file: str, name: str) -> float:
    """Read a size in KiB from a file of Linux's `/proc`, in bytes."""
    line = re.search(rf"{name}:\s+(\d+) kB", Path(file).read_text())
    if line is None:
        return 0.0
    return float(line[1]) * 1024
