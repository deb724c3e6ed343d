"""A cache of bounded size, for what requests share: processed images, features of the vision tower, prefixes."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Lru(Generic[K, V]):
    """Keep values of up to so many bytes together; those go first that were not asked for the longest.

    Any thread may use it. A value is handed out as it was put in, so nobody may change it.

    Args:
        max_bytes: of all values; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()  # the value and its bytes, oldest first
        self._under_way: dict[K, Future[V]] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """Return the value of a key, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: K, value: V, num_bytes: int) -> None:
        """Keep a value of so many bytes, unless it is larger than all that may be kept."""
        with self._lock:
            # An older value of the key is wrong now, also where the new one is too large to keep.
            self._drop(key)
            if num_bytes > self.max_bytes:
                return
            self._entries[key] = value, num_bytes
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                self._drop(next(iter(self._entries)))

    def get_or_make(self, key: K, make: Callable[[], V], size: Callable[[V], int]) -> tuple[V, bool]:
        """Return the value of a key, and whether it was there or is being made by another thread, which is waited for.

        Args:
            key: of the value.
            make: makes it. What it raises is raised in all threads that wait for the value, which is not kept.
            size: returns a value's bytes.
        """
        value = self.get(key)
        if value is not None:
            return value, True
        # The first thread to leave its future here makes the value, and the others wait for that future.
        with self._lock:
            others = self._under_way.get(key)
            own: Future[V] = self._under_way.setdefault(key, Future())
        if others is not None:
            return others.result(), True
        try:
            # Another thread may have made it since the first look.
            value = self.get(key)
            is_hit = value is not None
            if value is None:
                value = make()
                self.put(key, value, size(value))
            own.set_result(value)
            return value, is_hit
        except BaseException as error:  # whoever waits would wait for good
            own.set_exception(error)
            raise
        finally:
            with self._lock:
                del self._under_way[key]

    def clear(self) -> None:
        """Drop all values."""
        with self._lock:
            self._entries.clear()
            self.num_bytes = 0

    def _drop(self, key: K) -> None:
        """Drop the value of a key, if there is one; the lock is held."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry[1]
