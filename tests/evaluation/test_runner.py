"""Test evaluation with a perfect model, a collapsed one and a real one, on scenes and on tiny files."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cafe import Cafe
from cafe.cli.main import main
from cafe.content import Content
from cafe.errors import CafeError
from cafe.evaluation.runner import evaluate, training_evaluator, write
from cafe.evaluation.suite import aggregate
from cafe.evaluation.suites import SUITES
from cafe.lvlm.prompts import Prompts
from cafe.training.recipe import EvaluationConfig

COLORS = ("red", "green", "blue", "yellow")


class ColorModel:
    """Know each image by its file's name; perfect unless `wrong`."""

    def __init__(self, wrong: bool = False) -> None:
        self.wrong = wrong
        self.asked: list[Content] = []

    def embed(self, contents: Any, batch_size: int = 32) -> np.ndarray:
        if self.wrong:
            return np.tile(np.float32([1, 0, 0, 0]), (len(contents), 1))
        names = [content.stem if isinstance(content, Path) else content for content in contents]
        return np.float32([[color in name for color in COLORS] for name in names])

    def generate_batch(self, prompts: Sequence[Content], max_new_tokens: int = 64, batch_size: int = 64) -> list[str]:
        self.asked += prompts
        return [self.answer(prompt) for prompt in prompts]

    def score_batch(self, contents: Sequence[Content], answers: Any, **options: Any) -> list[np.ndarray]:
        return [likelihoods(self.answer(content), said) for content, said in zip(contents, answers, strict=True)]

    def answer(self, prompt: Content) -> str:
        color = Path(str(prompt.images[0])).stem
        assert Path(str(prompt.images[0])).is_file()
        if self.wrong:
            return "a mauve thing"
        if prompt.text.startswith("Is there"):
            return "Yes, there is." if color in prompt.text else "No, there is not."
        return f"a {color} thing" if prompt.text.startswith("Describe") else color.upper()


def likelihoods(answer: str, said: Sequence[str]) -> np.ndarray:
    """Score what an answer begins with."""
    return np.array([0.0 if answer.startswith(each) else -10.0 for each in said])


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for color in COLORS:
        Image.new("RGB", (8, 8), color).save(tmp_path / "images" / f"{color}.png")
    rows: list[dict[str, Any]] = [
        {"filename": f"{color}.png", "split": "test", "sentences": [{"raw": f"{color} {word}"} for word in "ab"]}
        for color in COLORS
    ]
    rows[0]["filepath"] = "images"
    rows.append({"filename": "absent.png", "split": "train", "sentences": [{"raw": "never read"}]})
    (tmp_path / "dataset_tiny.json").write_text(json.dumps({"images": rows}))
    asked = [{"question_id": number, "image": f"images/{color}.png"} for number, color in enumerate(COLORS)]
    write_lines(
        tmp_path / "captions_test.jsonl",
        [
            {**row, "text": "Describe it.", "answers": [f"a {color} thing"], "objects": [color]}
            for row, color in zip(asked, COLORS, strict=True)
        ],
    )
    write_lines(
        tmp_path / "vqa_test.jsonl",
        [
            {**row, "text": "Which color?", "answer": color, "category": "warm" if color == "red" else "other"}
            for row, color in zip(asked, COLORS, strict=True)
        ],
    )
    for split in ("random", "popular", "adversarial"):
        write_lines(
            tmp_path / "pope" / f"tiny_pope_{split}.json",
            [
                {**row, "text": f"Is there a {named} thing in the image?", "label": label}
                for row, color in zip(asked, COLORS, strict=True)
                for named, label in ((color, "yes"), ("mauve", "no"))
            ],
        )
    return tmp_path


def silent(line: str) -> None:
    pass


def test_a_perfect_model_gets_every_number_right(data):
    results = evaluate(ColorModel(), data, report=silent).results
    for name in ("retrieval/image_to_text/R@1", "retrieval/text_to_image/R@1", "captions/exact", "vqa/all", "vqa/warm"):
        assert results[name] == 100, name
    for split in ("random", "popular", "adversarial"):
        scores = {
            name: results[f"pope/{split}/{name}"] for name in ("accuracy", "precision", "recall", "F1", "yes_ratio")
        }
        assert scores == {"accuracy": 100, "precision": 100, "recall": 100, "F1": 100, "yes_ratio": 50}
        assert (results[f"pope/{split}/auc"], results[f"pope/{split}/likelihood_yes_ratio"]) == (100, 50)
    assert (results["objects/precision"], results["objects/recall"], results["objects/hallucinated"]) == (100, 100, 0)
    assert results["geometry/modality_gap"] == pytest.approx(0)
    assert results["geometry/alignment"] == pytest.approx(0)
    assert (results["geometry/matched_similarity"], results["geometry/mismatched_similarity"]) == (1, 0)


