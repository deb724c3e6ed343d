"""Appearances: equal for copies that were resized or compressed, different where people see a difference."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from cafe.images.appearance import NUM_BYTES, SIDE, appearance_distance, appearance_of


def distance(first, second):
    """The distance between the appearances of two images."""
    rows = [np.frombuffer(appearance_of(image), np.uint8)[None] for image in (first, second)]
    return float(appearance_distance(*rows)[0])


def drawing(shape="ellipse", color="red", box=(60, 60, 140, 140), background="gray"):
    """A shape on an even background, of which the bits of most perceptual hashes say little."""
    image = Image.new("RGB", (240, 200), background)
    getattr(ImageDraw.Draw(image), shape)(box, fill=color)
    return image


def compressed(image, quality):
    """A JPEG copy."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return Image.open(out)


def test_an_appearance_is_the_mean_color_of_each_tile():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 64, 3)).astype(np.uint8)
    means = pixels.reshape(SIDE, 5, SIDE, 8, 3).mean(axis=(1, 3))
    appearance = np.frombuffer(appearance_of(Image.fromarray(pixels)), np.uint8)
    assert appearance.size == NUM_BYTES
    np.testing.assert_allclose(appearance.reshape(SIDE, SIDE, 3), means, atol=1)


def test_a_distance_is_the_root_mean_square():
    first, second = np.random.default_rng(0).integers(0, 256, (2, 5, NUM_BYTES)).astype(np.uint8)
    expected = np.sqrt(((first.astype(float) - second) ** 2).mean(1))
    np.testing.assert_allclose(appearance_distance(first, second), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image,
        lambda image: image.resize((120, 100)),
        lambda image: image.resize((377, 314), Image.Resampling.BICUBIC),
        lambda image: compressed(image, 40),
        lambda image: compressed(image.resize((100, 83)), 70),
        lambda image: ImageEnhance.Brightness(image).enhance(1.03),
        lambda image: image.convert("RGBA"),
    ],
)
def test_copies_look_the_same(change):
    assert distance(drawing(), change(drawing())) < 6


@pytest.mark.parametrize(
    "other",
    [
        drawing(color="blue"),
        drawing(color="orange"),
        drawing(box=(100, 60, 180, 140)),
        drawing(box=(80, 80, 120, 120)),
        drawing(background="black"),
        Image.new("RGB", (240, 200), "gray"),
        drawing().transpose(Image.Transpose.ROTATE_90),
    ],
)
def test_what_differs_in_color_place_or_size_does_not(other):
    assert distance(drawing(), other) > 6
