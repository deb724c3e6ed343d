"""Worker processes: what they are sent and send back, and how they start without the user's script."""

import io
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

_main_module = Lock()


def dump(value: Any) -> memoryview:
    """Pickle a value for another process of this program, with its tensors."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getbuffer()


def restore(data: Any) -> Any:
    """Restore what `dump` made of a value. It must come from a process of this program: pickles can run code."""
    return pickle.loads(data)


class _Pickler(pickle.Pickler):
    """Pickle tensors as NumPy arrays, which is many times faster than PyTorch's own way."""

    def reducer_override(self, value: Any) -> Any:
        """Return how to rebuild a tensor; all else is pickled as usual."""
        # NumPy has no bfloat16.
        if isinstance(value, Tensor) and value.dtype != torch.bfloat16:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


@contextmanager
def without_main_module() -> Iterator[None]:
    """Start processes that do not run the user's script once more, as spawned ones otherwise do.

    Nothing that they need is in it, and a script without `if __name__ == "__main__"` would start workers without end.
    """
    main = sys.modules["__main__"]
    # One thread at a time: a second one would take what is hidden now for how it was, and hide it for good.
    with _main_module:
        spec, file = main.__spec__, main.__dict__.pop("__file__", None)
        main.__spec__ = None
        try:
            yield
        finally:
            main.__spec__ = spec
            if file is not None:
                main.__file__ = file
