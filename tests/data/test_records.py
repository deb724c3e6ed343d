"""Public formats become Examples; bad records are named."""

import csv
import io
import json
import tarfile
from random import Random

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import png

from cafe.data.encoding import content_hash
from cafe.data.records import open_source
from cafe.data.source import Columns, Source
from cafe.errors import CafeError
from cafe.images.decoding import decode_image


def turns(*values):
    return [{"from": ("human", "gpt")[index % 2], "value": value} for index, value in enumerate(values)]


def write(path, rows):
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return open_source(Source(path=str(path)))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_llava_record_pairs_its_image_with_the_first_answer(tmp_path, name):
    row = {"id": "7", "image": "p.png", "conversations": turns("<image>\nDescribe.", "a cat", "Color?", "black")}
    example = write(tmp_path / name, [row | {"negatives": ["a dog"]}]).example(0, Random(0))
    assert example.pair.query.images[0].source == tmp_path / "p.png"
    assert example.pair.target.text == "a cat" and example.pair.negatives[0].text == "a dog"
    assert [turn.content.text for turn in example.dialogue.turns] == ["Describe.", "a cat", "Color?", "black"]
    assert example.dialogue.turns[0].content.images == example.pair.query.images
    assert "record 0 (id 7)" in example.origin


def test_a_source_that_is_not_contrasted_gives_dialogues_alone(tmp_path):
    row = {"image": "p.png", "conversations": turns("<image>\nIs it a cat?", "yes")}
    write(tmp_path / "a.json", [row])
    example = open_source(Source(path=str(tmp_path / "a.json"), use_pairs=False)).example(0, Random(0))
    assert example.pair is None and example.dialogue.turns[1].content.text == "yes"
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"query": "cat", "positive": "a cat"}]))
    with pytest.raises(CafeError, match="there is no dialogue"):
        open_source(Source(path=str(pairs), format="pairs", use_pairs=False)).example(0, Random(0))


@pytest.mark.parametrize("pattern", ["*/x.json", "{a,b}/x.json"])
def test_image_paths_are_relative_to_each_file_of_a_pattern(tmp_path, pattern):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x.json", [{"image": "p.png", "conversations": turns("<image>", name)}])
    records = open_source(Source(path=f"{tmp_path}/{pattern}"))
    pairs = [records.example(index, Random(0)).pair for index in (0, 1)]
    assert [pair.query.images[0].source for pair in pairs] == [tmp_path / pair.target.text / "p.png" for pair in pairs]
    elsewhere = open_source(Source(path=f"{tmp_path}/{pattern}", images="/images")).example(1, Random(0))
    assert str(elsewhere.pair.query.images[0]) == "/images/p.png"


def test_csv_cells_hold_lists_as_json_or_one_negative(tmp_path):
    said = turns("<image>What is it?", "A cat.")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "conversations", "negatives", "negative_scores"])
        rows.writerow(["a.png", json.dumps(said), '["a dog", "a cow"]', "[0.5, 0]"])
        rows.writerow(["a.png", json.dumps(said), "a dog", ""])
    records = open_source(Source(path=str(tmp_path / "a.csv")))
    several, one = (records.example(index, Random(0)).pair for index in range(2))
    assert [negative.text for negative in several.negatives] == ["a dog", "a cow"]
    assert several.negative_scores == (0.5, 0) and several.target.text == "A cat."
    assert [negative.text for negative in one.negatives] == ["a dog"]


def test_a_list_of_captions_in_a_csv_cell_gives_one_of_them(tmp_path):
    """Flickr30K's CSV on the Hub."""
    captions = ["A red square.", "A square that is red."]
    with (tmp_path / "flickr.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["raw", "filename"], [json.dumps(captions), "0.png"]])
    columns = Columns(query_image="filename", positive="raw")
    records = open_source(Source(path=str(tmp_path / "flickr.csv"), format="pairs", columns=columns))
    assert {records.example(0, Random(seed)).pair.target.text for seed in range(20)} == set(captions)


def test_parquet_with_a_caption_per_row_pairs_each_with_its_images_bytes(tmp_path):
    rows = [(color, f"{way} {color} square") for color in ("red", "green") for way in ("a", "one")]
    images = [{"bytes": png(color), "path": f"{color}.png"} for color, _ in rows]
    pq.write_table(pa.table({"image": images, "caption": [text for _, text in rows]}), tmp_path / "a.parquet")
    columns = Columns(query_image="image", positive="caption")
    records = open_source(Source(path=str(tmp_path / "a.parquet"), format="pairs", columns=columns))
    pairs = [records.example(index, Random(0)).pair for index in range(len(records))]
    assert [(pair.query.images[0].source, pair.target.text) for pair in pairs] == [(png(c), text) for c, text in rows]
    ids = [content_hash(pair.query) for pair in pairs]
    assert ids[0] == ids[1] != ids[2] == ids[3]  # equal queries, which are not contrasted


def test_columns_that_the_format_does_not_read_are_an_error(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns("a", "b")}]))
    with pytest.raises(CafeError, match=r"format llava of .* does not read columns\.query_image"):
        open_source(Source(path=str(tmp_path / "a.json"), columns=Columns(query_image="picture")))
    with pytest.raises(CafeError, match=r"format mmeb of .* does not read columns\.image: of columns, it takes none"):
        open_source(Source(path=str(tmp_path / "a.json"), format="mmeb", columns=Columns(image="picture")))


