"""Retrieval agrees with pytrec_eval, whatever kind of file the collection comes in."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytrec_eval
from PIL import Image

from cafe.content import Content
from cafe.errors import CafeError
from cafe.evaluation.runner import evaluate, select_suites
from cafe.images.decoding import decode_image

SHADES = (0, 40, 80, 120, 160, 200, 240)  # of the images, each another


class Seeing:
    """Embeds an image by its shade and a text by the shade it names, with seeded noise that makes mistakes."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def embed(self, contents: list[Any], batch_size: int = 32) -> np.ndarray:
        rows = [self.row(Content.of(content)) for content in contents]
        return np.float32([row / np.linalg.norm(row) for row in rows])

    def row(self, content: Content) -> np.ndarray:
        shade = decode_image(content.images[0]).getpixel((0, 0))[0] if content.images else int(content.text.split()[0])
        seed = shade if content.images else sum(map(ord, content.text))
        noise = self.noise * np.random.default_rng(seed).normal(size=len(SHADES))
        return np.eye(len(SHADES))[SHADES.index(shade)] + noise


def captions_of(shade: int) -> list[str]:
    return [f"{shade} is the shade, says number {n}" for n in range(6)]


def karpathy(folder: Path, name: str = "dataset_shades.json") -> None:
    rows = [
        {"filename": f"{shade}.png", "split": "test", "sentences": [{"raw": text} for text in captions_of(shade)]}
        for shade in SHADES
    ]
    (folder / name).write_text(json.dumps({"images": rows}))


def json_lines(folder: Path) -> None:
    rows = [{"image": f"{shade}.png", "caption": captions_of(shade)} for shade in SHADES]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def a_caption_a_row(folder: Path) -> None:
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        table.writerows([f"{shade}.png", captions_of(shade)[number]] for number in range(6) for shade in SHADES)


def encoded(shade: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade,) * 3).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": f"{shade}.png"}


def parquet(folder: Path) -> None:
    rows = [{"image": encoded(shade), "caption": captions_of(shade)} for shade in SHADES]
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet", row_group_size=2)


def names_in_parquet(folder: Path) -> None:
    """As the datasets library writes images that it was told to leave where they are."""
    rows = [{"image": encoded(shade) | {"bytes": None}, "caption": captions_of(shade)} for shade in SHADES]
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")


def bytes_in_parquet(folder: Path) -> None:
    rows = [{"image": encoded(shade)["bytes"], "caption": captions_of(shade)} for shade in SHADES]
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")


def a_caption_a_row_of_parquet(folder: Path) -> None:
    """As the datasets library exports them: the image's bytes in every row, in any order."""
    rows = [{"image": encoded(shade), "caption": captions_of(shade)[number]} for number in range(6) for shade in SHADES]
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet", row_group_size=4)


def a_caption_a_row_without_names(folder: Path) -> None:
    rows = [{"image": encoded(shade)["bytes"], "caption": text} for shade in SHADES for text in captions_of(shade)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")


def one_name_for_all(folder: Path) -> None:
    """Images that are told apart by their bytes alone."""
    rows = [
        {"image": encoded(shade) | {"path": "image.png"}, "caption": text}
        for shade in SHADES
        for text in captions_of(shade)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "captions.parquet")


def with_marks(folder: Path) -> None:
    """With the byte order mark that some editors write."""
    json_lines(folder)
    path = folder / "captions.jsonl"
    path.write_text(path.read_text(), encoding="utf-8-sig")


def lists_in_csv(folder: Path) -> None:
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file)
        table.writerow(["raw", "split", "filename"])
        table.writerows([json.dumps(captions_of(shade)), "test", f"{shade}.png"] for shade in SHADES)


NAMED_KINDS = (
    karpathy,
    json_lines,
    a_caption_a_row,
    a_caption_a_row_of_parquet,
    parquet,
    names_in_parquet,
    with_marks,
    lists_in_csv,
)
KINDS = (*NAMED_KINDS, bytes_in_parquet, a_caption_a_row_without_names, one_name_for_all)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for shade in SHADES:
        Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / "images" / f"{shade}.png")
    return tmp_path


