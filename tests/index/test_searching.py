"""Searching: exact against brute force, filters with the vector index, words, and the order of what is found."""

from datetime import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_samples import numbers_of, unit_vectors, write_snapshot

from cafe.index import searching
from cafe.index import snapshot as snapshot_module
from cafe.index.filters import Filters
from cafe.index.manifest import Calibration, Logistic
from cafe.index.query import Query
from cafe.index.searching import search, sort_hits, top_rows
from cafe.index.vector_index import build_vector_index

NO_WORDS = Query.parse(["boat", "-", "people"])  # a query that searches vectors alone


def find(snapshot, query=NO_WORDS, vector=None, k=10, filters=None, min_score=None, calibration=None, index=None):
    """Search, by default for the direction of a random vector."""
    vector = unit_vectors(1, seed=99)[0] if vector is None else vector
    return search(snapshot, query, vector, k, (filters or Filters()).compile(), min_score, calibration, index)


def find_words(snapshot, *words, **options):
    """Search for words, with a vector that is as similar to all images."""
    return find(snapshot, Query.parse(words), np.zeros(16, np.float32), **options)


@given(st.lists(st.integers(-3, 3), max_size=20), st.integers(1, 25))
def test_the_largest_values_come_first_and_of_equal_ones_the_first(values, count):
    rows = top_rows(np.array(values, np.float32), count).tolist()
    if count >= len(values):  # numpy chooses among equal ones at the cut
        assert rows == sorted(range(len(values)), key=lambda row: (-values[row], row))
    chosen = [values[row] for row in rows]
    assert chosen == sorted(values, reverse=True)[:count] and len(set(rows)) == len(rows)


def test_an_exact_search_is_that_by_brute_force(tmp_path):
    vectors, query = unit_vectors(300), unit_vectors(1, seed=1)[0]
    hits = find(write_snapshot(tmp_path / "1", vectors), vector=query, k=20)
    expected = np.argsort(-(vectors @ query), kind="stable")[:20]
    assert numbers_of(hits) == expected.tolist()
    np.testing.assert_allclose([hit.similarity for hit in hits], (vectors @ query)[expected], atol=1e-6)
    assert [hit.score for hit in hits] == [hit.similarity for hit in hits]  # not calibrated


