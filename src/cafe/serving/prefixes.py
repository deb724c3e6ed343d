"""Keys and values of images that were read lately, from which a prompt about the same image continues."""

import hashlib

from cafe.lvlm.slot_cache import KeyValues
from cafe.serving.jobs import Job
from cafe.serving.lru import Lru
from cafe.serving.metrics import Metrics


class PrefixCache:
    """Keep what the model made of the tokens up to the last image of a job, by their content.

    Args:
        max_bytes: memory for them.
        metrics: counts hits.
    """

    def __init__(self, max_bytes: int, metrics: Metrics) -> None:
        self._lru: Lru[str, KeyValues] = Lru(max_bytes)
        self._metrics = metrics

    def get(self, job: Job) -> KeyValues | None:
        """Return the keys and values of a job's prefix, if the same images were read behind the same tokens."""
        key = _prefix_key(job)
        if not key:
            return None
        prefix = self._lru.get(key)
        self._metrics.cache_hits.labels(cache="prefixes", hit=str(prefix is not None).lower()).inc()
        return prefix

    def put(self, job: Job, key_values: KeyValues) -> None:
        """Keep the keys and values of a job's prefix, if it has one; they are copied from those of all its tokens."""
        key, length = _prefix_key(job), job.prefix_length
        # Several jobs that are read together may have the same prefix.
        if not key or self._lru.get(key) is not None:
            return
        prefix = [(keys[:, :length], values[:, :length]) for keys, values in key_values]
        num_bytes = sum(states.nbytes for pair in prefix for states in pair)
        # A large model's prefix may be more than is kept of all: a copy would be made for nothing.
        if num_bytes <= self._lru.max_bytes:
            self._lru.put(key, [(keys.clone(), values.clone()) for keys, values in prefix], num_bytes)


def _prefix_key(job: Job) -> str:
    """Return what identifies a job's prefix: its images and its tokens; empty for none."""
    # At least one token is left to continue with.
    if not 0 < job.prefix_length < len(job.branch):
        return ""
    tokens = job.branch.input_ids[: job.prefix_length].numpy().tobytes()
    return job.image_key + hashlib.sha256(tokens).hexdigest()
