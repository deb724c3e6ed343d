"""What workers are asked to do in tests: jobs that return something, and jobs that end or hang their process."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from cafe.errors import RecordError


def echo(chat_processor: Any, value: Any) -> Any:
    return value


def process_id(chat_processor: Any) -> int:
    return os.getpid()


def end(chat_processor: Any, status: int) -> None:
    os._exit(status)


def kill(chat_processor: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def spin(chat_processor: Any) -> None:
    """Never end, and let no signal handler of Python's run, like a decoder's endless loop."""
    sum(iter(int, 1))


def eat(chat_processor: Any) -> int:
    """Take memory without end."""
    return len(bytearray(2**50))


def fail(chat_processor: Any) -> None:
    raise KeyError("a secret")


def wait_for(chat_processor: Any, begun: Path, path: Path) -> None:
    """Say that it has begun, and wait until there is something at a path."""
    begun.touch()
    while not path.exists():
        time.sleep(0.01)


def refuse(chat_processor: Any) -> None:
    raise RecordError("It has 16 x 16 pixels.")


def give_lambda(chat_processor: Any) -> Any:
    return lambda: None


class Trap:
    """Raise an error where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def give_trap(chat_processor: Any) -> Trap:
    return Trap()


def size_of_page(chat_processor: Any, path: str, page: int) -> tuple[int, int]:
    from cafe.index.pixels import load_image  # takes a second, which only this job has

    return load_image(f"{path}#page={page}", path, page, ()).size
