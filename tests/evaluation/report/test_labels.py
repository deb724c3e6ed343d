"""Test that labels lie apart from one another, from the points and within the frame."""

import numpy as np
import pytest

from cafe.evaluation.report.labels import place_labels

NOTHING = np.zeros((0, 2))
FRAME = np.array([[0.0, 0.0], [400.0, 260.0]])


def overlap(a: np.ndarray, b: np.ndarray, size_a: np.ndarray, size_b: np.ndarray) -> bool:
    return bool((np.abs(a - b) < (size_a + size_b) / 2).all())


def distance(center: np.ndarray, point: np.ndarray, size: np.ndarray) -> float:
    """From the edge of a label to a point."""
    return float(np.linalg.norm(np.maximum(np.abs(center - point) - size / 2, 0)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [12, 40, 120])
def test_ten_labels_overlap_neither_each_other_nor_a_point(seed, spread):
    random = np.random.default_rng(seed)
    points = np.array([200, 130]) + random.uniform(-spread, spread, (10, 2))
    sizes = np.stack([random.uniform(12, 70, 10), np.full(10, 9.0)], axis=1)
    centers = place_labels(points, sizes, points, NOTHING, FRAME)
    assert (centers - sizes / 2 >= FRAME[0]).all() and (centers + sizes / 2 <= FRAME[1]).all()
    for i in range(10):
        assert not any(overlap(centers[i], point, sizes[i], np.zeros(2)) for point in points)
        assert not any(overlap(centers[i], centers[j], sizes[i], sizes[j]) for j in range(i))


def test_a_lone_label_is_as_near_as_it_may_be_and_leaves_a_corner():
    size = np.array([[40.0, 9.0]])
    for point in (np.array([[200.0, 130.0]]), np.array([[1.0, 1.0]]), np.array([[399.0, 259.0]])):
        [center] = place_labels(point, size, point, NOTHING, FRAME)
        assert distance(center, point[0], size[0]) <= 7 + 1e-9
        assert (center - size[0] / 2 >= FRAME[0]).all() and (center + size[0] / 2 <= FRAME[1]).all()


def test_no_labels_have_no_centers():
    assert place_labels(NOTHING, NOTHING, NOTHING, NOTHING, FRAME).shape == (0, 2)


def test_a_label_is_nearer_to_its_own_point_than_to_one_without_a_label_and_leaves_a_line():
    point, other = np.array([[200.0, 130.0]]), np.array([[212.0, 134.0]])
    line = np.stack([np.arange(100.0, 200.0, 5.0), np.full(20, 130.0)], axis=1)
    size = np.array([[30.0, 9.0]])
    [center] = place_labels(point, size, np.concatenate([point, other]), line, FRAME)
    assert distance(center, point[0], size[0]) < distance(center, other[0], size[0])
    assert not any(overlap(center, sample, size[0], np.zeros(2)) for sample in line)
