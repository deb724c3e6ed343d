"""What a record calls an image becomes one, and stands where its token does."""

import base64
import io
import random
import unicodedata

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import noise, png

from cafe.content import Content, ImageRef
from cafe.data.image_fields import image_refs, place_images, subsample
from cafe.data.source import Source
from cafe.errors import CafeError
from cafe.images.decoding import FORMATS, decode_image
from cafe.images.thumbnails import thumbnail


def color_of(ref: ImageRef) -> tuple[int, ...]:
    return tuple(np.asarray(decode_image(ref))[0, 0].tolist())


def test_every_way_to_give_an_image_gives_the_same_image(tmp_path):
    data = png("red")
    coded = base64.b64encode(data).decode()
    (tmp_path / "a.png").write_bytes(data)
    fsspec.filesystem("memory").pipe("/images/a.png", data)
    source = Source(path=str(tmp_path / "x.json"), allow_urls=("memory",))
    ways = [
        "a.png", str(tmp_path / "a.png"), "memory://images/a.png", data, coded, f"data:image/png;base64,{coded}",
        {"bytes": data, "path": None}, {"bytes": None, "path": "a.png"}, Image.open(io.BytesIO(data)), ["a.png"],
    ]  # fmt: skip
    for way in ways:
        [ref] = image_refs(way, source)
        assert color_of(ref) == (255, 0, 0), way
    [ref] = image_refs("a.png", Source(path="x.json", images="memory://images"))
    assert color_of(ref) == (255, 0, 0)
    assert [image_refs(nothing, source) for nothing in (None, "", b"", [], {"bytes": None, "path": ""})] == [[]] * 5


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind in (Image.init(), Image.SAVE)[1] and kind != "PPM"])
def test_base64_is_told_from_a_path_for_every_usual_kind(kind):
    [ref] = image_refs(base64.b64encode(png("red", (32, 32), kind)).decode(), Source(path="x.json"))
    assert isinstance(ref.source, bytes) and decode_image(ref).size == (32, 32)


def test_base64_of_another_kind_is_refused_in_a_short_sentence():
    for data in (random.Random(0).randbytes(9000), b"%!PS-Adobe-3.0 EPSF-3.0" + bytes(9000)):
        text = base64.b64encode(data).decode()
        for way in (text, f"data:image/png;base64,{text}", f"images/{text}.png", [text]):
            with pytest.raises(CafeError) as raised:
                for ref in image_refs(way, Source(path="x.json")):
                    decode_image(ref)
            assert len(str(raised.value)) < 700 and text[300:600] not in str(raised.value)


@pytest.mark.parametrize("name", ["QkM", "a", "train/images/0001", "9j/4AAQ"])
def test_a_path_without_a_dot_is_no_base64(tmp_path, name):
    [ref] = image_refs(name, Source(path=str(tmp_path / "x.json")))
    assert ref.source == tmp_path / name


def test_images_have_the_limits_of_their_source(tmp_path):
    data = png("red", (32, 32))
    (tmp_path / "a.png").write_bytes(data)
    fsspec.filesystem("memory").pipe("/limited/a.png", data)
    coded = base64.b64encode(data).decode()
    bytes_limit = {"max_image_bytes": len(data) - 1}
    for limits, field in ((bytes_limit, "data.max_image_bytes"), ({"max_image_pixels": 1023}, "data.max_image_pixels")):
        source = Source(path=str(tmp_path / "x.json"), allow_urls=("memory",), **limits)
        for way in (
            "a.png",
            "memory://limited/a.png",
            data,
            coded,
            f"data:;base64,{coded}",
            {"bytes": data},
            ["a.png"],
        ):
            with pytest.raises(CafeError, match=field):
                decode_image(image_refs(way, source)[0])


def test_a_folder_is_a_video_with_frames_in_numeric_order(tmp_path):
    (tmp_path / "clip").mkdir()
    for number in (10, 9, 2, 1):
        (tmp_path / "clip" / f"frame{number}.png").write_bytes(png("red"))
    (tmp_path / "clip" / "frame²².png").write_bytes(png("red"))  # digits by their name, but of no number
    (tmp_path / "clip" / "notes.txt").write_text("no image")
    refs = image_refs("clip", Source(path=str(tmp_path / "x.json")))
    assert [ref.source.stem for ref in refs] == ["frame1", "frame2", "frame9", "frame10", "frame²²"]
    thinned = image_refs("clip", Source(path=str(tmp_path / "x.json"), max_frames=2))
    assert [ref.source.stem for ref in thinned] == ["frame2", "frame10"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CafeError, match="holds no images"):
        image_refs("empty", Source(path=str(tmp_path / "x.json")))