def test_a_collapsed_model_gets_nothing(data):
    results = evaluate(ColorModel(wrong=True), data, report=silent).results
    for name in ("retrieval/image_to_text/R@1", "retrieval/text_to_image/R@1", "captions/exact", "vqa/all"):
        assert results[name] == 0, name
    assert results["pope/random/accuracy"] == 50
    assert results["pope/random/yes_ratio"] == 100
    assert results["pope/random/auc"] == 50


def test_samples_name_what_was_found_and_whether_it_is_right(data):
    samples = evaluate(ColorModel(), data, report=silent).samples
    assert Path(samples["data"]) == data
    first = samples["text_queries"][0]
    assert first["text"] == "red a"
    assert first["hits"][0] == {"image": "images/red.png", "right": True}
    assert [hit["right"] for hit in first["hits"]] == [True, False, False, False]
    assert [hit["right"] for hit in samples["image_queries"][0]["hits"]] == [True, True, False, False, False]
    histogram = samples["histogram"]
    width = np.diff(histogram["bins"])
    for side in ("matched", "mismatched"):
        assert (histogram[side] * width).sum() == pytest.approx(1)
    assert samples["captions"][1] == {"image": "images/green.png", "said": "a green thing", "right": True}


def test_what_is_written_can_be_read(data, tmp_path):
    evaluation = evaluate(ColorModel(), data, report=silent)
    write(evaluation, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == evaluation.results
    assert json.loads((tmp_path / "out" / "samples.json").read_text()) == evaluation.samples
    with np.load(tmp_path / "out" / "embeddings.npz") as arrays:
        assert arrays["images"].shape == (4, 4)
        assert arrays["owner"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_missing_files_skip_their_suite(data):
    (data / "dataset_tiny.json").unlink()
    (data / "vqa_test.jsonl").unlink()
    suites = {name.split("/")[0] for name in evaluate(ColorModel(), data, report=silent).results}
    assert suites == {"captions", "objects", "pope"}


def test_limit_takes_the_first_records_of_each_suite(data):
    model = ColorModel()
    evaluation = evaluate(model, data, limit=2, report=silent)
    assert len(model.asked) == 2 * 3  # of captions, questions, and POPE's, which asks the same in every split here
    assert evaluation.embeddings["images"].shape == (2, 4)


def test_an_object_is_hallucinated_though_no_image_within_the_limit_shows_it(data):
    class Blue(ColorModel):
        def answer(self, prompt: Content) -> str:
            return "a red thing and a blue one"

    results = evaluate(Blue(), data, limit=1, report=silent, suites=["captions"]).results
    assert (results["objects/recall"], results["objects/hallucinated"]) == (100, 50)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("vqa_test.jsonl", "{", "vqa_test.jsonl is not valid JSON lines"),
        ("vqa_test.jsonl", '{"image": "a.png", "text": "?"}', "'answer' in record 1"),
        ("captions_test.jsonl", "\n", "captions_test.jsonl is empty"),
        ("dataset_tiny.json", "[]", "not a Karpathy file"),
        ("dataset_tiny.json", '{"images": []}', "no complete image in its split 'test'"),
        ("dataset_tiny.json", "\xff", "not a Karpathy file"),
        ("vqa_test.jsonl", "\xff", "vqa_test.jsonl is not valid JSON lines: .*can't decode"),
        (
            "vqa_test.jsonl",
            '{"image": "red.png", "text": "how many?", "answer": 3, "category": "count"}',
            "field 'answer' in record 1 of .*vqa_test.jsonl should be text, not 3",
        ),
        (
            "captions_test.jsonl",
            '{"image": "red.png", "text": "what?", "answers": "red", "objects": []}',
            "field 'answers' in record 1 of .* should be a list, not 'red'",
        ),
        (
            "pope/tiny_pope_random.json",
            '{"image": "red.png", "text": "Is there a circle?", "label": "Yes"}',
            "label in record 1 of .*tiny_pope_random.json should be yes or no, not 'Yes'",
        ),
    ],
)
def test_a_broken_file_is_reported_in_one_sentence(data, file, text, message):
    (data / file).write_text(text, encoding="latin-1")  # of which most is no UTF-8
    with pytest.raises(CafeError, match=message):
        evaluate(ColorModel(), data, report=silent)


