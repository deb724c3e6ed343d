"""Images in the terminal: below their paths, and only where the terminal can show them, or coarsely if asked to."""

from datetime import datetime

from PIL import Image

from cafe.errors import RecordError
from cafe.index.searching import Hit
from cafe.index.terminal import MAX_SHOWN, show_images


def hits(count):
    return [
        Hit(0.5, 0.5, f"/{n}\x1b.jpg", None, None, "", datetime(2024, 1, 1), 4, 4, {}, "k", f"/{n}\x1b.jpg")
        for n in range(count)
    ]


def load_image(hit):
    if hit.path.startswith("/1"):
        raise RecordError("It is gone.")
    return Image.new("RGB", (8, 8), "red")


def test_a_terminal_that_shows_no_images_is_left_alone(capsys):
    show_images(hits(3), load_image, anywhere=False)
    assert capsys.readouterr().out == ""


def test_images_are_shown_coarsely_below_their_paths_if_asked_to(capsys):
    show_images(hits(3), load_image, anywhere=True)
    shown = capsys.readouterr().out
    assert r"/0\x1b.jpg" in shown and r"/2\x1b.jpg" in shown and "/1" not in shown
    assert len(shown.splitlines()) > 6 and "\x1b.jpg" not in shown


def test_the_first_images_alone_are_shown(capsys):
    show_images([hit for hit in hits(30) if "/1" not in hit.path], load_image, anywhere=True)
    assert capsys.readouterr().out.count(".jpg") == MAX_SHOWN