def test_a_records_words_reach_messages_escaped(tmp_path):
    row = {"id": "\x1b[2J\ud800\u202e", "image": "a.png", "conversations": turns("a", "")}
    with pytest.raises(CafeError, match="turn 1") as error:
        write(tmp_path / "a.json", [row]).example(0, Random(0))
    assert r"(id \x1b[2J\ud800\u202e)" in str(error.value) and str(error.value).isprintable()
    names = {"\x9b31m": 1}
    (tmp_path / "b.json").write_text(json.dumps([names]))
    with pytest.raises(CafeError, match=r"there are \\x9b31m") as error:
        open_source(Source(path=str(tmp_path / "b.json"), format="pairs")).example(0, Random(0))
    assert str(error.value).isprintable()


def test_several_images_stand_where_their_tokens_do(tmp_path):
    row = {"image": ["a.png", "b.png"], "conversations": turns("from <image> to <image>?", "yes")}
    parts = write(tmp_path / "a.json", [row]).example(0, Random(0)).dialogue.turns[0].content.parts
    assert [part if isinstance(part, str) else part.source.name for part in parts] == [
        "from ", "a.png", " to ", "b.png", "?",
    ]  # fmt: skip


def test_a_text_only_record_trains_language_only(tmp_path):
    example = write(tmp_path / "a.json", [{"conversations": turns("Hello", "Hi")}]).example(0, Random(0))
    assert example.pair is None and example.dialogue is not None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"conversations": turns("a", "")}, "turn 1 of the conversation is empty"),
        ({"conversations": turns("a", 3)}, "turn 1 of the conversation is a int and should be a text"),
        ({"conversations": turns("a", "b")[::-1]}, "turn 0 of the conversation is from 'gpt'"),
        ({"conversations": turns("a")}, "does not end with an answer"),
        ({"conversations": turns("<image>a", "b")}, "shows 1 images and only 0"),
        ({"conversations": turns("a", "b"), "negatives": [{"image": "b.png"}]}, "negatives should be a list of texts"),
        ({"image": "a.png"}, "field is missing"),
        ("text", "field is missing"),
        ({"image": "a.png", "conversations": "a"}, "field is missing"),
    ],
)
def test_a_bad_record_is_named_with_its_reason(tmp_path, row, reason):
    with pytest.raises(CafeError, match=reason) as error:
        write(tmp_path / "bad.json", [row]).example(0, Random(0))
    assert "bad.json, record 0" in str(error.value)


def test_a_karpathy_image_takes_a_random_caption(tmp_path):
    image = {"filename": "a.jpg", "filepath": "val", "sentences": [{"raw": "one"}, {"raw": "two"}]}
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": [image | {"split": split} for split in ("train", "restval", "test")]}))
    records = open_source(Source(path=str(path), images="/images", format="karpathy"))
    assert len(records) == 2
    said = {records.example(0, Random(seed)).pair.target.text for seed in range(20)}
    assert said == {"one", "two"}
    assert str(records.example(0, Random(0)).pair.query.images[0]) == "/images/val/a.jpg"


def test_a_karpathy_image_without_sentences_says_so(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"filename": "a.jpg", "split": "train", "sentences": []}]}))
    with pytest.raises(CafeError, match="it has no sentences"):
        open_source(Source(path=str(tmp_path / "a.json"), format="karpathy")).example(0, Random(0))