def measured(data: Path, suite: str = "retrieval", **options: Any) -> dict[str, float]:
    return evaluate(Seeing(0.6), data, report=lambda line: None, suites=[suite], **options).results


def test_recall_agrees_with_pytrec_eval(data):
    karpathy(data)
    results = measured(data)
    model = Seeing(0.6)
    texts = [(shade, text) for shade in SHADES for text in captions_of(shade)]
    images = model.embed([data / "images" / f"{shade}.png" for shade in SHADES])
    captions = model.embed([text for _, text in texts])
    relevant = {f"i{n}": {f"t{m}": int(s == shade) for m, (s, _) in enumerate(texts)} for n, shade in enumerate(SHADES)}
    scores = {
        f"i{n}": {f"t{m}": float(row @ caption) for m, caption in enumerate(captions)} for n, row in enumerate(images)
    }
    for way, truth, found in (
        ("image_to_text", relevant, scores),
        ("text_to_image", transposed(relevant), transposed(scores)),
    ):
        measures = {"success_1", "success_5", "success_10", "recip_rank"}
        judged = pytrec_eval.RelevanceEvaluator(truth, measures).evaluate(found).values()
        for k in (1, 5, 10):
            assert results[f"retrieval/{way}/R@{k}"] == pytest.approx(
                100 * np.mean([q[f"success_{k}"] for q in judged])
            )
        places = [1 / query["recip_rank"] for query in judged]
        assert results[f"retrieval/{way}/median_rank"] == pytest.approx(np.median(places))
        assert results[f"retrieval/{way}/mean_rank"] == pytest.approx(np.mean(places))
    assert 0 < results["retrieval/text_to_image/R@1"] < 100


def transposed(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {column: {row: table[row][column] for row in table} for column in next(iter(table.values()))}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_every_kind_of_file_gives_the_same_numbers(data, tmp_path, kind):
    karpathy(data)
    expected = measured(data)
    (data / "dataset_shades.json").unlink()
    kind(data)
    assert measured(data) == expected


def test_a_dataset_saved_to_disk_gives_the_numbers_of_the_karpathy_file(data):
    karpathy(data, "dataset_flickr30k.json")
    expected = measured(data, "flickr30k")
    (data / "dataset_flickr30k.json").unlink()
    rows = {"image": [encoded(shade) for shade in SHADES], "caption": [captions_of(shade) for shade in SHADES]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Sequence(datasets.Value("string"))})
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"test": table}).save_to_disk(str(data / "flickr30k"))
    assert measured(data, "flickr30k") == expected


