"""Calibration: the curve against scikit-learn's linear discriminant, and when there is none."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import noise
from search_samples import load
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from cafe.index import calibration as module
from cafe.index.calibration import MIN_SAMPLES, apply_logistic, calibrate, fit_logistic, needs_calibration
from cafe.index.manifest import Calibration, Logistic


def similarities_of(match, other, spread, count=20, seed=0):
    """Similarities of queries and images, of which those on the diagonal match."""
    drawn = np.random.default_rng(seed).normal(other, spread, (count, count))
    return (drawn + (match - other) * np.eye(count)).astype(np.float32)


@pytest.mark.parametrize(
    ("match", "other", "spread"), [(0.6, 0.2, 0.1), (0.38, 0.28, 0.03), (0.9, 0.5, 0.1), (0.3, 0.28, 0.1)]
)
def test_the_curve_is_that_of_a_linear_discriminant(match, other, spread):
    similarities = similarities_of(match, other, spread)
    matches = [row[number] for number, row in enumerate(similarities)]
    best_others = [max(np.delete(row, number)) for number, row in enumerate(similarities)]
    if np.mean(matches) <= np.mean(best_others):
        assert fit_logistic(similarities) is None
        return
    values = np.array(matches + best_others).astype(float)[:, None]
    labels = np.repeat([1, 0], len(similarities))
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", priors=[0.5, 0.5]).fit(values, labels)
    points = np.linspace(-1, 1, 50)
    scores = apply_logistic(fit_logistic(similarities), points)
    np.testing.assert_allclose(scores, discriminant.predict_proba(points[:, None])[:, 1], atol=1e-6)


@given(st.floats(0.01, 1), st.floats(-0.5, 0.5), st.floats(1e-4, 0.5), st.integers(0, 5))
def test_scores_rise_with_similarity_from_0_to_1(gap, other, spread, seed):
    curve = fit_logistic(similarities_of(other + gap, other, spread, seed=seed))
    if curve is None:  # a small gap in much noise
        return
    scores = apply_logistic(curve, np.linspace(-1, 1, 101))
    assert (scores >= 0).all() and (scores <= 1).all() and (np.diff(scores) >= 0).all()


def test_matches_that_lie_apart_completely_have_a_finite_curve():
    curve = fit_logistic(np.eye(10, dtype=np.float32))
    assert np.isfinite([curve.slope, curve.offset]).all()
    np.testing.assert_allclose(apply_logistic(curve, np.array([0, 0.5, 1])), [0, 0.5, 1], atol=1e-6)


@pytest.mark.parametrize("similarities", [similarities_of(0.2, 0.4, 0.01), np.full((9, 9), 0.3, np.float32)])
def test_there_is_no_curve_if_matches_are_no_more_similar(similarities):
    assert fit_logistic(similarities) is None
    np.testing.assert_array_equal(apply_logistic(None, similarities), similarities)


@pytest.mark.parametrize(
    ("calibration", "num_images", "is_needed"),
    [
        (None, 0, False),
        (None, 1, True),
        (Calibration(0), 10, True),
        (Calibration(5), 7, False),
        (Calibration(5), 8, True),  # before, there were too few for a curve
        (Calibration(50), 499, False),
        (Calibration(50), 500, True),
        (Calibration(50), 3, False),
    ],
)
def test_a_collection_is_calibrated_first_and_when_it_has_grown(calibration, num_images, is_needed):
    assert needs_calibration(calibration, num_images) == is_needed


@pytest.mark.parametrize("count", [0, 1, MIN_SAMPLES - 1])
def test_a_small_collection_has_no_curves(count, random_base):
    model = load(random_base)
    images = [noise(seed, 24, 24) for seed in range(count)]
    vectors = model.embed(images) if images else np.zeros((0, 4), np.float32)
    assert calibrate(model, images, vectors, count) == Calibration(count)


def test_queries_are_the_models_captions_and_the_middles_of_images(random_base, monkeypatch):
    monkeypatch.setattr(module, "MAX_CAPTION_TOKENS", 4)
    model = load(random_base)
    images = [noise(seed, 24, 16) for seed in range(MIN_SAMPLES)]
    vectors = model.embed(images)
    calibration = calibrate(model, images, vectors, 100)
    captions = [model.generate(image, module.DESCRIBE_PROMPT, max_new_tokens=4) for image in images]
    middles = [image.crop((3, 2, 21, 14)) for image in images]
    assert calibration.num_images == 100
    for curve, queries in ((calibration.words, captions), (calibration.images, middles)):
        expected = fit_logistic(model.embed(queries) @ vectors.T) if all(queries) else None
        assert (curve is None) == (expected is None)
        if isinstance(curve, Logistic):
            assert curve.slope == pytest.approx(expected.slope, rel=1e-2)