def test_no_image_of_another_split_is_trained_on_in_json_lines_either(tmp_path):
    image = {"filename": "a.jpg", "sentences": [{"raw": "one"}]}
    rows = [image, *(image | {"split": split} for split in ("train", "restval", None, "test"))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = open_source(Source(path=str(tmp_path / "a.jsonl"), format="karpathy"))
    assert [records.example(index, Random(0)).pair.target.text for index in range(4)] == ["one"] * 4
    with pytest.raises(CafeError, match="record 4: it is of the split 'test', and 'train' is read"):
        records.example(4, Random(0))


@pytest.mark.parametrize("text", ["{", '{"a": 1}'])
def test_a_file_of_another_format_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CafeError, match=r"x\.json"):
        open_source(Source(path=str(tmp_path / "x.json")))
    with pytest.raises(CafeError, match=r"none\.json does not exist"):
        open_source(Source(path=str(tmp_path / "none.json")))
    (tmp_path / "x.json").write_text('{"images": [1]}')
    with pytest.raises(CafeError, match='no list "images" of records'):
        open_source(Source(path=str(tmp_path / "x.json"), format="karpathy"))
    with pytest.raises(CafeError, match="path is empty"):
        open_source(Source(path=""))


def tar_of(path, colors):
    with tarfile.open(path, "w") as file:
        for color in colors:
            for kind, data in (("png", png(color)), ("txt", f"it is {color}".encode())):
                info = tarfile.TarInfo(f"{color}.{kind}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def test_shards_are_one_source_whose_records_are_named_by_shard(tmp_path):
    tar_of(tmp_path / "0.tar", ["red", "green"])
    tar_of(tmp_path / "1.tar", ["blue"])
    records = open_source(
        Source(path=str(tmp_path / "{0..1}.tar"), format="pairs", answer_prompt="Describe the image.")
    )
    examples = [records.example(index, Random(0)) for index in range(len(records))]
    assert [example.pair.target.text for example in examples] == ["it is red", "it is green", "it is blue"]
    assert records.chunks == [2, 1] and examples[2].origin == f"{tmp_path}/1.tar, record 0 (id blue)"
    assert examples[0].dialogue.turns[0].content.images == examples[0].pair.query.images


def test_a_corrupt_shard_counts_as_bad_records_by_the_others_mean(tmp_path, caplog):
    for number, colors in enumerate((["red", "green"], ["red", "green", "blue", "black"])):
        tar_of(tmp_path / f"{number}.tar", colors)
    (tmp_path / "2.tar").write_bytes(b"nonsense" * 200)
    records = open_source(Source(path=str(tmp_path / "*.tar"), format="pairs"))
    assert records.chunks == [2, 4, 3] and "2.tar cannot be read" in caplog.text
    for index in (6, 8):
        with pytest.raises(CafeError, match=rf"2\.tar, record {index - 6}: .*cannot be read"):
            records.example(index, Random(0))
    for number in range(2):
        (tmp_path / f"{number}.tar").write_bytes(b"")
    with pytest.raises(CafeError, match="None of the 3 files"):
        open_source(Source(path=str(tmp_path / "*.tar"), format="pairs"))


def test_parquet_holds_conversations_with_encoded_images(tmp_path):
    rows = [
        {"id": "7", "image": {"bytes": png("red"), "path": "a.png"}, "conversations": turns("<image>\nWhat?", "red")},
        {"id": "8", "image": None, "conversations": turns("Hello", "Hi")},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    records = open_source(Source(path=str(tmp_path / "a.parquet")))
    first, second = (records.example(index, Random(0)) for index in range(2))
    assert first.pair.query.images[0].source == png("red") and first.pair.target.text == "red"
    assert second.pair is None and "record 1 (id 8)" in second.origin


def test_a_dataset_is_a_source_by_the_names_of_its_columns(tmp_path):
    data = [{"img": {"bytes": png("red"), "path": None}, "caption": ["red", "a red one"]}]
    features = datasets.Features({"img": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_list(data, features=features).save_to_disk(tmp_path / "saved")
    columns = Columns(query_image="img", positive="caption")
    records = open_source(Source(path=str(tmp_path / "saved"), format="pairs", columns=columns))
    said = {records.example(0, Random(seed)).pair.target.text for seed in range(20)}
    assert said == {"red", "a red one"}
    assert decode_image(records.example(0, Random(0)).pair.query.images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_annotations_and_images_may_be_on_an_object_store():
    fs = fsspec.filesystem("memory")
    fs.pipe("/data/a.jsonl", json.dumps({"image": "p/a.png", "conversations": turns("Hi", "red")}).encode())
    fs.pipe("/data/p/a.png", png("red"))
    example = open_source(Source(path="memory://data/a.jsonl")).example(0, Random(0))
    assert decode_image(example.pair.query.images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_a_source_without_records_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(CafeError, match="holds no records"):
        open_source(Source(path=str(tmp_path / "a.jsonl")))