def test_the_files_of_the_hub_repository_are_read_unchanged(data):
    """A CSV file with lists in JSON and a column of splits, beside a folder of images."""
    karpathy(data, "dataset_coco.json")
    expected = measured(data, "coco")
    (data / "dataset_coco.json").unlink()
    (data / "coco").mkdir()
    (data / "images").rename(data / "coco" / "images_mscoco_2014_5k_test")
    with (data / "coco" / "test_5k_mscoco_2014.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["raw", "split", "filename"])
        table.writerows([json.dumps(captions_of(shade)), "test", f"{shade}.png"] for shade in SHADES)
        table.writerow(['["another"]', "val", "absent.png"])
    assert measured(data, "coco") == expected


def test_the_named_protocols_take_the_first_five_captions(data):
    karpathy(data, "dataset_flickr30k.json")
    done = evaluate(Seeing(0.6), data, report=lambda line: None, suites=["flickr30k"])
    texts = [row["text"] for row in done.outputs["flickr30k/text_to_image"]]
    assert texts == [text for shade in SHADES for text in captions_of(shade)[:5]]
    karpathy(data)
    done = evaluate(Seeing(0.6), data, report=lambda line: None, suites=["retrieval"])
    assert len(done.outputs["retrieval/text_to_image"]) == 6 * len(SHADES)


@pytest.mark.parametrize("kind", NAMED_KINDS)
def test_limit_takes_the_first_images_with_their_captions(data, kind):
    kind(data)
    done = evaluate(Seeing(0), data, limit=3, report=lambda line: None, suites=["retrieval"])
    assert [row["image"].rpartition("/")[2] for row in done.outputs["retrieval/image_to_text"]] == [
        f"{shade}.png" for shade in SHADES[:3]
    ]
    assert len(done.outputs["retrieval/text_to_image"]) == 18


def test_images_inside_a_file_are_shown_by_thumbnails(data):
    parquet(data)
    samples = evaluate(Seeing(0), data, report=lambda line: None, suites=["retrieval"]).samples
    assert samples["text_queries"][0]["hits"][0]["image"].startswith("data:image/png;base64,")


def test_images_are_named_within_a_folder_that_is_given_by_a_relative_path(data, monkeypatch):
    karpathy(data)
    monkeypatch.chdir(data.parent)
    samples = evaluate(Seeing(0), Path(data.name), report=lambda line: None, suites=["retrieval"]).samples
    shown = [hit["image"] for query in samples["text_queries"] for hit in query["hits"]]
    assert shown and all((data / image).is_file() for image in shown)
    assert not any(Path(image).is_absolute() for image in shown)


def test_images_may_be_elsewhere_under_absolute_paths(data, tmp_path_factory):
    karpathy(data)
    expected = measured(data)
    (data / "dataset_shades.json").unlink()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    rows = [{"image": str(data / "images" / f"{shade}.png"), "caption": captions_of(shade)} for shade in SHADES]
    (elsewhere / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert measured(elsewhere) == expected


def test_paragraphs_of_the_scenes_are_found_by_name(scenes):
    (suite,) = select_suites(scenes, ["paragraphs"])
    assert [path.name for path in suite.find_files(scenes)] == ["paragraphs_test.jsonl"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,words\n0.png,zero\n", "lacks the field 'caption' in record 1"),
        ("picture,caption\n0.png,zero\n", "lacks the field 'image' in record 1"),
        ("image,caption\n", "is empty"),
        ("image,caption,split\n0.png,zero,val\n40.png,one,dev\n", "no complete image .*'test'; .* splits 'dev', 'val'"),
        ("image,caption\n0.png,zero, the first\n", "Record 1 of .*captions.csv is damaged: the row has 3 cells"),
        ("image,caption\n0.png,[]\n", "captions.csv lacks the field 'caption' in record 1"),
        ('image,caption\n0.png,"[""zero"", """"]"\n', r"caption of image 1 of .*captions.csv is not text"),
        ("image,caption\nabsent.png,zero\n", r"image absent.png, which .*captions.csv names, is in none of"),
    ],
)
def test_a_wrong_file_raises_one_clear_sentence(data, text, message):
    (data / "captions.csv").write_text(text)
    with pytest.raises(CafeError, match=message):
        measured(data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": ', "Record 2 of .*captions.jsonl is damaged: .* not valid JSON"),
        ('["0.png", "zero"]', "Record 2 of .*captions.jsonl should be an object"),
        (json.dumps({"image": "zero " * 99, "caption": "0.png"}), "The image zero zero .* is in none of"),
        ('{"image": {"bytes": "eight"}, "caption": "zero"}', "The image in record 2 of .* is neither a name nor an"),
        ('{"image": "0.png", "caption": "half a \\ud83d"}', "A caption of image 1 of .* is not text"),
    ],
)
def test_a_wrong_line_raises_one_clear_sentence(data, line, message):
    (data / "captions.jsonl").write_text('{"image": "0.png", "caption": "zero"}\n' + line)
    with pytest.raises(CafeError, match=message):
        measured(data)


def test_a_damaged_parquet_file_raises_one_clear_sentence(data):
    (data / "captions.parquet").write_bytes(b"PAR1 no table PAR1")
    with pytest.raises(CafeError, match=r"captions.parquet cannot be read"):
        measured(data)


@pytest.mark.parametrize("split", ["val", "restval"])
def test_a_karpathy_file_without_a_test_split_names_its_splits(data, split):
    karpathy(data)
    path = data / "dataset_shades.json"
    path.write_text(path.read_text().replace('"test"', f'"{split}"'))
    with pytest.raises(CafeError, match=f"no complete image in its split 'test'; there are the splits '{split}'"):
        measured(data)


