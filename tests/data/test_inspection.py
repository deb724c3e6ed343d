"""The data check counts what is there, and shows examples as they are read."""

import json
import re

import pytest
from PIL import Image

from cafe.cli.main import main
from cafe.content import Content, Example, Pair
from cafe.data.encoding import encode_example
from cafe.data.inspection import contents, count_duplicates, inspect, percentiles
from cafe.data.inspection_page import spans, write_page
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.images.decoding import decode_image


@pytest.fixture
def messy(scenes, tmp_path):
    """Six good records, of which one repeats another's pair and one another's image, and three bad ones."""
    rows = json.loads((scenes / "llava_train.json").read_text())[:7]
    for row in rows:
        row["image"], row["negatives"] = str(scenes / row["image"]), []
    rows[1] = rows[0]
    rows[2]["image"] = rows[0]["image"]
    rows[3]["conversations"][1]["value"] = "the words <b>&"
    rows[6]["image"] = "missing.png"
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"id": 1}\n{')
    return Source(path=str(tmp_path / "a.jsonl"))


def image_sizes(source):
    examples = [open_source(source).example(index, None) for index in range(6)]
    return [Image.open(example.pair.query.images[0].source).size for example in examples]


def test_counts_are_those_of_the_file(messy, chat_processor):
    [report] = inspect([open_source(messy)], chat_processor)
    table = dict(report.table())
    expected = {
        "records": "9", "read": "9", "bad": "3", "pairs": "6", "dialogues": "6", "hard negatives": "0", "images": "6",
        "cut to max_length": "0", "images seen before": "2", "pairs seen before": "1", "targets seen before": "1",
    }  # fmt: skip
    assert {name: table[name] for name in expected} == expected
    assert all(f"record {number}" in error for number, error in zip((6, 7, 8), report.errors, strict=True))
    lengths = [len(encode_example(open_source(messy).example(index, None), chat_processor).query) for index in range(6)]
    assert report.lengths("query") == lengths
    assert table["width, pixels"] == percentiles([size[0] for size in image_sizes(messy)])
    assert int(table["supervised tokens"].replace(",", "")) == sum(
        encode_example(open_source(messy).example(index, None), chat_processor).dialogue.loss_mask.sum()
        for index in range(6)
    )


def test_records_that_are_cut_are_counted(messy, chat_processor):
    longest = max(inspect([open_source(messy)], chat_processor)[0].lengths("dialogue"))
    [report] = inspect([open_source(messy)], chat_processor, max_tokens=longest - 1)
    cut = sum(length == longest - 1 for kind in ("target", "dialogue") for length in report.lengths(kind))
    assert int(dict(report.table())["cut to max_length"]) == cut >= 1


def test_a_sample_is_as_large_as_asked(messy, chat_processor):
    [report] = inspect([open_source(messy)], chat_processor, sample=4, examples=2)
    assert len(report.stats) == 4 and report.num_records == 9 and len(report.examples) == 2


def test_every_token_is_shown_once_and_marked_by_its_kind(scenes, chat_processor):
    example = open_source(Source(path=str(scenes / "llava_train.json"))).example(0, None)
    branches = encode_example(example, chat_processor)
    images = [ref.source for ref in contents(example)["dialogue"].images]
    assert len(images) == 1
    runs = chat_processor.process_images([decode_image(ref) for ref in example.pair.query.images]).token_runs
    shown = [(runs[0], "IMAGE")]
    dialogue = spans(branches.dialogue, shown, chat_processor, embedded=False)
    assert sum(span.tokens for span in dialogue) == len(branches.dialogue)
    said = "".join(span.text for span in dialogue if span.kind == "supervised")
    wanted = branches.dialogue.input_ids[branches.dialogue.loss_mask]
    assert said == chat_processor.tokenizer.decode(wanted) and said.startswith(example.pair.target.text)
    [image] = [span for span in dialogue if span.kind == "image"]
    assert image.text == "IMAGE" and image.tokens == int(branches.dialogue.image_mask.sum())
    query = spans(branches.query, shown, chat_processor, embedded=True)
    assert [span.kind for span in query].count("readout") == 1 and query[-1].kind == "readout"
    words = "".join(span.text for span in query if span.kind != "image")
    assert "Compress this image in one word:" in words


def test_characters_of_several_tokens_stay_whole(chat_processor):
    example = Example(Pair(Content.of("日本 é"), Content.of("x")))
    shown = "".join(
        span.text for span in spans(encode_example(example, chat_processor).query, [], chat_processor, embedded=True)
    )
    assert "日本 é" in shown


def test_the_page_is_complete_and_self_contained(messy, chat_processor, tmp_path):
    write_page(tmp_path / "page.html", inspect([open_source(messy)], chat_processor, examples=6), chat_processor)
    html = (tmp_path / "page.html").read_text()
    assert not re.search(r"<script|https?://|<link", html)
    assert html.count('<img src="data:image/png') >= 12  # the query and the dialogue of each
    assert html.count('class="supervised"') > 20 and html.count('class="readout"') == 1 + 12
    assert "missing.png does not exist" in html and "<b>&" not in html


def test_a_soft_target_is_shown_with_its_score(chat_processor, tmp_path):
    row = {"query": "a dog", "positive": "a hound", "negatives": ["a puppy", "a car"], "negative_scores": [0.8, 0]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"negative_scores": None}))
    source = Source(path=str(tmp_path / "a.jsonl"), format="pairs")
    write_page(tmp_path / "page.html", inspect([open_source(source)], chat_processor), chat_processor)
    html = (tmp_path / "page.html").read_text()
    assert re.findall(r"(negative \d)<small>\d+ tokens(.*?)</small>", html) == [
        ("negative 1", "<br>score 0.80"), ("negative 2", "<br>score 0.00"), ("negative 1", ""), ("negative 2", ""),
    ]  # fmt: skip


def test_the_command_prints_writes_and_fails_on_too_many_bad_records(messy, random_base, scenes, tmp_path, capsys):
    page = str(tmp_path / "page.html")
    command = ["data", "check", "--base", str(random_base), "--workers", "0", "--output", page]
    assert main([*command, messy.path]) == 1
    printed = capsys.readouterr()
    assert "33.3% of the records" in printed.err and "supervised tokens" in printed.out
    assert main([*command, str(scenes / "mmeb_train" / "vqa.parquet"), "format=mmeb", f"images={scenes}"]) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"output: x\nmodel: {{base: {random_base}}}\ndata: {{sources: [{{path: {scenes}/llava_train.json}}]}}\n"
    )
    assert main(["data", "check", str(recipe), "--sample", "5", "--workers", "0", "--output", page]) == 0
    assert main(["data", "check", messy.path]) == 1
    assert "give --base" in capsys.readouterr().err


def test_percentiles_and_duplicates():
    assert percentiles(range(101)) == "0 · 50 · 95 · 100" and count_duplicates([b"1", b"2", b"1", b"1"]) == 2
