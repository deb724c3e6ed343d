"""The promises that keep the test split of the small world honest, and images that show what the scene contains."""

from colorsys import rgb_to_hsv

import numpy as np
import pytest
from PIL import Image

from cafe.scenes.draw import SIDE, crop_place, digit_scans, paint
from cafe.scenes.world import COLORS, DIGITS, KINDS, PLACES, SIZES, Scene, draw_scene, draw_scenes, split_of

TRAIN = draw_scenes(0, "train", 2000)
TEST = draw_scenes(0, "test", 300, distinct=True)


def combination(scene: Scene) -> frozenset[tuple[str, str]]:
    return frozenset((thing.kind, thing.color) for thing in scene.things)


def test_no_combination_is_in_both_splits() -> None:
    assert not {combination(scene) for scene in TRAIN} & {combination(scene) for scene in TEST}


def test_no_combination_is_in_both_splits_of_different_seeds() -> None:
    assert not {combination(scene) for scene in TRAIN} & {combination(s) for s in draw_scenes(1, "test", 300)}


def test_the_split_does_not_depend_on_order_size_or_place() -> None:
    for scene in TEST:
        moved = tuple(
            type(thing)(thing.kind, thing.color, SIZES[0], place)
            for thing, place in zip(reversed(scene.things), PLACES, strict=False)
        )
        assert split_of(moved) == "test"


@pytest.mark.parametrize("digit", range(10))
def test_digit_scans_are_divided_between_the_splits(digit: int) -> None:
    train, test = ({scan.tobytes() for scan in digit_scans(digit, split)} for split in ("train", "test"))
    assert len(train) > len(test) > 30
    assert not train & test


def test_things_of_a_scene_can_be_told_apart() -> None:
    for scene in TRAIN + TEST:
        assert 1 <= len(scene.things) <= 3
        assert len({thing.place for thing in scene.things}) == len(scene.things)
        assert len(combination(scene)) == len(scene.things)


def test_every_kind_color_size_and_place_is_drawn() -> None:
    for field, values in (("kind", KINDS), ("color", COLORS), ("size", SIZES), ("place", PLACES)):
        assert {getattr(thing, field) for scene in TEST for thing in scene.things} == set(values)


def test_test_scenes_are_distinct() -> None:
    assert len({frozenset(scene.things) for scene in TEST}) == len(TEST)


def test_the_same_number_gives_the_same_scene_and_pixels() -> None:
    again = draw_scene(0, "train", 7)
    assert again == draw_scene(0, "train", 7) != draw_scene(1, "train", 7)
    assert paint(again).tobytes() == paint(again).tobytes()


def test_the_image_shows_each_color_in_its_place_and_nothing_elsewhere() -> None:
    for scene in TEST:
        image = paint(scene)
        assert (image.mode, image.size) == ("RGB", (SIDE, SIDE))
        shown = {thing.place: thing.color for thing in scene.things}
        assert {place: color_at(image, place) for place in PLACES} == dict.fromkeys(PLACES) | shown, scene.name


def color_at(image: Image.Image, place: str) -> str | None:
    """The color whose hue the most colorful pixel of a quarter is nearest to; None where the quarter is gray."""
    pixels = np.asarray(crop_place(image, place)).reshape(-1, 3).astype(float)
    strongest = pixels[np.ptp(pixels, axis=1).argmax()]
    if np.ptp(strongest) < 60:  # of 255; the background's tint stays under 30
        return None
    hue = rgb_to_hsv(*strongest / 255)[0]
    return min(COLORS, key=lambda color: abs((rgb_to_hsv(*np.array(COLORS[color]) / 255)[0] - hue + 0.5) % 1 - 0.5))


def pixels_near(image: Image.Image, place: str, color: str) -> int:
    """How many pixels of a quarter have nearly a color (within 12 of 255 in each channel)."""
    pixels = np.asarray(crop_place(image, place)).astype(int)
    return int((abs(pixels - COLORS[color]).max(axis=-1) <= 12).sum())


def test_large_things_cover_more_than_small_ones() -> None:
    covered: dict[str, list[int]] = {size: [] for size in SIZES}
    for scene in TEST:
        for thing in scene.things:
            if thing.kind not in DIGITS:
                covered[thing.size].append(pixels_near(paint(scene), thing.place, thing.color))
    assert np.mean(covered["large"]) > 1.7 * np.mean(covered["small"])  # 29 pixels wide beside 21
