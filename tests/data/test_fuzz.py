"""Whatever a file holds, reading it ends in an example or in an error that is meant for the user."""

import io
import json
import math
import tarfile
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from samples import png

from cafe.data.encoding import encode_example
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import CafeError
from cafe.utils.text import escape_controls

# The files of a test's examples take turns in one directory.
files = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
FORMATS = ["llava", "karpathy", "mmeb", "pairs"]
WORDS = [
    *("", " ", "a cat", "<image>", "<video>", "<|image_1|>", "<image>\r\n<image>", "\ud800", "\x1b[2J", "a\0b"),
    *("[", '["a"]', "0.png", "none.png", "\udc80.png", "e\u0301.png", "a" * 5000 + "é", "..", "clip", "a.mp4"),
    *("data:,", "data:;base64,&"),
    *("iVBORw0KGgoAAAA", "zip://a.png::none.zip", "zip://a.png::0.png", "nosuch://a", "memory://none/a.png", "://"),
    *("human", "gpt", "user", "assistant", "system", "train", "text", "image"),
]  # fmt: skip
NAMES = [
    *("id", "__key__", "image", "images", "video", "conversations", "texts", "negatives", "negative_scores", "split"),
    *("filename", "filepath", "sentences", "qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text"),
    *(
        "neg_image_path",
        "query",
        "query_image",
        "positive",
        "positive_image",
        "negative_images",
        "raw",
        "from",
        "value",
    ),
    *("role", "content", "type", "text", "user", "assistant", "bytes", "path", "\ud800", "\x1b"),
]
ANY_TEXT = st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=()), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | ANY_TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
TURNS = st.lists(st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": ANY_TEXT}), max_size=4)
SENTENCES = st.lists(st.fixed_dictionaries({"raw": ANY_TEXT}), max_size=3)
ROWS = st.dictionaries(st.sampled_from(NAMES), VALUES | TURNS | SENTENCES, max_size=12) | VALUES


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "0.png").write_bytes(png("red"))
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "1.png").write_bytes(png("green"))
    return tmp_path


def read_all(path, kind, chat_processor=None):
    """Read every record, and encode it; errors that name it are as right as an example."""
    try:
        records = open_source(Source(path=str(path), format=kind, answer_prompt="Describe."))
    except CafeError as error:
        assert str(error)
        return
    for index in range(min(len(records), 20)):
        try:
            example = records.example(index, Random(0))
            assert example.pair or example.dialogue
            if chat_processor:
                encode_example(example, chat_processor, max_tokens=200)
        except CafeError as error:
            assert str(error).startswith(str(path)) and str(error) == escape_controls(str(error))


@pytest.mark.parametrize("kind", FORMATS)
@files
@given(rows=st.lists(ROWS, min_size=1, max_size=4))
def test_any_json_value_in_any_field_is_an_example_or_a_bad_record(folder, chat_processor, kind, rows):
    (folder / "a.json").write_text(json.dumps({"images": rows} if kind == "karpathy" else rows))
    read_all(folder / "a.json", kind, chat_processor)
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read_all(folder / "a.jsonl", kind)


@files
@given(rows=st.lists(st.dictionaries(st.sampled_from(NAMES), SCALARS, min_size=1, max_size=5), min_size=1, max_size=4))
def test_any_json_in_a_tar_is_an_example_or_a_bad_record(folder, rows):
    with tarfile.open(folder / "a.tar", "w") as tar:
        for number, row in enumerate(rows):
            data = json.dumps(row).encode()
            info = tarfile.TarInfo(f"{number}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    for kind in ("llava", "pairs"):
        read_all(folder / "a.tar", kind)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "tsv", "tar", "parquet"])
@files
@given(data=st.binary(max_size=200) | st.text(st.sampled_from('",\t\n\r[]{}:ab1'), max_size=60).map(str.encode))
def test_any_bytes_are_a_file_of_records_or_an_error(folder, suffix, data):
    (folder / f"a.{suffix}").write_bytes(data)
    for kind in ("pairs", "karpathy"):
        read_all(folder / f"a.{suffix}", kind)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@files
@given(cells=st.lists(st.lists(ANY_TEXT, min_size=1, max_size=4), max_size=5))
def test_any_cells_are_examples_or_bad_records(folder, suffix, cells):
    lines = [["query", "query_image", "positive"], *cells]
    text = "\n".join(("," if suffix == "csv" else "\t").join(line) for line in lines)
    (folder / f"a.{suffix}").write_bytes(text.encode(errors="surrogatepass"))
    read_all(folder / f"a.{suffix}", "pairs")


@files
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
def test_a_changed_byte_of_a_parquet_file_is_an_example_or_an_error(folder, position, value):
    out = io.BytesIO()
    table = pa.table({"query": ["a", "b"], "positive": [["c"], ["d"]], "negative_scores": [[0.1], [math.nan]]})
    pq.write_table(table, out, compression="none")
    data = bytearray(out.getvalue())
    data[int(position * len(data))] = value
    (folder / "a.parquet").write_bytes(data)
    read_all(folder / "a.parquet", "pairs")


@pytest.mark.parametrize(
    "name", ["zip://a.png::0.png", "zip://a.png::none.zip", "nosuch://a.png", "a.png\0", "\ud800.png"]
)
def test_an_image_that_cannot_be_opened_by_its_name_is_a_bad_record(folder, chat_processor, name):
    (folder / "a.jsonl").write_text(json.dumps({"query_image": name.replace("::", f"::{folder}/"), "positive": "a"}))
    records = open_source(Source(path=str(folder / "a.jsonl"), format="pairs"))
    with pytest.raises(CafeError, match=r"a\.jsonl, record 0") as error:
        encode_example(records.example(0, Random(0)), chat_processor)
    assert str(error.value) == escape_controls(str(error.value))