@pytest.mark.parametrize("name", ["nosuch://bucket/0001", "nosuch://bucket/0001.png"])
def test_a_url_that_cannot_be_opened_is_named(name):
    """As http:// where fsspec's package for it is not installed."""
    fsspec.register_implementation("nosuch", "no_such_package.FileSystem", errtxt="install it", clobber=True)
    with pytest.raises(CafeError, match=f"{name} cannot be read: install it"):
        image_refs(name, Source(path="x.json", images="nosuch://bucket"))


def test_frames_are_taken_evenly():
    assert subsample(list(range(9)), 3) == [1, 4, 7] and subsample(list(range(2)), 3) == [0, 1]


def test_a_video_file_or_a_wrong_kind_is_named():
    with pytest.raises(CafeError, match=r"b\.mp4 is a video"):
        image_refs("b.mp4", Source(path="x.json"))
    with pytest.raises(CafeError, match="not int"):
        image_refs(3, Source(path="x.json"))
    with pytest.raises(CafeError, match="not valid base64"):
        image_refs("data:image/png;base64,&&", Source(path="x.json"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["bytes", "path", "x"]), inner),
)


@settings(deadline=None)
@given(value=VALUES, kind=st.sampled_from(["json", "tar"]), folder=st.sampled_from(["nowhere", "memory://nowhere/x"]))
def test_any_value_in_an_image_field_gives_images_or_a_bad_record(value, kind, folder):
    try:
        for ref in image_refs(value, Source(path=f"x.{kind}", images=folder)):
            decode_image(ref)
    except CafeError as error:
        assert len(str(error)) < 1000


def test_deeply_nested_lists_of_images_are_a_bad_record():
    nested: list = []
    for _ in range(10_000):
        nested = [nested]
    with pytest.raises(CafeError, match="in more than 8 lists"):
        image_refs(nested, Source(path="x.json"))


def test_images_stand_at_their_tokens_and_the_others_first():
    one, two = ImageRef(b"1"), ImageRef(b"2")
    assert place_images("from <image> to <image>\n?", [one, two]) == Content(("from ", one, " to ", two, "?"))
    assert place_images("what?", [one, two]) == Content((one, two, "what?"))
    assert place_images("", [one]) == Content((one,)) and place_images("", []) == Content(())
    with pytest.raises(CafeError, match="shows 2 images and only 1"):
        place_images("<image> <image>", [one])


def test_images_keep_their_order_when_there_are_fewer_marks():
    refs = [ImageRef(bytes([number])) for number in range(4)]
    assert place_images("in <image> what happens?", refs) == Content(("in ", *refs, " what happens?"))
    assert place_images("<image> and <image>", refs) == Content((*refs, " and "))


def test_line_breaks_of_windows_beside_an_image_belong_to_its_mark_too():
    ref = ImageRef(b"1")
    assert place_images("Look:\r\n<image>\r\nWhat?", [ref]) == place_images("Look:\n<image>\nWhat?", [ref])
    assert place_images("<image>\r\nWhat?\r\n", [ref]) == Content((ref, "What?"))


@pytest.mark.parametrize(("stored", "named"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_in_either_form_of_unicode(tmp_path, stored, named):
    folder, file = (unicodedata.normalize(stored, name) for name in ("Zoë", "café.png"))
    (tmp_path / folder).mkdir()
    (tmp_path / folder / file).write_bytes(png("red"))
    for name in (f"Zoë/{file}", "Zoë/café.png", "Zoë"):
        [ref] = image_refs(unicodedata.normalize(named, name), Source(path=str(tmp_path / "x.json")))
        assert color_of(ref) == (255, 0, 0)
    [missing] = image_refs("thé.png", Source(path=str(tmp_path / "x.json")))
    assert missing.source == tmp_path / "thé.png"


def test_thumbnails_are_exact_for_small_images_and_reduced_for_large_ones():
    small, large = noise(0, 64, 48), noise(1, 400, 200)
    kinds, shown = [], []
    for image in (small, large):
        kind, data = thumbnail(image).split(";base64,")
        kinds.append(kind)
        shown.append(decode_image(ImageRef(base64.b64decode(data))))
    assert kinds == ["data:image/png", "data:image/jpeg"] and large.size == (400, 200)
    assert shown[0].tobytes() == small.tobytes() and shown[1].size == (192, 96)
