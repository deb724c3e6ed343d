"""A run that is asked to stop (SIGTERM from a scheduler, ^C from a person) ends its step and saves first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Whether this process was asked to stop: `signal` is the number of the signal, or 0."""

    signal = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Takes a signal. A second one of the same kind ends the process at once."""
        self.signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@contextmanager
def catch_stop_signals() -> Iterator[StopSignal]:
    """Within it, signals to stop are noted instead of followed. Only a process's main thread can take them."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
