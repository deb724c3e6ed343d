"""Contents are hashed by what they hold."""

from pathlib import Path

from PIL import Image
from samples import png

from cafe.content import Content
from cafe.data.encoding import content_hash


def test_content_hashes_are_equal_only_for_equal_contents():
    red, blue, small = (
        Image.new("RGB", size, name) for size, name in (((4, 2), "red"), ((4, 2), "blue"), ((2, 4), "red"))
    )
    encoded = [png("red"), png("blue")]
    values = ["red", "", Path("a"), Path("b"), *encoded, red, blue, small, [red, blue], [blue, red], [red, "red"]]
    assert len({content_hash(Content.of(value)) for value in values}) == len(values)
    assert content_hash(Content.of(red.copy())) == content_hash(Content.of(red))