def test_unicode_line_separators_may_occur_inside_a_text(data):
    row = {"image": "red.png", "text": "red\u2028or\x85blue?", "answer": "red", "category": "color"}
    (data / "vqa_test.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    done = evaluate(ColorModel(), data, report=silent, suites=["vqa"])
    assert done.outputs["vqa"][0]["asked"] == row["text"]


class Oracle:
    """Answer from the annotation files themselves."""

    def __init__(self, data: Path) -> None:
        self.owner = {}
        for index, row in enumerate(json.loads((data / "dataset_scenes.json").read_text())["images"]):
            for key in (row["filename"], *(sentence["raw"] for sentence in row["sentences"])):
                self.owner[key] = index
        for line in (data / "paragraphs_test.jsonl").read_text().splitlines():
            row = json.loads(line)
            self.owner[row["caption"]] = self.owner[Path(row["image"]).name]
        self.said = {}
        for file in [data / "captions_test.jsonl", data / "vqa_test.jsonl", *(data / "pope").glob("*.json")]:
            for line in file.read_text().splitlines():
                row = json.loads(line)
                answer = row.get("answer") or row.get("label") or row["answers"][0]
                self.said[Path(row["image"]).name, row["text"]] = answer

    def embed(self, contents, batch_size=32):
        keys = [content if isinstance(content, str) else content.name for content in contents]
        return np.eye(len(set(self.owner.values())), dtype=np.float32)[[self.owner[key] for key in keys]]

    def generate_batch(self, prompts: list[Content], max_new_tokens=64, batch_size=64):
        return [self.said[prompt.images[0].source.name, prompt.text] for prompt in prompts]

    def score_batch(self, contents, answers, **options):
        return list(map(likelihoods, self.generate_batch(contents), answers))


class Collapsed:
    """Give the same vector and the same word for everything."""

    def embed(self, contents, batch_size=32):
        return np.ones((len(contents), 1), np.float32)

    def generate_batch(self, prompts, max_new_tokens=64, batch_size=64):
        return ["Yes"] * len(prompts)

    def score_batch(self, contents, answers, **options):
        return [likelihoods("Yes", said) for said in answers]


def test_a_model_that_sees_everything_scores_everything(scenes):
    results = evaluate(Oracle(scenes), scenes, report=lambda line: None).results
    for name in ("retrieval/image_to_text/R@1", "retrieval/text_to_image/R@1", "captions/exact", "objects/recall"):
        assert results[name] == 100
    assert results["paragraphs/text_to_image/R@1"] == results["pope/mean/strict_accuracy"] == 100
    assert results["vqa/all"] == results["pope/adversarial/accuracy"] == results["pope/random/F1"] == 100
    assert results["pope/mean/auc"] == 100 and results["pope/mean/likelihood_yes_ratio"] == 50
    assert results["objects/hallucinated"] == 0 and results["geometry/modality_gap"] == pytest.approx(0, abs=1e-6)


def test_a_collapsed_model_scores_nothing(scenes):
    results = evaluate(Collapsed(), scenes, report=lambda line: None).results
    assert results["retrieval/image_to_text/R@10"] == results["retrieval/text_to_image/R@10"] == 0
    assert results["pope/popular/accuracy"] == 50 and results["pope/popular/yes_ratio"] == 100
    assert results["pope/popular/auc"] == 50 and results["pope/popular/likelihood_yes_ratio"] == 100
    assert results["captions/exact"] == 0


def test_a_real_model_is_measured_and_written(random_base, scenes, tmp_path):
    model = Cafe.load(random_base, Prompts())
    evaluation = evaluate(model, scenes, limit=4, report=lambda line: None)
    write(evaluation, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == evaluation.results and all(isinstance(value, float) for value in results.values())
    assert np.load(tmp_path / "embeddings.npz")["images"].shape == (4, 160)


def test_a_folder_without_evaluation_files_is_refused(tmp_path):
    with pytest.raises(CafeError, match="no evaluation file"):
        evaluate(Collapsed(), tmp_path)


def test_the_list_names_every_suite_with_its_files_and_download(capsys):
    assert main(["evaluate", "--list"]) == 0
    said = capsys.readouterr().out
    for suite in SUITES:
        assert f"{suite.name}: {suite.measures}" in said and suite.download in said
        assert all(file in said for file in suite.files)


def test_names_of_suites_are_unique_and_their_results_are_theirs(data):
    assert len({suite.name for suite in SUITES}) == len(SUITES)
    done = evaluate(ColorModel(), data, report=silent, suites=["pope"])
    assert {name.split("/")[0] for name in done.results} == {"pope"}


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ("flickr30k", r"lacks its files in .*dataset_flickr30k.json.*Download: .*karpathy"),
        ("poppe", "There is no suite 'poppe'; the suites are retrieval, .*pope"),
    ],
)
def test_a_suite_that_cannot_run_is_reported_in_one_sentence(data, capsys, suite, message):
    assert main(["evaluate", "never loaded", "--data", str(data), "--suite", suite]) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and len(said.splitlines()) == 1


