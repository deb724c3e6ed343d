"""Keys and values of images that were read lately, from which a prompt about the same image continues."""

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
        if not job.prefix_key:
            return None
        prefix = self._lru.get(job.prefix_key)
        self._metrics.cache_hits.labels(cache="prefixes", hit=str(prefix is not None).lower()).inc()
        return prefix

    def is_new(self, job: Job) -> bool:
        """Return whether a job has a prefix that is not kept yet; several that are read together may have the same."""
        return bool(job.prefix_key) and self._lru.get(job.prefix_key) is None

    def put(self, job: Job, key_values: KeyValues) -> None:
        """Keep the keys and values of a job's prefix, which nothing else may change."""
        if self.is_new(job):
            self._lru.put(job.prefix_key, key_values, sum(states.nbytes for pair in key_values for states in pair))
