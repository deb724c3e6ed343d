"""Content made of common values, and images decoded to RGB."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

from cafe.content import Content, ImageLimits, ImageRef, checked_content
from cafe.errors import CafeError, RecordError
from cafe.images import decoding
from cafe.images.decoding import decode_array, decode_image


def test_content_takes_text_images_and_both():
    image = Image.new("RGB", (4, 4))
    assert Content.of("words").text == "words"
    both = Content.of({"image": image, "text": "what?"})
    assert both.images[0].source is image and both.text == "what?"
    with pytest.raises(CafeError, match="int"):
        Content.of(3)
    with pytest.raises(CafeError, match="txt"):
        Content.of({"txt": "a"})
    with pytest.raises(CafeError, match="text should be a str, not a int"):
        Content.of({"image": image, "text": 3})


def test_null_stands_for_nothing_in_a_mapping():
    for mapping in (
        {"image": None, "text": "a"},
        {"images": None, "text": "a"},
        {"image": None, "images": None, "text": "a"},
    ):
        assert Content.of(mapping) == Content.of("a")
    assert [str(ref) for ref in Content.of({"image": None, "images": ["a.png"]}).images] == ["a.png"]
    with pytest.raises(CafeError, match="image or the key images, not both"):
        Content.of({"image": "a.png", "images": ["b.png"]})


def test_content_nested_too_deeply_is_refused():
    nested = ["a"]
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(CafeError, match="nested too deeply"):
        Content.of(nested)
    while isinstance(nested[0], list):  # or its destruction would be recursive too
        nested = nested[0]


def test_a_text_that_is_the_path_of_an_image_is_warned_of(tmp_path, caplog, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.png")
    (tmp_path / "notes.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    for silent in ("a cat", "dog.png", "notes.txt", {"image": "cat.png"}, "nul\0.png", "long " * 10_000):
        checked_content(silent)
    assert not caplog.records
    assert checked_content("cat.png") == Content(("cat.png",))
    assert caplog.messages == ['"cat.png" is taken as text, not as the image of that path: write {"image": "cat.png"}.']


@pytest.mark.parametrize("key", ["image", "images"])
def test_a_mapping_takes_one_image_or_a_list_and_strings_are_paths(key):
    for value, expected in (("a.png", ["a.png"]), (["a.png", "b.png"], ["a.png", "b.png"])):
        content = Content.of({key: value, "text": "words"})
        assert [str(ref) for ref in content.images] == expected and content.text == "words"


def test_an_image_that_is_no_file_is_called_by_its_name_in_messages():
    assert str(ImageRef(b"nonsense", name="photos/boat.jpg")) == "photos/boat.jpg"
    assert str(ImageRef(b"nonsense")) == "<bytes>" and str(ImageRef(Path("a/b.png"))) == "a/b.png"
    with pytest.raises(RecordError, match=r"photos/boat\.jpg"):
        decode_image(ImageRef(b"nonsense", name="photos/boat.jpg"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = orientation
    ref = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    turned, expected = decode_image(ref), ImageOps.exif_transpose(Image.open(io.BytesIO(ref.source)))
    assert np.array_equal(turned, expected) and np.array_equal(ImageOps.exif_transpose(turned), expected)
    assert np.array_equal(decode_image(ImageRef(Image.open(io.BytesIO(ref.source)))), expected)


def test_exif_orientation_is_applied_despite_another_damaged_tag():
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    resolution = struct.pack("<HHI", 0x011A, 2, 4) + b"abc\0"  # in words
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + resolution + bytes(4)
    ref = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    assert decode_image(ref).size == (4, 8) and decode_array(ref).shape == (8, 4, 3)


def test_transparency_becomes_white_and_16_bits_scale_to_8(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decode_image(ImageRef(tmp_path / "clear.png")).getpixel((0, 0)) == (255, 255, 255)
    Image.fromarray(np.full((2, 2), 65535 // 2, np.uint16)).save(tmp_path / "deep.png")
    assert decode_image(ImageRef(tmp_path / "deep.png")).getpixel((0, 0)) == (127, 127, 127)
    big_endian = Image.frombytes("I;16B", (2, 2), np.full((2, 2), 65535 // 2, ">u2").tobytes())
    big_endian.save(tmp_path / "deep.tiff")
    assert decode_image(ImageRef(tmp_path / "deep.tiff")).getpixel((0, 0)) == (127, 127, 127)
    Image.new("CMYK", (2, 2)).save(tmp_path / "ink.jpg")
    assert decode_image(ImageRef(tmp_path / "ink.jpg")).mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n damaged"])
def test_a_damaged_image_is_named(tmp_path, data):
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(CafeError, match=r"bad\.png"):
        decode_image(ImageRef(tmp_path / "bad.png"))


def test_bytes_that_are_no_image_have_the_same_message_in_every_run():
    said = []
    for _ in range(2):
        with pytest.raises(CafeError, match="The image <bytes> cannot be decoded") as raised:
            decode_image(ImageRef(b"no image"))
        said.append(str(raised.value))
    assert said[0] == said[1] and "0x" not in said[0]


def test_a_truncated_image_and_a_missing_one_are_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    with pytest.raises(CafeError, match=r"cut\.png"):
        decode_image(ImageRef(tmp_path / "cut.png"))
    with pytest.raises(CafeError, match="does not exist"):
        decode_image(ImageRef(tmp_path / "none.png"))


def test_any_decoder_error_names_the_image(monkeypatch, tmp_path):
    """AVIF's raises RuntimeError; TypeError, struct.error and others have been seen."""
    Image.new("RGB", (4, 4)).save(tmp_path / "odd.png")
    lazy = Image.open(tmp_path / "odd.png")

    def fail(image):
        raise RuntimeError("no such color plane")

    monkeypatch.setattr(PngImageFile, "load", fail)
    for image in (tmp_path / "odd.png", lazy):
        with pytest.raises(CafeError, match=r"The image .* cannot be decoded: no such color plane"):
            decode_image(ImageRef(image))


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    Image.new("1", (300, 300)).save(tmp_path / "big.png")
    with pytest.raises(CafeError, match="300 x 300"):
        decode_image(ImageRef(tmp_path / "big.png", ImageLimits(max_pixels=1000)))


