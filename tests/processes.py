"""Processes that work together over gloo on the CPU, as a launcher starts them."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")  # imports once for all of them


def run_processes(
    work: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    error_files: list[Path],
    killed_at: Path | None = None,
) -> str:
    """Run a function in one process per error file; return the error of the first to fail.

    Each calls `work(*arguments, its environment, its error file)`. All are killed as soon as one fails, because the
    others would wait for it forever, or as soon as there is something at `killed_at`.
    """
    SERVER.set_forkserver_preload(["cafe.training.loop"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = len(error_files)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    processes = []
    for number, error_file in enumerate(error_files):
        place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(world)}
        own = {**(place | meeting if world > 1 else {}), **environment}
        error_file.unlink(missing_ok=True)
        processes.append(SERVER.Process(target=work, args=(*arguments, own, error_file)))
        processes[-1].start()
    for process in processes:
        while process.is_alive():
            process.join(0.02)
            failed = any(other.exitcode for other in processes)
            if failed or (killed_at and killed_at.exists()):
                process.kill()
    return "".join(error_file.read_text() for error_file in error_files if error_file.exists())


@contextmanager
def launched(environment: dict[str, str], error_file: Path) -> Iterator[None]:
    """Set a process's environment, and write the error that ends it to a file."""
    os.environ.update(environment)
    # The same graphs, without Inductor's kernels: these take minutes to compile, and with FSDP2 PyTorch 2.13 makes some
    # for AVX2 that give NaN. `test_compile.py` runs them.
    compile_graphs = partial(torch.compile, backend="eager")
    torch.compile = lambda forward, dynamic, options: compile_graphs(forward, dynamic=dynamic)
    try:
        yield
    except BaseException:
        error_file.write_text(traceback.format_exc())
        raise
