"""The command `cafe`: its groups, how errors are printed, and the exit status.

A user's mistake is printed in one line, without a traceback. A command whose output is no longer read (`| head`) ends
quietly. Commands import what they call when they run, so that `cafe --help` does not wait for PyTorch.
"""

import contextlib
import ctypes
import os
import select
import sys
from collections.abc import Sequence
from typing import TextIO

import click

from cafe.cli.data import data_group, mine_command
from cafe.cli.evaluation import ablate_command, bench_modes_command, evaluate_command, report_command
from cafe.cli.index import collections_group, index_command
from cafe.cli.scenes import quickstart_command, scenes_group
from cafe.cli.search import ask_command, duplicates_command, search_command
from cafe.cli.serve import serve_command
from cafe.cli.training import merge_command, plan_command, push_command, train_command
from cafe.errors import CafeError, RunInterrupted
from cafe.utils.text import escape_controls

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's parameters, numbered as in malloc.h


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def cli() -> None:
    """One vision-language checkpoint that retrieves and talks."""


# In the order of a project; the help lists them by name.
for command in (
    train_command,
    plan_command,
    merge_command,
    push_command,
    evaluate_command,
    bench_modes_command,
    report_command,
    ablate_command,
    data_group,
    mine_command,
    index_command,
    search_command,
    ask_command,
    duplicates_command,
    collections_group,
    serve_command,
    scenes_group,
    quickstart_command,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after `cafe`; by default those of this process.

    Returns:
        The exit status: 0, or 1 for a user's mistake, 2 for a wrong command line, 128 + the signal for an interrupted
        run, which can be resumed, or for output that nobody reads.
    """
    _tune_malloc()
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = _run_command(words)
        if sys.stdout:  # not closed from the start
            sys.stdout.flush()  # here and not at the end of the process, where Python prints what goes wrong
        return status
    except CafeError as error:
        return _fail(str(error), 1)
    except BrokenPipeError:
        if not _silence_closed_pipes():  # another pipe, such as that of a worker
            raise
        return 141  # 128 + SIGPIPE, as shells report it
    except RunInterrupted as error:
        return _fail(str(error), 128 + error.signal)
    except KeyboardInterrupt:
        return _fail("stopped.", 130)  # 128 + SIGINT, as shells report it
    except OSError as error:
        if error.filename is None:  # not about a path, so not a user's mistake
            raise
        return _fail(f"{error.filename} cannot be used: {error.strerror}.", 1)


def _run_command(words: list[str]) -> int:
    """Parse a command line and run its command."""
    # Not `cli.main`, which takes an EOFError, of a truncated file for example, for the end of the user's input.
    try:
        with cli.make_context("cafe", words) as context:
            cli.invoke(context)
    except click.exceptions.Exit as request:  # after --help
        return request.exit_code
    except click.Abort:  # a question was not answered
        return _fail("stopped.", 1)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return 0


def _silence_closed_pipes() -> bool:
    """Discard what is still to be written to an output whose reader has gone; return whether there is one."""
    closed = [stream for stream in (sys.stdout, sys.stderr) if stream and _is_closed_pipe(stream)]
    for stream in closed:
        # What is buffered is written once more when the process ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    return bool(closed)


def _is_closed_pipe(stream: TextIO) -> bool:
    """Tell whether nobody reads what is written to a stream."""
    with contextlib.suppress(OSError, ValueError):  # not a file, as in a notebook
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # errors are always reported
        return bool(poll.poll(0))
    return False


def _fail(message: str, status: int) -> int:
    """Print an error and return the exit status."""
    printed = escape_controls(message, keep="\n")  # messages quote records, which are strangers' words
    with contextlib.suppress(BrokenPipeError):
        print(f"cafe: {printed}", file=sys.stderr)
    return status


def _tune_malloc() -> None:
    """Keep the memory of freed tensors in this process; by default glibc returns it, and each step pages it in anew."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system or another allocator
        libc = ctypes.CDLL(None)
        # 1 GiB: smaller blocks are cut from the heap, and the heap shrinks only if more than that is free at its top.
        for option in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            libc.mallopt(option, 2**30)


if __name__ == "__main__":
    sys.exit(main())
