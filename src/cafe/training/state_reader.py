"""Read the tensors of a saved state by PyTorch's distributed checkpoint, without running anything that a file holds.

PyTorch keeps the index of the tensors, and what is no tensor, as pickles, and loads them as such. Here both are checked
first: they may hold descriptions of tensors and plain values.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from cafe.errors import CheckpointError, first_line

INDEX = ".metadata"
# What describes tensors and where they lie in files, besides dtypes.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},  # Python 3.13
}


class StateReader(dcp.FileSystemReader):
    """Read a state's files; the index is checked before PyTorch loads it."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.index = directory / INDEX

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index of the tensors.

        Raises:
            CheckpointError: it holds anything else.
        """
        try:
            _IndexUnpickler(io.BytesIO(self.index.read_bytes())).load()
        except CheckpointError:
            raise
        except Exception as error:  # a pickle can end in anything
            raise CheckpointError(f"{self.index} is damaged: {type(error).__name__}.") from None
        return super().read_metadata(*args, **kwargs)


class StatePlanner(DefaultLoadPlanner):
    """Load what is no tensor as plain values alone."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value that is no tensor.

        Raises:
            CheckpointError: it is no plain value either.
        """
        try:
            torch.load(value, weights_only=True)
        except Exception as error:  # a pickle can end in anything
            raise CheckpointError(f"{read_item.dest_index.fqn} is no plain value: {first_line(error):.200}") from None
        value.seek(0)
        super().load_bytes(read_item, value)


class _IndexUnpickler(pickle.Unpickler):
    """Unpickle an index, which may name the classes of `ALLOWED` and dtypes."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that an index may name."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"The index of a saved state names {module}.{name}, which describes no tensor.")
