"""What becomes of each item: files, bad files, and records of sources."""

import hashlib
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from collection_samples import place
from PIL import Image
from samples import noise, png

from cafe.content import ImageLimits
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import RecordError
from cafe.index.reading import FileItem, Reader, RecordItem
from cafe.lvlm.processing import with_fast_images

LIMITS = ImageLimits(max_bytes=100_000, max_pixels=10_000)


@pytest.fixture
def make_reader(tiny):
    """Make a reader of the tiny model."""
    chat_processor, _ = with_fast_images(tiny.chat_processor)
    return lambda source=None, known=(), prompt="": Reader(
        chat_processor, np.sort(np.array([key.encode() for key in known] or [b""])), prompt, LIMITS, source
    )


def file_item(path):
    return FileItem(place(str(path), None, mtime_ns=7))


def bytes_of(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def animated():
    frames = [Image.new("P", (9, 9), number) for number in range(3)]
    return bytes_of(frames[0], "GIF", save_all=True, append_images=frames[1:])


def bits_16():
    return Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100)


UNUSUAL = {
    "cmyk.jpg": lambda: bytes_of(noise(0, 20, 10).convert("CMYK"), "JPEG"),
    "animated.gif": animated,
    "16_bit.png": lambda: bytes_of(bits_16(), "PNG"),
    "16_bit.tif": lambda: bytes_of(bits_16(), "TIFF"),
    "palette.png": lambda: bytes_of(noise(0, 20, 10).convert("P"), "PNG"),
    "transparent.png": lambda: bytes_of(Image.new("RGBA", (9, 8), (255, 0, 0, 0)), "PNG"),
    "one_pixel.png": lambda: png("red", (1, 1)),
    "line.png": lambda: png("red", (1, 5000)),
    "png_named.jpg": lambda: png("red"),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_are_read_as_the_model_reads_them(tmp_path, make_reader, tiny, name):
    (tmp_path / name).write_bytes(UNUSUAL[name]())
    [reading] = make_reader()[[file_item(tmp_path / name)]]
    assert reading.place.error is None and reading.encoded is not None
    assert reading.place.key == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()[:32]
    with Image.open(tmp_path / name) as image:
        assert (reading.encoded.width, reading.encoded.height) == image.size


BAD = {
    "truncated.png": (lambda: bytes_of(noise(0, 40, 40), "PNG")[:900], "cannot be decoded"),
    "truncated.jpg": (lambda: bytes_of(noise(0, 40, 40), "JPEG")[:200], "cannot be decoded"),
    "empty.png": (lambda: b"", "it is no JPEG, PNG"),
    "text.jpg": (lambda: b"a letter", "it is no JPEG, PNG"),
    "program.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", "it is no JPEG, PNG"),
    "many_pixels.png": (lambda: png("red", (200, 51)), "200 x 51 pixels, over the limit of 10,000"),
    "many_bytes.png": (lambda: png("red") + bytes(100_000), "bytes, over the limit of 100,000"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_read_with_its_reason_and_spoils_no_other(tmp_path, make_reader, name):
    data, reason = BAD[name]
    (tmp_path / name).write_bytes(data())
    (tmp_path / "good.png").write_bytes(png("red"))
    bad, good = make_reader()[[file_item(tmp_path / name), file_item(tmp_path / "good.png")]]
    assert bad.place.key is None and bad.encoded is None and reason in bad.place.error
    assert bad.place.mtime_ns == 7  # read again when it changes
    assert good.encoded is not None and good.place.error is None


def test_what_is_no_regular_file_is_bad_and_never_waited_for(tmp_path, make_reader):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    pipe, circle = make_reader()[[file_item(tmp_path / "pipe.png"), file_item(tmp_path / "circle.png")]]
    assert "a pipe or a device" in pipe.place.error and "Too many levels of symbolic links" in circle.place.error


def test_an_error_of_the_system_is_tried_again_though_the_file_is_unchanged(tmp_path, make_reader, monkeypatch):
    (tmp_path / "a.png").write_bytes(png("red"))
    reader = make_reader()
    for error, reason in ((OSError(5, "Input/output error"), "Input/output error"), (MemoryError(), "enough memory")):
        monkeypatch.setattr(Reader, "_read_file", lambda *_, error=error: (_ for _ in ()).throw(error))
        [reading] = reader[[file_item(tmp_path / "a.png")]]
        assert reason in reading.place.error and reading.place.mtime_ns == -1


def test_known_content_is_hashed_and_not_decoded(tmp_path, make_reader, monkeypatch):
    (tmp_path / "a.png").write_bytes(png("red"))
    key = hashlib.sha256(png("red")).hexdigest()[:32]
    reader = make_reader(known=["0" * 32, key, "f" * 32])
    monkeypatch.setattr(Reader, "_encode", lambda *_: 1 / 0)
    [reading] = reader[[file_item(tmp_path / "a.png")]]
    assert reading.place.key == key and reading.encoded is None and reading.place.error is None


def read_source(make_reader, path, **fields):
    source = open_source(Source(path=str(path), **fields), LIMITS)
    return make_reader(source)[[RecordItem(number) for number in range(len(source))]]


def test_images_of_a_table_are_read_by_path_with_their_captions_and_columns(tmp_path, make_reader):
    (tmp_path / "a.png").write_bytes(png("red"))
    (tmp_path / "t.csv").write_text("image,caption,year\na.png,a red thing,1999\nnone.png,nothing,2000\n,empty,1\n")
    red, missing, empty = read_source(make_reader, tmp_path / "t.csv")
    assert red.place.id == red.place.path == str(tmp_path / "a.png") and red.place.name == "a.png"
    assert red.encoded.text == "a red thing" and red.place.root == str(tmp_path / "t.csv")
    assert json.loads(red.place.columns) == {"image": "a.png", "caption": "a red thing", "year": "1999"}
    assert "No such file" in missing.place.error
    assert empty.place.id == f"{tmp_path / 't.csv'}#record=2" and empty.place.error and empty.encoded is None


def test_a_table_without_the_column_of_images_says_how_to_name_it(tmp_path, make_reader):
    (tmp_path / "t.csv").write_text("file,caption\na.png,a red thing\n")
    [reading] = read_source(make_reader, tmp_path / "t.csv")
    assert "no column 'image'; there are file, caption: say which" in reading.place.error
    assert "columns='{image: file}'" in reading.place.error


def test_images_of_parquet_are_read_from_bytes_several_in_a_record(tmp_path, make_reader):
    rows = [{"image": [png("red")], "caption": "one"}, {"image": [png("blue"), png("green")], "caption": "two"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    path = str(tmp_path / "t.parquet")
    readings = read_source(make_reader, path)
    assert [reading.place.id for reading in readings] == [f"{path}#record=0", f"{path}#record=1", f"{path}#record=1.1"]
    assert [reading.place.path for reading in readings] == [path] * 3
    assert [reading.encoded.text for reading in readings] == ["one", "two", "two"]
    digests = [hashlib.sha256(png(color)).hexdigest()[:32] for color in ("red", "blue", "green")]
    assert [reading.place.key for reading in readings] == digests


def test_whatever_a_record_holds_is_an_image_or_a_reason(tmp_path, make_reader):
    values = [5, 1.5, True, [], {}, {"bytes": None}, "x\ud800.png", "\0", "../../etc/passwd", "http://a/b.png", [[5]]]
    lines = [json.dumps({"image": value, "caption": "\ud800"}) for value in values]
    (tmp_path / "t.jsonl").write_text("\n".join([*lines, "[]", "7", "null", "{"]))
    readings = read_source(make_reader, tmp_path / "t.jsonl")
    assert len(readings) == len(values) + 4
    for reading in readings:
        assert reading.place.error and reading.encoded is None
        reading.place.id.encode()  # what names it can be written


def test_a_page_that_is_damaged_is_bad_alone(make_reader, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "cafe.index.reading.read_pages", lambda *_: (2, [RecordError("Page 1 is bad."), (noise(0, 20, 30), "words")])
    )
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    item = FileItem(place(str(tmp_path / "a.pdf"), None), first_page=1)
    first, second, end = make_reader()[[item]]
    assert first.place.error == "Page 1 is bad." and first.place.page == 1 and first.encoded is None
    assert second.encoded.text == "words" and second.place.id == f"{tmp_path / 'a.pdf'}#page=2"
    assert end.place.id == item.place.id and not end.next_pages and end.place.key is None