def encoded(image: Image.Image, kind: str, **options) -> ImageRef:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return ImageRef(out.getvalue())


@pytest.fixture(params=["simplejpeg", "Pillow"])
def decoder(request, monkeypatch):
    """Runs a test with either decoder of plain JPEGs."""
    if request.param == "Pillow":
        monkeypatch.setattr(decoding, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    return request.param


@pytest.mark.parametrize("min_side", [None, 16, 40, 64])  # as it is, and at an eighth, a quarter and a half
@pytest.mark.parametrize("options", [{"quality": 95, "subsampling": 0}, {"quality": 30}, {"progressive": True}])
def test_decoded_arrays_of_jpegs_equal_decoded_images(decoder, min_side, options):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 240, 3), np.uint8))
    for image in (noise, noise.resize((30, 20)).resize((240, 160))):
        ref = encoded(image, "JPEG", **options)
        shown = decode_image(ref, min_side=min_side)
        assert shown.height == {None: 160, 16: 20, 40: 40, 64: 80}[min_side]
        assert np.array_equal(decode_array(ref, min_side=min_side), shown)


def test_decoded_arrays_of_other_formats_equal_decoded_images(decoder):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 8, 3), np.uint8))
    turned = noise.getexif()
    turned[0x0112] = 6
    jpegs = [encoded(noise.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    for ref in (*jpegs, encoded(noise, "JPEG", exif=turned), encoded(noise, "PNG"), ImageRef(noise.convert("RGBA"))):
        assert np.array_equal(decode_array(ref), decode_image(ref))
    assert decode_array(encoded(noise, "JPEG", exif=turned)).shape == (8, 5, 3)


def test_a_damaged_jpeg_is_named(decoder, tmp_path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    with pytest.raises(CafeError, match=r"cut\.jpg cannot be decoded: .*truncated"):
        decode_array(ImageRef(tmp_path / "cut.jpg"))
    with pytest.raises(CafeError, match="64 x 64"):
        decode_array(ImageRef(tmp_path / "whole.jpg", ImageLimits(max_pixels=1000)))
