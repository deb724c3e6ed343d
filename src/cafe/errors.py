"""The errors a user's mistake raises: each message is a full sentence that names the file, record or field."""

from pathlib import Path

MAX_REASON = 300  # characters of another library's message


class CafeError(Exception):
    """Report a user's mistake. The command line prints the message alone and exits with status 1."""


class RecordError(CafeError):
    """Report a bad record: a field, an image or a length that cannot be used. Training skips it and counts it."""


class RecipeError(CafeError):
    """Report a wrong recipe, option or argument: an unknown name, a value out of range, conflicting settings."""


class MissingPackageError(CafeError):
    """Report a feature that needs a package which is not installed; the message has the pip command."""


class CheckpointError(CafeError):
    """Report a model, checkpoint or saved state that is missing, damaged or does not fit."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_error(what: str, name: str | Path, error: Exception) -> CheckpointError:
    """Make the error of a model that cannot be loaded by its name, which may be a directory or a Hub id.

    Args:
        what: the kind of thing that was to be loaded.
        name: the directory or Hub id.
        error: what went wrong.
    """
    reason = first_line(error)[:MAX_REASON]
    if isinstance(error, LookupError) and str(error):  # a KeyError has nothing but the key
        reason = f"{type(error).__name__} {reason}"
    if Path(name).is_dir():
        return CheckpointError(f"No {what} can be loaded from {name}: {reason}")
    return CheckpointError(
        f"There is no directory {name}, and the Hugging Face Hub has no {what} of that name: {reason}"
    )


class RunInterrupted(Exception):
    """Stop a run that a signal interrupted, after its state was saved. The command exits with 128 + the signal."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
