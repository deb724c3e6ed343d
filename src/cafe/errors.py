"""The one error a user's mistake raises: its message is a full sentence that names the file, record or field."""


class CafeError(Exception):
    """Wrong input. The command line prints the message alone and exits with status 1."""


class Stopped(Exception):
    """A run was asked to stop by a signal, and has saved where it stands. The command exits with 128 + the signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
