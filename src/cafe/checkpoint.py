"""What a checkpoint records about itself, where a model is found, and the fingerprint of its answers."""

import hashlib
import json
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from cafe.errors import CheckpointError, RecipeError
from cafe.lvlm.hub import ensure_exists, find_file, looks_like_path
from cafe.lvlm.prompts import RENAMED_PROMPTS, Prompts
from cafe.utils.hashing import iter_tensor_bytes
from cafe.utils.schema import Schema
from cafe.utils.text import format_value

METADATA_FILE = "cafe.json"  # what a checkpoint records about itself, beside the Hugging Face files

# What a checkpoint of ours records, and of which type; whoever saves one may add to it.
METADATA_FIELDS: dict[str, tuple[Any, str]] = {
    "prompts": (dict, "a mapping"),
    "temperature": ((int, float), "a number"),
    "recipe": (dict, "a mapping"),
    "results": (dict, "a mapping"),
    "versions": (dict, "a mapping"),
}


def checkpoint_dir(run: Path) -> Path:
    """Return the checkpoint of a run, given the run's output directory or the checkpoint itself."""
    inner = run / "checkpoint"
    return inner if inner.is_dir() else run


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read a local checkpoint's metadata; empty if it has none.

    Raises:
        CheckpointError: it is damaged.
    """
    file = Path(path) / METADATA_FILE
    try:
        metadata = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except RecursionError:
        raise CheckpointError(f"The checkpoint's {file} is nested too deeply.") from None
    except ValueError as error:
        raise CheckpointError(f"The checkpoint's {file} is not valid JSON: {error}.") from None
    if not isinstance(metadata, dict):
        raise CheckpointError(f"The checkpoint's {file} is not a mapping of names to values.")
    for name, (kind, description) in METADATA_FIELDS.items():
        if name in metadata and not isinstance(metadata[name], kind):
            value = format_value(metadata[name])
            raise CheckpointError(
                f"The checkpoint's {file} cannot be used: {name} should be {description}, not {value}."
            )
    return metadata


def load_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata of a local checkpoint or of one on the Hub; empty if it has none.

    Raises:
        CheckpointError: it is damaged, or there is no such checkpoint.
    """
    if Path(path).exists():
        return read_metadata(path)
    ensure_exists(path)
    try:
        file = find_file(path, METADATA_FILE)  # a model on the Hub need not have it
    except OSError:  # there is no such repository, which loading the model reports
        return {}
    if file is None:
        return {}
    return read_metadata(file.parent)


def prompts_from_metadata(metadata: dict[str, Any]) -> Prompts:
    """Return the prompts that a checkpoint was trained with; the published ones if it does not say.

    Raises:
        CheckpointError: they have a field that this version does not know, or a value that is none.
    """
    schema = Schema(f"the checkpoint's {METADATA_FILE}", {Prompts: RENAMED_PROMPTS})
    try:
        prompts: Prompts = schema.build(Prompts, metadata.get("prompts", {}), "prompts.")
    except RecipeError as error:
        raise CheckpointError(f"This version does not know the prompts of {error}") from None
    return prompts


def ensure_overwritable(path: Path) -> None:
    """Make sure that writing a checkpoint replaces nothing but a checkpoint.

    Raises:
        CheckpointError: there is something else at the path.
    """
    # An empty directory, and one with an older checkpoint, may be replaced.
    is_other_directory = path.is_dir() and any(path.iterdir()) and not (path / METADATA_FILE).is_file()
    if path.is_file() or is_other_directory:
        raise CheckpointError(f"{path} holds something that is not a checkpoint of cafe; nothing was written.")


def fingerprint(model: PreTrainedModel, *parts: Any) -> str:
    """Compute a digest of a model's weights, precision and device, and of whatever else decides its answers."""
    settings = (model.dtype, model.device.type, *parts, version("transformers"))
    digest = hashlib.sha256("\n".join(map(str, settings)).encode())
    for chunk in iter_tensor_bytes(model.state_dict().items()):
        digest.update(chunk)
    return digest.hexdigest()[:32]


def resolve_checkpoint(base: str) -> str:
    """Find a model by what a user calls it.

    Args:
        base: the name of a model that an installed package ships and registers as an entry point of the group
            `cafe.base_models` (this one registers "scenes"), a directory, a run's output directory, or a Hub id.

    Returns:
        A local directory, or the Hub id unchanged.

    Raises:
        CheckpointError: there is no such directory, and it cannot be a Hub id.
    """
    # A name that a package registers comes first, so that "scenes" is never taken for a directory.
    for shipped in entry_points(group="cafe.base_models", name=base):
        return str(shipped.load())
    path = Path(base).expanduser()
    if path.is_dir():
        return str(checkpoint_dir(path))
    # What is left could only be a Hub id; whether there is one, loading finds out.
    if looks_like_path(base):
        raise CheckpointError(f"The model's directory {base} does not exist.")
    return base


def shipped_name(path: Path) -> str:
    """Return the name of a model that an installed package ships, such as "scenes", by its directory; empty if none."""
    for shipped in entry_points(group="cafe.base_models"):
        if Path(shipped.load()) == path:
            return shipped.name
    return ""
