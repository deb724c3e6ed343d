"""`cafe serve` in a process of its own, and the memory of that process and of those that it starts."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SECONDS_TO_START, SECONDS_TO_STOP = 120, 60


@dataclass(frozen=True)
class Server:
    """Hold a running server.

    Attributes:
        pid: of the process that serves.
        host, port: where it listens.
        log: the file of what it writes.
    """

    pid: int
    host: str
    port: int
    log: Path

    def memory(self) -> tuple[int, int]:
        """Return the bytes of all of its processes: resident, and with what processes share divided between them."""
        resident = shared = 0
        for pid in self.process_ids():
            try:
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it has ended
                continue
            sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines[1:])}
            resident += sizes["Rss"]
            shared += sizes["Pss"]
        return resident, shared

    def process_ids(self) -> list[int]:
        """Return the ids of the process and of those that it started."""
        try:
            process = psutil.Process(self.pid)
            return [self.pid, *(child.pid for child in process.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def cpu_seconds(self) -> float:
        """Return the CPU time of all of its processes."""
        seconds = 0.0
        for pid in self.process_ids():
            try:
                times = psutil.Process(pid).cpu_times()
            except psutil.NoSuchProcess:
                continue
            seconds += times.user + times.system
        return seconds


@contextmanager
def serve(model: str, *options: str, threads: int | None = None) -> Iterator[Server]:
    """Start a server on a free port and end it as an operator would.

    Args:
        model: a checkpoint.
        options: of `cafe serve`.
        threads: of PyTorch in the server; by default as many as it takes.

    Raises:
        RuntimeError: it does not start, or does not end well.
    """
    environment = dict(os.environ)
    # What the server prints is read from a file while it runs.
    environment["PYTHONUNBUFFERED"] = "1"
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        command = [sys.executable, "-m", "cafe", "serve", "--model", model, "--port", "0", *options]
        # A file, because a pipe that nobody reads would fill up and hold the server.
        with log.open("wb") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            host, port = _wait_until_ready(process, log)
            yield Server(process.pid, host, port, log)
            process.send_signal(signal.SIGTERM)
            if process.wait(SECONDS_TO_STOP) not in (0, -signal.SIGTERM):
                raise RuntimeError(f"The server ended with {process.returncode}:\n{_tail(log)}")
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(process: "subprocess.Popen[bytes]", log: Path) -> tuple[str, int]:
    """Wait for the line that says where a server listens."""
    deadline = time.monotonic() + SECONDS_TO_START
    while process.poll() is None and time.monotonic() < deadline:
        if match := re.search(r"Serving on http://([\w.:\[\]]+):(\d+)", log.read_text(errors="replace")):
            return match[1], int(match[2])
        time.sleep(0.05)
    raise RuntimeError(f"The server does not start:\n{_tail(log)}")


def _tail(log: Path) -> str:
    """Return the end of a log."""
    return log.read_text(errors="replace")[-3000:]


@dataclass
class MemorySamples:
    """Hold the memory of servers over time, in bytes: resident, and with what processes share divided between them."""

    times: list[float] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)
    shared: list[int] = field(default_factory=list)

    def mean_of_third(self, number: int) -> float:
        """Return the mean of the resident memory in a third of the time: 0, 1 or 2."""
        span = (self.times[-1] - self.times[0]) / 3
        begin = self.times[0] + number * span
        inside = [size for at, size in zip(self.times, self.resident, strict=True) if begin <= at <= begin + span]
        return sum(inside) / len(inside)


@contextmanager
def sample_memory(*servers: Server, interval: float) -> Iterator[MemorySamples]:
    """Measure the memory of servers together while a block runs, every so many seconds."""
    samples, done = MemorySamples(), threading.Event()

    def sample() -> None:
        """Measure until the block ends."""
        while not done.wait(interval):
            sizes = [server.memory() for server in servers]
            samples.times.append(time.perf_counter())
            samples.resident.append(sum(resident for resident, _ in sizes))
            samples.shared.append(sum(shared for _, shared in sizes))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()