def test_a_missing_image_is_named_before_the_model_is_asked(data):
    (data / "images" / "blue.png").unlink()
    model = ColorModel()
    with pytest.raises(CafeError, match=r"The image images/blue.png, which .*tiny_pope_random.json names, is in none"):
        evaluate(model, data, report=silent, suites=["pope"])
    assert not model.asked


def test_results_can_be_recomputed_from_the_outputs_that_are_written(data, tmp_path):
    done = evaluate(ColorModel(), data, report=silent)
    write(done, tmp_path / "out")
    rows = [json.loads(line) for path in (tmp_path / "out/outputs").glob("*.jsonl") for line in path.open()]
    again = aggregate(rows)
    assert again and all(done.results[name] == value for name, value in again.items())
    assert {"retrieval/image_to_text/R@1", "vqa/all", "captions/exact", "pope/random/F1"} <= set(again)


class Named(ColorModel):
    """Have a fingerprint."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def fingerprint(self) -> str:
        return self.name


def test_results_of_suites_run_one_after_the_other_are_merged(data, tmp_path):
    for suite in ("retrieval", "pope"):
        write(evaluate(Named("a"), data, report=silent, suites=[suite], cache_dir=tmp_path / "kept"), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name.split("/")[0] for name in results} == {"retrieval", "pope"}
    assert len(list((tmp_path / "outputs").iterdir())) == 5
    write(evaluate(Named("b"), data, report=silent, suites=["pope"], cache_dir=tmp_path / "kept"), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name.split("/")[0] for name in results} == {"pope"}  # another model's results do not stay
    assert len(list((tmp_path / "outputs").iterdir())) == 3


def test_an_evaluation_killed_while_writing_keeps_what_was_written(data, tmp_path, monkeypatch):
    write(evaluate(Named("a"), data, report=silent, suites=["retrieval"], cache_dir=tmp_path / "kept"), tmp_path)
    other = evaluate(Named("a"), data, report=silent, suites=["pope"], cache_dir=tmp_path / "kept")

    def killed(out, **arrays):
        out.write(b"PK\3\4")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez_compressed", killed)
        write(other, tmp_path)
    write(other, tmp_path)
    with np.load(tmp_path / "embeddings.npz") as arrays:
        assert arrays["images"].shape == (4, 4)


def test_images_are_found_in_the_folder_or_in_its_images(data):
    rows = json.loads((data / "dataset_tiny.json").read_text())
    for row in rows["images"]:
        row.pop("filepath", None)  # the image's bare name, as COCO's Karpathy file and POPE's have it
    (data / "dataset_tiny.json").write_text(json.dumps(rows))
    for split in ("random", "popular", "adversarial"):
        (path,) = (data / "pope").glob(f"*_{split}.json")
        path.write_text(path.read_text().replace("images/", ""))
    results = evaluate(ColorModel(), data).results
    assert results["retrieval/image_to_text/R@1"] == results["pope/random/accuracy"] == 100


@pytest.mark.parametrize(("file", "other"), [("dataset_tiny.json", "dataset_other.json"), ("pope", "pope")])
def test_two_files_that_measure_the_same_are_refused_by_name(data, file, other):
    if file == "pope":
        (first,) = (data / "pope").glob("*_random.json")
        second = first.with_name("other_random.json")
    else:
        first, second = data / file, data / other
    second.write_text(first.read_text())
    with pytest.raises(CafeError, match="measure the same") as error:
        evaluate(ColorModel(), data)
    assert first.name in str(error.value) and second.name in str(error.value)


def test_an_evaluation_with_a_limit_has_its_own_folder(random_base, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/checkpoint").symlink_to(random_base)
    assert main(["evaluate", "run", "--data", str(scenes), "--suite", "vqa", "--limit", "2"]) == 0
    assert [path.parent.name for path in Path("runs/evaluations").glob("*/results.json")] == ["run-limit-2"]


@pytest.mark.parametrize(
    ("folder", "best", "message"),
    [
        ("no", "", "folder of evaluation files .*no does not exist"),
        ("", "retrieval/text_to_image/R@1", "no result retrieval/text_to_image/R@1 .* nearest is held_out/lm_loss"),
        (".", "R@1", "no result R@1 for metric_for_best_model; the nearest is retrieval/"),
        (".", "-vqa/al", "no result vqa/al for metric_for_best_model; the nearest is vqa/all"),
    ],
)
def test_metrics_that_training_cannot_measure_are_refused_before_it(recipe, data, folder, best, message):
    evaluation = EvaluationConfig(data=folder and str(data / folder), sources=recipe.data.sources, eval_steps=1)
    with pytest.raises(CafeError, match=message):
        training_evaluator(replace(recipe, evaluation=evaluation, metric_for_best_model=best))


def test_every_result_of_an_evaluation_may_be_metric_for_best_model(recipe, random_base, scenes):
    evaluation = EvaluationConfig(data=str(scenes), sources=recipe.data.sources, eval_steps=1, limit=4)
    measure = training_evaluator(replace(recipe, evaluation=evaluation))
    found = measure(Cafe.load(random_base))
    for best in (*found, "-held_out/lm_loss"):
        training_evaluator(replace(recipe, evaluation=evaluation, metric_for_best_model=best))


WRITE = """
import sys
from pathlib import Path
from cafe.evaluation.runner import write
from cafe.evaluation.suite import EvaluationResult

