"""Find out whether a model's name leads somewhere, before its files are asked for one by one.

The Hub's client tries each request several times. Where the network is down, or a name is mistyped, that adds up to
minutes before the first error.
"""

import difflib
import os
from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError
from transformers.utils import cached_file

from cafe.errors import CheckpointError, first_line

TIMEOUT = 5  # seconds that the Hub may take to answer
CONFIG_FILES = ("config.json", "adapter_config.json")  # a model has the first, an adapter the second
# Beside a model's name, these tell that a folder holds runs and checkpoints.
OWN_FILES = ("run.json", "cafe.json")


def ensure_exists(name: str | Path) -> None:
    """Make sure that a name is that of a directory, or of a model in the Hub's cache or on the Hub.

    Raises:
        CheckpointError: it is not, or the Hub could not be reached.
    """
    name = str(name)
    # Unlike `Path.is_dir`, this takes a name that is too long for a directory.
    if os.path.isdir(name) or _is_cached(name):
        return
    missing = f"There is no directory {name}{_suggest(name)}"
    if looks_like_path(name) or _is_among_runs(name):
        raise CheckpointError(f"{missing}.")
    if constants.is_offline_mode():
        raise CheckpointError(
            f"{missing}, the Hub's cache holds no model of that name, and HF_HUB_OFFLINE forbids asking the Hub."
        )
    try:
        HfApi().model_info(name, timeout=TIMEOUT)
    except GatedRepoError:
        return  # loading says what to do
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(f"{missing}, and the Hugging Face Hub has no model of that name.") from None
    except (HTTPError, OSError) as error:
        reason = first_line(error)
        raise CheckpointError(f"{missing}, and the Hugging Face Hub could not be reached: {reason}") from None


def looks_like_path(name: str) -> bool:
    """Tell whether a name can only be a path: a Hub id is "name" or "owner/name"."""
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1


def find_file(name: str | Path, file: str) -> Path | None:
    """Return the path of a file in a directory or under a Hub id, from where it is downloaded; None if it has none.

    Where the Hub cannot be reached, what is not in its cache is not there.

    Raises:
        OSError: there is no such model on the Hub.
    """
    if os.path.isdir(name):
        path = Path(name) / file
        return path if path.is_file() else None
    tolerated = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    downloaded = cached_file(str(name), file, **tolerated)
    return None if downloaded is None else Path(downloaded)


def _is_cached(name: str) -> bool:
    """Tell whether the Hub's cache holds a model's or an adapter's configuration."""
    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in CONFIG_FILES)
    except HFValidationError:  # no name that the Hub could have
        return False


def _is_among_runs(name: str) -> bool:
    """Tell whether a name's folder holds runs or checkpoints of ours, so that the name can only be a path."""
    folder = Path(name).parent
    if folder == Path() or not os.path.isdir(folder):
        return False
    return any(next(folder.glob(f"*/{file}"), None) for file in OWN_FILES)


def _suggest(name: str) -> str:
    """Return a question with the nearest name beside a missing directory, or nothing."""
    folder = Path(name).parent
    if folder == Path() or not os.path.isdir(folder):
        return ""
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    nearest = difflib.get_close_matches(Path(name).name, names, n=1)
    if not nearest:
        return ""
    return f" (did you mean {folder / nearest[0]}?)"