def test_filters_leave_the_nearest_of_those_that_pass(tmp_path):
    vectors, query = unit_vectors(300), unit_vectors(1, seed=1)[0]
    images = {number: {"width": 900} for number in range(0, 300, 7)}
    hits = find(write_snapshot(tmp_path / "1", vectors, images=images), vector=query, filters=Filters(min_width=800))
    expected = [number for number in np.argsort(-(vectors @ query)).tolist() if number % 7 == 0][:10]
    assert numbers_of(hits) == expected
    assert {hit.width for hit in hits} == {900}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A collection of 600 images of which half are wide, and every fiftieth is in Italy, with a vector index."""
    vectors = unit_vectors(600)
    snapshot = write_snapshot(
        tmp_path_factory.mktemp("large") / "1",
        vectors,
        images={number: {"width": 900} for number in range(0, 600, 2)},
        places={number: {"id": f"/Italy/{number}", "path": f"/Italy/{number}"} for number in range(0, 600, 50)},
    )
    return vectors, snapshot, build_vector_index(snapshot.store, 600)


@pytest.mark.parametrize("most_compared", [1000, 10])
@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        (Filters(), lambda number: True),
        (Filters(min_width=800), lambda number: number % 2 == 0),
        (Filters(folder="Italy"), lambda number: number % 50 == 0),
        (Filters(folder="France"), lambda number: False),
    ],
)
def test_a_large_collection_finds_the_same_by_its_vector_index(filters, passes, most_compared, large, monkeypatch):
    vectors, snapshot, index = large
    monkeypatch.setattr(snapshot_module, "MAX_EXACT", 100)
    monkeypatch.setattr(searching, "MAX_COMPARED", most_compared)
    assert not snapshot.is_exact
    shares = []
    for query in unit_vectors(10, seed=5):
        expected = [number for number in np.argsort(-(vectors @ query)).tolist() if passes(number)][:10]
        hits = numbers_of(find(snapshot, vector=query, filters=filters, index=index))
        assert len(hits) == len(expected) and all(map(passes, hits))
        shares.append(len(set(hits) & set(expected)) / max(len(expected), 1))
    assert not any(passes(number) for number in range(600)) or np.mean(shares) >= 0.98


def test_words_are_found_in_captions_texts_and_names(tmp_path):
    snapshot = write_snapshot(
        tmp_path / "1",
        unit_vectors(300),
        images={17: {"caption": "two red boats at sunset"}, 40: {"text": "Invoice of the harbour master"}},
        places={number: {"name": f"trip/IMG_{3500 + number}.jpg"} for number in range(300)},
    )
    assert 17 in numbers_of(find_words(snapshot, "boat"))[:2]  # by its stem; the other is the first by its vector
    assert 40 in numbers_of(find_words(snapshot, "invoice"))[:2]
    for name in ("IMG_3551", "img_3551.jpg", "3551"):
        assert 51 in numbers_of(find_words(snapshot, name))[:2]
    [hit] = [hit for hit in find_words(snapshot, "invoice") if hit.key == "key040"]
    assert (hit.text, hit.caption, hit.path) == ("Invoice of the harbour master", None, "/photos/40.png")


def test_a_name_is_found_although_the_vectors_rank_others_first(tmp_path):
    vectors = unit_vectors(300)
    places = {number: {"name": f"IMG_{3500 + number}.jpg"} for number in range(300)}
    snapshot = write_snapshot(tmp_path / "1", vectors, places=places)
    furthest = int(np.argmin(vectors @ vectors[0]))
    hits = find(snapshot, Query.parse([f"IMG_{3500 + furthest}"]), vectors[0])
    assert set(numbers_of(hits)[:2]) == {0, furthest}  # the nearest vector, and the only one of this number


def test_images_with_the_same_words_are_in_the_order_of_their_vectors(tmp_path):
    vectors, query = unit_vectors(300), unit_vectors(1, seed=1)[0]
    images = {number: {"caption": "a red boat"} for number in range(0, 300, 2)}
    hits = find(write_snapshot(tmp_path / "1", vectors, images=images), Query.parse(["red", "boat"]), query, k=20)
    expected = [number for number in np.argsort(-(vectors @ query)).tolist() if number % 2 == 0][:20]
    assert numbers_of(hits)[:10] == expected[:10]


def test_filters_hold_for_what_words_find(tmp_path):
    images = {number: {"caption": "a red boat", "width": 900 if number == 33 else 640} for number in range(250)}
    snapshot = write_snapshot(tmp_path / "1", unit_vectors(250), images=images)
    assert numbers_of(find_words(snapshot, "boat", filters=Filters(min_width=800))) == [33]
    assert find_words(snapshot, "boat", filters=Filters(folder="nowhere")) == []


@pytest.mark.parametrize(("words", "number"), [("小狗", 1), ("海滩", 1), ("夕日", 2), ("ボート", 2), ("바다", 3)])
def test_chinese_japanese_and_korean_captions_are_found(words, number, tmp_path):
    captions = {1: "一只小狗在海滩上奔跑", 2: "夕日と赤いボート", 3: "푸른 바다 위의 배", 4: "a street at night"}
    images = {number: {"caption": caption} for number, caption in captions.items()}
    snapshot = write_snapshot(tmp_path / "1", unit_vectors(6), images=images)
    assert numbers_of(find_words(snapshot, words))[0] == number


def test_a_phrase_in_quotes_is_searched_as_one(tmp_path):
    images = {
        1: {"caption": "a boat with a red sail"},
        2: {"caption": "a sail, and a boat, red"},
        3: {"caption": "red sail"},
    }
    snapshot = write_snapshot(tmp_path / "1", unit_vectors(5), images=images)
    found = [relevances.keys() for relevances in snapshot.store.search_words('"red sail"', 10)]
    assert found == [{"key001", "key003"}]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A collection of five images with captions."""
    images = {number: {"caption": "a red boat"} for number in range(5)}
    return write_snapshot(tmp_path_factory.mktemp("small") / "1", unit_vectors(5), images=images)


