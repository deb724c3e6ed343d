"""The one error a user's mistake raises: its message is a full sentence that names the file, record or field."""

from pathlib import Path


class CafeError(Exception):
    """Wrong input. The command line prints the message alone and exits with status 1."""


def load_error(what: str, name: str | Path, error: Exception) -> CafeError:
    """Says that nothing can be loaded by a name, which was taken for one on the Hub if there is no such directory."""
    reason = str(error).strip().splitlines()[0]
    if Path(name).is_dir():
        return CafeError(f"No {what} can be loaded from {name}: {reason}")
    return CafeError(f"There is no directory {name}, and the Hugging Face Hub gives no {what} of that name: {reason}")


class RunInterrupted(Exception):
    """A run was asked to stop by a signal, and has saved where it stands. The command exits with 128 + the signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
