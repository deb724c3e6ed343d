"""What a checkpoint says about itself, where a model is found, and the fingerprint of its answers."""

import hashlib
import json
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from cafe.errors import CafeError
from cafe.lvlm.prompts import Prompts

METADATA_FILE = "cafe.json"  # what a checkpoint tells about itself, beside the Hugging Face files


def checkpoint_dir(run: Path) -> Path:
    """The checkpoint of a run, given the run's output directory or the checkpoint itself."""
    return run / "checkpoint" if (run / "checkpoint").is_dir() else run


def read_metadata(path: str | Path) -> dict[str, Any]:
    """A local checkpoint's own record; empty where there is none.

    Raises:
        CafeError: it is damaged.
    """
    file = Path(path) / METADATA_FILE
    try:
        record = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise CafeError(f"The checkpoint's {file} is not valid JSON: {error}.") from None
    if not isinstance(record, dict):
        raise CafeError(f"The checkpoint's {file} is not a mapping of names to values.")
    return record


def prompts_from_metadata(record: dict[str, Any]) -> Prompts:
    """Those that a checkpoint's record tells of; the published ones where it tells of none.

    Raises:
        CafeError: it tells of what this version does not know.
    """
    try:
        return Prompts(**record.get("prompts", {}))
    except TypeError as error:
        raise CafeError(
            f"This version does not know the prompts of the checkpoint's {METADATA_FILE}: {error}."
        ) from None


def ensure_overwritable(path: Path) -> None:
    """Makes sure that writing a checkpoint takes the place of nothing else.

    Raises:
        CafeError: there is something at the path that is not a checkpoint.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / METADATA_FILE).is_file()):
        raise CafeError(f"{path} holds something that is no checkpoint of cafe, and is left as it is.")


def _metadata_of(path: str | Path) -> dict[str, Any]:
    """The record of a local checkpoint, or of one on the Hub."""
    if Path(path).exists():
        return read_metadata(path)
    missing = {f"_raise_exceptions_for_{reason}": False for reason in ("missing_entries", "connection_errors")}
    try:
        file = cached_file(str(path), METADATA_FILE, **missing)
    except OSError:  # no such repository: the model will not be found either, and says so
        return {}
    return read_metadata(Path(file).parent) if file else {}


def fingerprint(model: PreTrainedModel, *parts: Any) -> str:
    """A digest of a model's weights, precision and device, and of whatever else decides its answers."""
    made_of = (model.dtype, model.device.type, *parts, version("transformers"))
    digest = hashlib.sha256("\n".join(map(str, made_of)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def resolve_checkpoint(base: str) -> str:
    """Find a model by what a user calls it.

    Args:
        base: the name of a model that an installed package ships and registers as an entry point of the group
            `cafe.base_models` (this one registers "scenes"), a directory, a run's output directory, or a Hub id.

    Returns:
        A local directory, or the Hub id as it is given.

    Raises:
        CafeError: it can be no Hub id, and no directory is there.
    """
    for shipped in entry_points(group="cafe.base_models", name=base):
        return str(shipped.load())
    path = Path(base).expanduser()
    if path.is_dir():
        return str(checkpoint_dir(path))
    if base.startswith(("/", "./", "../", "~")) or base.count("/") > 1:
        raise CafeError(f"The model's directory {base} does not exist.")
    return base
