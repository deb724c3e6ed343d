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

    def is_new(self, job: Job) -> bool:
        """Return whether a job has a prefix that is not kept yet; several that are read together may have the same."""
        key = _prefix_key(job)
        return bool(key) and self._lru.get(key) is None

    def put(self, job: Job, key_values: KeyValues) -> None:
        """Keep the keys and values of a job's prefix, which nothing else may change."""
        if self.is_new(job):
            self._lru.put(_prefix_key(job), key_values, sum(states.nbytes for pair in key_values for states in pair))


def _prefix_key(job: Job) -> str:
    """Return what identifies a job's prefix: its images and its tokens; empty for none."""
    # At least one token is left to continue with.
    if not 0 < job.prefix_length < len(job.branch):
        return ""
    tokens = job.branch.input_ids[: job.prefix_length].numpy().tobytes()
    return job.image_key + hashlib.sha256(tokens).hexdigest()
