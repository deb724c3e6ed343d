"""Kept prefixes are found by the images and all tokens before their end, and by nothing less."""

import pytest
import torch
from engine_samples import IMAGES, Jobs
from model_samples import make
from transformers import DynamicCache

from cafe.lvlm.slot_cache import KeyValues, select_key_values
from cafe.packing import Branch
from cafe.serving.jobs import EmbedJob, Job
from cafe.serving.metrics import Metrics
from cafe.serving.prefixes import PrefixCache

LENGTH, WORDS = 6, 3  # tokens of a prefix, and behind it


def make_job(image_key: str = "a", prefix: int = LENGTH, first: int = 0, last: int = 0) -> EmbedJob:
    """Make a job whose first and last token can be told apart."""
    tokens = torch.arange(LENGTH + WORDS) + 10
    tokens[0] += first
    tokens[-1] += last
    none = torch.zeros(len(tokens), dtype=torch.bool)
    return EmbedJob(branch=Branch(tokens, none, none), image_key=image_key, prefix_length=prefix)


def key_values(seed: int = 0, num_tokens: int = LENGTH) -> KeyValues:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, num_tokens, 4, generator=generator), torch.randn(2, num_tokens, 4)) for _ in range(3)]


NUM_BYTES = 3 * 2 * 2 * LENGTH * 4 * 4  # of a prefix: layers, keys and values, heads, tokens, dimensions, float32


def hits(metrics: Metrics, hit: str) -> float:
    return metrics.registry.get_sample_value("cafe_cache_hits_total", {"cache": "prefixes", "hit": hit}) or 0.0


def test_a_prefix_is_found_again_and_holds_no_other_tokens_in_memory():
    states, cache = key_values(num_tokens=LENGTH + WORDS), PrefixCache(NUM_BYTES, Metrics())
    pack = DynamicCache()
    for layer, (keys, values) in enumerate(states):
        pack.update(keys[None], values[None], layer)
    coords = torch.stack([torch.zeros(LENGTH, dtype=torch.long), torch.arange(LENGTH)], dim=1)
    assert cache.is_new(make_job())
    cache.put(make_job(), select_key_values(pack, coords))
    assert not cache.is_new(make_job())
    found = cache.get(make_job())
    assert found is not None
    for pair, wanted in zip(found, states, strict=True):
        for one, other in zip(pair, wanted, strict=True):
            assert torch.equal(one, other[:, :LENGTH])
            assert one.untyped_storage().nbytes() == one.nbytes  # a view would keep all tokens in memory


def test_what_is_behind_the_prefix_does_not_matter_and_all_before_its_end_does():
    cache = PrefixCache(2**20, Metrics())
    cache.put(make_job(), key_values())
    assert cache.get(make_job(last=1)) is not None
    for other in (make_job(first=1), make_job(image_key="b"), make_job(prefix=LENGTH - 1)):
        assert cache.get(other) is None


def test_a_job_without_images_has_no_prefix_and_is_no_lookup():
    metrics = Metrics()
    cache = PrefixCache(2**20, metrics)
    text = make_job(image_key="", prefix=0)
    cache.put(text, key_values())
    assert cache.get(text) is None
    assert hits(metrics, "true") == hits(metrics, "false") == 0


def test_a_job_that_ends_with_its_images_leaves_nothing_to_continue_with():
    cache, job = PrefixCache(2**20, Metrics()), make_job(prefix=LENGTH + WORDS)
    cache.put(job, key_values())
    assert cache.get(job) is None


def test_hits_and_misses_are_counted():
    metrics = Metrics()
    cache = PrefixCache(2**20, metrics)
    cache.get(make_job())
    cache.put(make_job(), key_values())
    cache.get(make_job())
    cache.get(make_job())
    assert (hits(metrics, "true"), hits(metrics, "false")) == (2, 1)


def test_the_prefixes_that_were_used_last_are_kept():
    cache = PrefixCache(2 * NUM_BYTES, Metrics())
    for key in "ab":
        cache.put(make_job(key), key_values())
    cache.get(make_job("a"))
    cache.put(make_job("c"), key_values())
    assert [key for key in "abc" if cache.get(make_job(key)) is not None] == ["a", "c"]
    nothing = PrefixCache(NUM_BYTES - 1, Metrics())
    nothing.put(make_job(), key_values())
    assert nothing.get(make_job()) is None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "ovis2", "smolvlm"])
def test_jobs_of_a_family_share_the_prefixes_that_are_the_same(family):
    jobs, cache = Jobs(make(family)), PrefixCache(2**30, Metrics())

    def is_kept(job: Job) -> bool:
        return cache.get(job) is not None

    first = jobs.chat(IMAGES[0], "What?").job
    cache.put(first, key_values(num_tokens=len(first.branch)))
    assert is_kept(jobs.chat(IMAGES[0], "Where?").job)
    assert is_kept(jobs.embed(IMAGES[0]))
    for others in ([IMAGES[1], "What?"], [IMAGES[0], IMAGES[1]], [IMAGES[1], IMAGES[0]], ["What? ", IMAGES[0]]):
        # A template may put images before words.
        job = jobs.chat(*others).job
        assert is_kept(job) == (torch.equal(*prefixes_of(first, job)) and first.image_key == job.image_key)
        assert is_kept(job) <= (others == ["What? ", IMAGES[0]])


def prefixes_of(*jobs: Job) -> list[torch.Tensor]:
    return [job.branch.input_ids[: job.prefix_length] for job in jobs]