def test_an_ideal_model_finds_everything_in_parquet_with_a_caption_a_row(data):
    a_caption_a_row_of_parquet(data)
    done = evaluate(Seeing(0), data, report=lambda line: None, suites=["retrieval"])
    assert len(done.outputs["retrieval/image_to_text"]) == len(SHADES)
    assert done.results["retrieval/image_to_text/R@1"] == done.results["retrieval/text_to_image/R@1"] == 100


def test_equal_captions_of_two_images_are_also_counted_once(data):
    rows = [("0.png", "0 dark"), ("0.png", "0 black"), ("40.png", "0 dark"), ("40.png", "40 gray"), ("80.png", "80 x")]
    table = "".join(f"{image},{text}\n" for image, text in rows)
    (data / "captions.csv").write_text(f"image,caption\n{table}")
    results = evaluate(Seeing(0), data, report=lambda line: None, suites=["retrieval"]).results
    # By the literature's count, the "0 dark" of 40.png ties with that of 0.png, and does not find 40.png.
    assert results["retrieval/image_to_text/R@1"] == pytest.approx(100 * 2 / 3)
    assert results["retrieval/text_to_image/R@1"] == pytest.approx(100 * 4 / 5)
    assert results["retrieval/image_to_text/unique_R@1"] == results["retrieval/text_to_image/unique_R@1"] == 100


def test_counting_equal_captions_once_agrees_with_counting_by_hand(data):
    random = np.random.default_rng(0)
    captions = [[f"{random.choice(SHADES[:3])} {random.integers(4)}" for _ in range(4)] for _ in SHADES]
    rows = [{"image": f"{shade}.png", "caption": texts} for shade, texts in zip(SHADES, captions, strict=True)]
    (data / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Seeing(0.6)
    results = evaluate(model, data, report=lambda line: None, suites=["retrieval"]).results
    texts = sorted({text for some in captions for text in some})
    images = model.embed([data / "images" / f"{shade}.png" for shade in SHADES])
    scores = images @ model.embed(texts).T
    right = np.array([[text in some for text in texts] for some in captions])
    found = [own[texts].max() > own[~texts].max() for own, texts in zip(scores, right, strict=True)]
    assert results["retrieval/image_to_text/unique_R@1"] == pytest.approx(100 * np.mean(found))
    best = scores.argmax(axis=0)
    asked = [texts.index(text) for some in captions for text in some]
    found = [right[best[text], text] for text in asked]
    assert results["retrieval/text_to_image/unique_R@1"] == pytest.approx(100 * np.mean(found))
    assert results["retrieval/text_to_image/unique_R@1"] > results["retrieval/text_to_image/R@1"]


def test_without_equal_captions_there_is_no_second_count(data):
    karpathy(data)
    assert not [name for name in measured(data) if "unique" in name]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": 5, "caption": "zero"}, "The image in record 1 of .* is neither a name nor an image"),
        ({"image": {"bytes": None, "path": None}, "caption": "zero"}, "The image in record 1 of .* is neither"),
        ({"image": {"bytes": "png", "path": "0.png"}, "caption": "zero"}, "The image in record 1 of .* is neither"),
        ({"image": {"bytes": b"png", "path": 5}, "caption": "zero"}, "The image in record 1 of .* is neither"),
        ({"image": ["0.png"], "caption": "zero"}, "The image in record 1 of .* is neither"),
        ({"image": "0.png", "caption": 5}, "caption of image 1 of .* is not text"),
        ({"image": "0.png", "caption": ["zero", None]}, "caption of image 1 of .* is not text"),
        ({"image": "0.png", "caption": {"raw": "zero"}}, "caption of image 1 of .* is not text"),
    ],
)
def test_columns_of_another_type_raise_one_clear_sentence(data, row, message):
    pq.write_table(pa.Table.from_pylist([row]), data / "captions.parquet")
    with pytest.raises(CafeError, match=message):
        measured(data)