ODD_WORDS = """
" "red | red" boat | "" | AND | red AND | NOT red OR | ( | red) | * | re* | red~2 | caption:red | +red -boat | \ | ' |
o'clock | red^2 | [red TO boat] | ! | 🚤 | {red | red:: | red && boat || x
""".strip().split(" | ")


@pytest.mark.parametrize("words", [*ODD_WORDS, "x" * 10_000, "\0", "red\nboat"])
def test_quotes_and_operators_never_raise(words, small):
    assert len(find_words(small, words)) == 5


def test_captions_vectors_are_a_ranking_of_their_own(tmp_path):
    query = unit_vectors(1, seed=1)[0]
    images = {20: {"caption": "x", "caption_vector": query}}
    vectors = unit_vectors(50)
    hits = find(write_snapshot(tmp_path / "1", vectors, images=images), Query.parse(["y"]), query)
    nearest = int(np.argmax(vectors @ query))
    assert numbers_of(hits)[:2] == [20, nearest]


def test_fused_ranks_decide_and_equal_ones_go_by_similarity(tmp_path):
    vectors, query = unit_vectors(20), unit_vectors(1, seed=1)[0]
    snapshot = write_snapshot(tmp_path / "1", vectors, images={9: {"caption": "boat"}, 5: {"caption": "boat"}})
    hits = find(snapshot, Query.parse(["boat"]), query, k=20)
    similarities = vectors @ query
    ranks = {number: rank for rank, number in enumerate(np.argsort(-similarities).tolist(), 1)}
    fused = {number: 1 / (60 + rank) for number, rank in ranks.items()}
    for rank, number in enumerate(sorted((5, 9), key=ranks.__getitem__), 1):
        fused[number] += 1 / (60 + rank)
    assert numbers_of(hits) == sorted(fused, key=lambda number: (-fused[number], -similarities[number]))


def test_scores_are_by_the_curve_of_the_querys_kind_and_can_be_cut_off(tmp_path):
    vectors, query = unit_vectors(50), unit_vectors(1, seed=1)[0]
    snapshot = write_snapshot(tmp_path / "1", vectors)
    calibration = Calibration(50, words=Logistic(10.0, -2.0), images=Logistic(20.0, -5.0))
    image = Query.of(b"not decoded here")
    for parsed, slope, offset in ((Query.parse(["boat"]), 10, -2), (image, 20, -5)):
        hits = find(snapshot, parsed, query, k=50, calibration=calibration)
        expected = 1 / (1 + np.exp(-(slope * (vectors @ query) + offset)))
        np.testing.assert_allclose([hit.score for hit in hits], np.sort(expected)[::-1], atol=1e-5)
        best = find(snapshot, parsed, query, k=50, calibration=calibration, min_score=0.3)
        assert len(best) == (expected >= 0.3).sum() and all(hit.score >= 0.3 for hit in best)


def test_without_a_least_score_dissimilar_images_are_shown_too(tmp_path):
    vectors = unit_vectors(10)
    assert len(find(write_snapshot(tmp_path / "1", vectors), vector=-vectors.mean(0), k=10)) == 10


def test_an_empty_collection_has_nothing(tmp_path):
    snapshot = write_snapshot(tmp_path / "1", np.zeros((0, 16), np.float32))
    assert find(snapshot) == [] and find_words(snapshot, "boat") == []


def test_hits_are_sorted_by_date_or_name(tmp_path):
    snapshot = write_snapshot(
        tmp_path / "1",
        unit_vectors(4),
        images={number: {"taken_at": datetime(2020 + (3 * number) % 4, 1, 1)} for number in range(4)},
        places={3: {"path": "/photos/0.pdf", "page": 10}, 2: {"path": "/photos/0.pdf", "page": 9}},
    )
    hits = find(snapshot)
    assert [hit.taken_at.year for hit in sort_hits(hits, "newest")] == [2023, 2022, 2021, 2020]
    assert [hit.taken_at.year for hit in sort_hits(hits, "oldest")] == [2020, 2021, 2022, 2023]
    assert numbers_of(sort_hits(hits, "name")) == [2, 3, 0, 1]
    assert sort_hits(hits, "score") == hits
