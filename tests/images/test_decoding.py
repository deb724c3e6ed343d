"""Images of every kind are decoded to what they show, or refused in a sentence; nothing else is ever opened."""

import ast
import base64
import io
import os
import random
import stat
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image, PngImagePlugin, features
from samples import noise

import cafe
from cafe.content import Content, ImageLimits, ImageRef
from cafe.errors import RecordError
from cafe.images.decoding import FORMATS, decode_array, decode_image

KINDS = [kind for kind in FORMATS if kind in (Image.init(), Image.SAVE)[1]]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(bits: int, color_type: int, row: bytes, width: int, *chunks: bytes) -> ImageRef:
    """A PNG of one row, written by the specification."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, color_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return ImageRef(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels)


def colors(ref: ImageRef) -> list[tuple[int, ...]]:
    pixels = np.asarray(decode_image(ref))
    assert np.array_equal(pixels, decode_array(ref))
    return [tuple(pixel) for pixel in pixels[0].tolist()]


GARBAGE = b"Exif\0\0garbage, not TIFF"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_with_damaged_exif_is_read(kind):
    image = noise(0, 16, 16)
    damaged, whole = (ImageRef(encode(image, kind, **options)) for options in ({"exif": GARBAGE}, {}))
    assert np.array_equal(decode_image(damaged), decode_image(whole))
    assert np.array_equal(decode_array(damaged), decode_array(whole))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_an_avif_with_damaged_exif_is_read():
    image = Image.new("RGB", (8, 8), "red")
    exif = image.getexif()
    exif[0x010E] = "a red square"
    whole = encode(image, "AVIF", exif=exif)
    damaged = whole.replace(b"MM\0*", b"garb").replace(b"II*\0", b"garb")
    assert damaged != whole and np.array_equal(decode_image(ImageRef(damaged)), decode_image(ImageRef(whole)))


def test_a_png_with_long_texts_or_a_long_color_profile_is_read():
    told = PngImagePlugin.PngInfo()
    told.add_text("parameters", "steps " * 400_000, zip=True)
    told.add_itxt("more", "steps " * 400_000, zip=True)
    for options in ({"pnginfo": told}, {"icc_profile": bytes(2_000_000)}):
        assert decode_image(ImageRef(encode(Image.new("RGB", (4, 4), "red"), "PNG", **options))).getpixel((3, 3)) == (
            255,
            0,
            0,
        )


WHITE, BLACK = (255, 255, 255), (0, 0, 0)


@pytest.mark.parametrize(
    ("bits", "color_type", "row", "width", "transparent", "expected"),
    [
        (1, 0, b"\x50", 4, b"\0\0", [WHITE] * 4),
        (1, 0, b"\x50", 4, b"\0\1", [BLACK, WHITE, BLACK, WHITE]),
        (2, 0, b"\x1b", 4, b"\0\1", [BLACK, WHITE, (170,) * 3, WHITE]),
        (4, 0, b"\x3c", 2, b"\0\3", [WHITE, (204,) * 3]),
        (8, 0, b"\7\x09", 2, b"\0\7", [WHITE, (9,) * 3]),
        (16, 0, b"\x07\x01\x07\x02", 2, b"\x07\x01", [WHITE, (6,) * 3]),
        (8, 2, b"\1\2\3\4\5\6", 2, b"\0\1\0\2\0\3", [WHITE, (4, 5, 6)]),
        (16, 2, b"\1\x09\2\x09\3\x09\4\0\5\0\6\0", 2, b"\1\x09\2\x09\3\x09", [WHITE, (4, 5, 6)]),
    ],
    ids=["1 bit, black", "1 bit, white", "2 bits", "4 bits", "8 bits", "16 bits", "RGB", "RGB of 16 bits"],
)
def test_the_transparent_color_of_a_png_becomes_white_at_every_depth(
    bits, color_type, row, width, transparent, expected
):
    assert colors(png(bits, color_type, row, width, chunk(b"tRNS", transparent))) == expected
    in_memory = Image.open(io.BytesIO(png(bits, color_type, row, width, chunk(b"tRNS", transparent)).source))
    assert colors(ImageRef(in_memory)) == expected


def test_alpha_of_16_bits_and_of_palettes_becomes_white():
    assert colors(png(16, 4, b"\7\1\xff\xff\7\2\0\0", 2)) == [(7, 7, 7), WHITE]
    assert colors(png(16, 6, b"\7\1\7\2\7\3\0\0", 1)) == [WHITE]
    palette = chunk(b"PLTE", bytes([1, 2, 3, 4, 5, 6]))
    assert colors(png(1, 3, b"\x50", 4, palette, chunk(b"tRNS", b"\0"))) == [WHITE, (4, 5, 6)] * 2


@pytest.mark.parametrize("mode", ["LA", "La", "RGBA", "RGBa", "PA"])
def test_clear_pixels_of_every_mode_with_alpha_are_white(mode):
    assert decode_image(ImageRef(Image.new(mode, (2, 2)))).getpixel((0, 0)) == WHITE


def test_modes_with_a_channel_that_is_called_a_but_is_no_alpha_keep_their_colors():
    assert decode_image(ImageRef(Image.new("LAB", (2, 2)))).getpixel((0, 0)) != WHITE


@pytest.mark.parametrize(("largest", "scale"), [(1.0, 255), (255.0, 1), (65535.0, 1 / 257)])
def test_floats_are_scaled_by_what_they_go_to(largest, scale):
    values = np.linspace(0, largest, 64, dtype=np.float32).reshape(8, 8)
    expected = np.round(values * scale).astype(int)
    shown = np.asarray(decode_image(ImageRef(encode(Image.fromarray(values), "TIFF"))), dtype=int)
    assert np.abs(shown - expected[..., None]).max() <= 1 and shown.max() == 255 and shown.min() == 0


def test_a_float_that_is_no_number_is_black():
    values = np.full((2, 2), np.nan, np.float32)
    assert decode_image(ImageRef(Image.fromarray(values))).getpixel((0, 0)) == BLACK


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A `gs` on the path that leaves a mark where it is run."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return tmp_path / "ran"


def test_an_eps_named_png_never_reaches_ghostscript(ghostscript, tmp_path):
    (tmp_path / "a.png").write_bytes(EPS)
    for source in (tmp_path / "a.png", EPS, Image.open(io.BytesIO(EPS))):
        for decode in (decode_image, decode_array):
            with pytest.raises(RecordError, match=r"The image .* JPEG, PNG"):
                decode(ImageRef(source))
    assert not ghostscript.exists()
    with suppress(OSError):  # Pillow alone would run it
        Image.open(io.BytesIO(EPS)).load()
    assert ghostscript.exists()


@pytest.mark.parametrize("data", [b"%PDF-1.7\n", b"\xd7\xcd\xc6\x9a" + bytes(40), b"8BPS" + bytes(40)])
def test_documents_and_drawings_are_no_images(data):
    with pytest.raises(RecordError, match="it is no JPEG, PNG"):
        decode_image(ImageRef(data))


def test_one_function_alone_opens_images():
    """And it gives Pillow the list of formats."""
    openings = []
    for file in Path(cafe.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                openings.append((file.name, [keyword.arg for keyword in node.keywords]))
    assert openings and set(name for name, _ in openings) == {"decoding.py"}
    assert all(keywords == ["formats"] for _, keywords in openings)


@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "link to a device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a.png"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
        case "directory":
            path.mkdir()
        case _:
            path.symlink_to("/dev/zero")
    for decode in (decode_image, decode_array):
        with pytest.raises(RecordError, match=f"The image {path} is a"):
            decode(ImageRef(path))


def test_a_file_over_the_limit_is_refused_before_it_is_read(tmp_path):
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(
        RecordError, match=r"a\.png has 1,099,511,627,776 bytes, over the limit .*data\.max_image_bytes"
    ):
        decode_image(ImageRef(tmp_path / "a.png"))
    data = encode(noise(0, 16, 16), "PNG")
    assert decode_image(ImageRef(data, ImageLimits(max_bytes=len(data)))).size == (16, 16)
    with pytest.raises(RecordError, match=r"data\.max_image_bytes"):
        decode_image(ImageRef(data, ImageLimits(max_bytes=len(data) - 1)))


def test_more_pixels_than_the_limit_are_refused_by_the_name_of_its_field():
    bomb = encode(Image.new("1", (10_000, 10_000)), "PNG")
    with pytest.raises(
        RecordError, match=r"10000 x 10000 pixels, over the limit of 89,478,485 \(data\.max_image_pixels"
    ):
        decode_image(ImageRef(bomb))
    assert (
        decode_image(ImageRef(encode(Image.new("1", (300, 300)), "PNG"), ImageLimits(max_pixels=90_000))).width == 300
    )


@pytest.mark.parametrize("url", ["http://localhost/x.png", "s3://bucket/x.png", "file:///x.png"])
def test_a_url_in_the_place_of_a_path_is_told(url):
    with pytest.raises(RecordError, match=f"{url} is a URL, which is not taken here"):
        Content.of({"image": url})
    with pytest.raises(RecordError, match="is a URL, which is not taken here"):
        decode_image(Content.of(Path(url)).images[0])


def test_images_that_are_closed_or_have_no_pixels_are_told(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(noise(0, 4, 4), "PNG"))
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    with pytest.raises(RecordError, match="closed image"):
        decode_image(ImageRef(closed))
    for size in ((0, 5), (5, 0)):
        with pytest.raises(RecordError, match=f"has {size[0]} x {size[1]} pixels"):
            decode_array(ImageRef(Image.new("RGB", size)))


def test_no_message_holds_a_long_name_whole(tmp_path):
    name = base64.b64encode(random.Random(0).randbytes(3000)).decode()
    with pytest.raises(RecordError) as raised:
        decode_image(ImageRef(tmp_path / name))
    assert len(str(raised.value)) < 600


@settings(deadline=None)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**32))
def test_mutated_images_are_decoded_or_bad_records(kind, seed):
    rng = random.Random(seed)
    data = bytearray(encode(noise(seed % 4, 24, 17), kind))
    for _ in range(rng.randint(1, 8)):
        start = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(64, len(data)))
        match rng.randrange(3):
            case 0:
                data[start] = rng.randrange(256)
            case 1:
                data[start : start + 4] = rng.choice([b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"])
            case _:
                del data[start : start + rng.randint(1, len(data))]
                data += b"\0"
    for decode in (decode_image, decode_array):
        try:
            assert decode(ImageRef(bytes(data))) is not None
        except RecordError as error:
            assert len(str(error)) < 1000