name, directory = sys.argv[1:]
for number in range(20):
    about = {"data": "here", "limit": None, "fingerprint": "same"}
    write(EvaluationResult(results={f"{name}/{number}": 1.0}, about=about), Path(directory))
"""


def test_two_evaluations_that_write_to_one_directory_lose_nothing(tmp_path):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITE, name, str(tmp_path)], stderr=subprocess.PIPE)
        for name in ("pope", "vqa")
    ]
    for writer in writers:
        _, said = writer.communicate(timeout=300)
        assert writer.returncode == 0, said.decode()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results == {f"{name}/{number}": 1.0 for name in ("pope", "vqa") for number in range(20)}


def test_a_table_without_a_test_split_is_refused_in_one_sentence(tmp_path, capsys, random_base):
    (tmp_path / "captions.csv").write_text("image,caption,split\n0.png,a red square,val\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    output = tmp_path / "out"
    assert main(["evaluate", str(random_base), "--data", str(tmp_path), "--output", str(output)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("captions.csv has no complete image in its split 'test'; there are the splits 'val'.")
    assert not (output / "results.json").exists()


def test_words_of_records_reach_the_terminal_without_escape_sequences(tmp_path, capsys, random_base):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    row = {"image": "0.png", "text": "what?", "answer": "red", "category": "\x1b[2Jred"}
    write_lines(tmp_path / "vqa_test.jsonl", [row])
    output = str(tmp_path / "out")
    assert main(["evaluate", str(random_base), "--data", str(tmp_path), "--output", output, "--suite", "vqa"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and r"vqa/\x1b[2Jred" in said
    write_lines(tmp_path / "vqa_test.jsonl", [row | {"image": "\x1b]0;x\x07.png"}])
    assert main(["evaluate", str(random_base), "--data", str(tmp_path), "--output", output, "--suite", "vqa"]) == 1
    said = capsys.readouterr().err
    assert "\x1b" not in said and r"The image \x1b]0;x\x07.png" in said


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_without_numbers_is_measured_and_written_as_json(data, tmp_path, value):
    class Broken(ColorModel):
        def embed(self, contents: Any, batch_size: int = 32) -> np.ndarray:
            return np.full((len(contents), 4), value, np.float32)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    with np.errstate(invalid="ignore"):
        done = evaluate(Broken(), data, report=silent, suites=["retrieval", "geometry"])
    write(done, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=refuse)
    assert results["retrieval/text_to_image/R@1"] == 0 and results["geometry/effective_rank_images"] is None
