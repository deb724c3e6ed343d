"""A cache of bounded size, held against a plain list."""

import random
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest

from cafe.serving.lru import Lru


def test_the_value_that_was_not_asked_for_the_longest_goes_first():
    cache = Lru[str, str](30)
    for key in "abc":
        cache.put(key, key.upper(), 10)
    assert cache.get("a") == "A"
    cache.put("d", "D", 10)
    assert [cache.get(key) for key in "abcd"] == ["A", None, "C", "D"]
    assert len(cache) == 3 and cache.num_bytes == 30


def test_a_value_that_is_too_large_is_not_kept_and_drives_nothing_out():
    cache = Lru[str, int](10)
    cache.put("a", 1, 10)
    cache.put("b", 2, 11)
    assert cache.get("a") == 1 and cache.get("b") is None
    cache.put("a", 3, 11)  # an older value would be wrong
    assert cache.get("a") is None and cache.num_bytes == len(cache) == 0


def test_a_cache_of_no_bytes_keeps_nothing():
    cache = Lru[str, int](0)
    cache.put("a", 1, 1)
    assert cache.get("a") is None
    assert cache.get_or_make("a", lambda: 2, lambda value: 1) == (2, False)
    assert not len(cache)


def test_it_keeps_what_a_plain_list_would():
    cache, kept, rng = Lru[int, int](100), [], random.Random(0)
    for _ in range(2000):
        key = rng.randrange(20)
        entry = next((entry for entry in kept if entry[0] == key), None)
        if rng.random() < 0.5:
            assert cache.get(key) == (entry and entry[1])
            if entry:
                kept.append(kept.pop(kept.index(entry)))
            continue
        value, size = rng.random(), rng.randrange(1, 120)
        cache.put(key, value, size)
        if entry:
            kept.remove(entry)
        if size <= 100:
            kept.append((key, value, size))
        while sum(entry[2] for entry in kept) > 100:
            kept.pop(0)
        assert cache.num_bytes == sum(entry[2] for entry in kept) and len(cache) == len(kept)


def test_threads_that_want_the_same_value_make_it_once():
    cache, barrier, made = Lru[str, object](10), Barrier(8), []
    begun, go_on = Event(), Event()

    def make() -> object:
        begun.set()
        go_on.wait()
        made.append(object())
        return made[-1]

    def want(_: int) -> tuple[object, bool]:
        barrier.wait()
        return cache.get_or_make("a", make, lambda value: 1)

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(want, number) for number in range(8)]
        begun.wait()
        go_on.set()
        values = [future.result() for future in futures]
    [value] = made
    assert all(each is value for each, _ in values)
    assert sorted(hit for _, hit in values) == [False] + [True] * 7
    assert cache.get("a") is value


def test_an_error_reaches_all_who_wait_and_the_next_may_try_again():
    cache, begun, go_on = Lru[str, int](10), Event(), Event()

    def fail() -> int:
        begun.set()
        go_on.wait()
        raise KeyError("no")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache.get_or_make, "a", fail, lambda value: 1)
        begun.wait()
        second = pool.submit(cache.get_or_make, "a", fail, lambda value: 1)
        go_on.set()
        for future in (first, second):
            with pytest.raises(KeyError):
                future.result()
    assert cache.get_or_make("a", lambda: 1, lambda value: 1) == (1, False)


def test_many_threads_leave_the_count_right():
    cache = Lru[int, int](50)

    def use(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(500):
            key = rng.randrange(30)
            assert cache.get_or_make(key, lambda key=key: key, lambda value: 1 + value)[0] == key

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert cache.num_bytes <= 50
    kept = [key for key in range(30) if cache.get(key) is not None]
    assert cache.num_bytes == sum(1 + key for key in kept)
    cache.clear()
    assert not cache.num_bytes and not len(cache)
