"""Scenes: who stands together in training and never in the test, and that each drawing is painted in its own cell."""

from collections import Counter
from random import Random

import numpy as np

from another_hand.scenes import CELL, Scene, Thing, compose, draw_concepts, draw_concepts_apart, paint, pair_up, single

CONCEPTS = ["fork and knife", "pizza", *(f"thing {number}" for number in range(120))]
PARTNERS = pair_up(CONCEPTS)
HANDS = {concept: ["a", "b"] for concept in CONCEPTS}


def test_pairs_are_disjoint_and_go_both_ways():
    assert len(PARTNERS) == 80
    assert all(PARTNERS[partner] == concept != partner for concept, partner in PARTNERS.items())
    assert PARTNERS["pizza"] == "fork and knife"
    assert pair_up(CONCEPTS) == PARTNERS


def test_partners_stand_together_in_training_and_never_in_the_test():
    rng = Random(0)
    training = [draw_concepts(rng, CONCEPTS, PARTNERS, 4) for _ in range(2000)]
    test = [draw_concepts_apart(rng, CONCEPTS, PARTNERS, 4) for _ in range(2000)]
    assert {len(set(shown)) for shown in training + test} == {4}
    # By brute force over all pairs, of those that are shown at all.
    pairs = [set(pair) for pair in PARTNERS.items()]
    shown = [[pair & set(scene) for pair in pairs if pair & set(scene)] for scene in training]
    together = [len(found) == 2 for scene in shown for found in scene]
    assert 0.6 < np.mean(together) < 0.9
    assert not any(pair <= set(scene) for scene in test for pair in pairs)
    # A test scene shows what has a partner about as often as anything else.
    counts = Counter(concept for scene in test for concept in scene)
    rates = [np.mean([counts[c] for c in CONCEPTS if (c in PARTNERS) == paired]) for paired in (True, False)]
    assert 0.9 < rates[0] / rates[1] < 1.1


def test_scenes_are_in_reading_order_and_fit_their_cells():
    for seed in range(50):
        scene = compose("scene", Random(seed), CONCEPTS[:3], HANDS, variants=5)
        places = [thing.place for thing in scene.things]
        assert places == sorted(set(places))
        assert set(scene.concepts) == set(CONCEPTS[:3])
        assert all(thing.size <= CELL and 0 <= thing.variant < 5 for thing in scene.things)
    assert {thing.variant for thing in compose("scene", Random(0), CONCEPTS[:2], HANDS).things} == {-1}


def test_each_drawing_is_painted_in_its_own_cell_and_the_last_variant_is_the_drawing_itself():
    red, green = np.zeros((2, 2, CELL, CELL, 4), np.uint8)
    red[:] = (255, 0, 0, 255)
    green[1] = (0, 255, 0, 255)  # its first variant is transparent
    drawings = {("a", "red"): red, ("a", "green"): green}
    things = (Thing("red", "a", 1, 40, 0), Thing("green", "a", 2, 34, -1))
    pixels = np.asarray(paint(Scene("scene", things, (200, 210, 220)), drawings)).astype(int)
    assert pixels.shape == (96, 96, 3)
    for place, color, side in ((1, (255, 0, 0), 40), (2, (0, 255, 0), 34)):
        rows, columns = np.nonzero((pixels == color).all(axis=2))
        assert len(rows) == side * side
        assert set(rows // CELL) == {place // 2}
        assert set(columns // CELL) == {place % 2}
    assert (pixels == (200, 210, 220)).all(axis=2).sum() == 96 * 96 - 40 * 40 - 34 * 34


def test_a_single_drawing_fills_a_small_image():
    drawing = np.full((1, CELL, CELL, 4), 255, np.uint8)
    drawing[..., 1] = 0
    image = paint(single("single", Random(0), "fox", "a"), {("a", "fox"): drawing})
    assert image.size == (CELL, CELL)
    assert image.getcolors() == [(CELL * CELL, (255, 0, 255))]
