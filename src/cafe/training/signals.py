"""Signals that ask a run to stop (SIGTERM from a scheduler, Ctrl+C): it finishes its step and saves first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Handles signals by noting them: `signal` is the number of the last one, or 0."""

    signal = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Note a signal. A second one of the same kind ends the process at once."""
        self.signal = number
        # The default for Ctrl+C is Python's own handler, which raises KeyboardInterrupt.
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)


@contextmanager
def catch_stop_signals() -> Iterator[StopSignal]:
    """Note signals to stop within the context, instead of ending the process."""
    stop = StopSignal()
    # Python lets the main thread alone set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
