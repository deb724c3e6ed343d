"""What a GPU spends the time of some work on: its kernels by name, and the share of the time that any of them runs.

Without a GPU, PyTorch's operators stand for kernels.
"""

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import clock
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NAME_LENGTH = 80  # characters: names of kernels are C++ templates
NO_KERNEL = "Context Sync"  # an event of the device that is none


@dataclass(frozen=True)
class Timing:
    """Hold what some work took.

    Attributes:
        seconds: the median, without the profiler.
        kernels: the seconds of each kernel by name, most first; empty where the profiler sees none.
        num_alloc_retries: how often the allocator gave memory back to the GPU and asked again.
    """

    seconds: float
    kernels: dict[str, float]
    num_alloc_retries: int

    @property
    def busy_share(self) -> float:
        """Return the sum of the kernels' time over the time of the work."""
        return sum(self.kernels.values()) / self.seconds

    def top(self, count: int) -> list[str]:
        """Name the kernels that take the most time, each with its share of the time of all."""
        total = sum(self.kernels.values())
        return [f"{name[:NAME_LENGTH]} {seconds / total:.0%}" for name, seconds in list(self.kernels.items())[:count]]


def measure(work: Callable[[], object], repetitions: int = 5) -> Timing:
    """Time some work that has run before, and profile it once."""
    retries = num_alloc_retries()
    seconds = statistics.median(clock(work) for _ in range(repetitions))
    retries = num_alloc_retries() - retries
    return Timing(seconds, profile_kernels(work), retries)


def profile_kernels(work: Callable[[], object]) -> dict[str, float]:
    """Return the seconds that each kernel of some work takes, by name, most first."""
    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        clock(work)  # waits for the GPU
    microseconds: Counter[str] = Counter()
    for event in profiler.events():
        if not on_gpu:
            microseconds[event.name] += event.self_cpu_time_total
        elif event.device_type == DeviceType.CUDA and event.name != NO_KERNEL:
            microseconds[event.name] += event.time_range.elapsed_us()
    return {name: time / 1e6 for name, time in microseconds.most_common()}


def num_alloc_retries() -> int:
    """Read how often the allocator has asked again since the process began."""
    return int(torch.cuda.memory_stats()["num_alloc_retries"]) if torch.cuda.is_available() else 0
