"""What routes do with requests alike, without a server."""

import asyncio
from threading import get_ident

import pytest

from cafe.serving.requests import LONG_TEXT, run_encoding


@pytest.mark.parametrize(
    ("has_images", "num_characters", "is_elsewhere"),
    [(False, 0, False), (False, LONG_TEXT, False), (False, LONG_TEXT + 1, True), (True, 0, True)],
)
def test_what_takes_long_is_encoded_in_a_thread(has_images, num_characters, is_elsewhere):
    thread = asyncio.run(run_encoding(get_ident, has_images, num_characters))
    assert (thread != get_ident()) == is_elsewhere
