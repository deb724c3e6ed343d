"""VQA's soft accuracy against the counts worked out by hand and the official steps written down again."""

import itertools
import json

import pytest
from PIL import Image

from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suites.vqav2 import accuracy, find, normalize, read, run


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_an_answer_is_as_right_as_people_agree_with_it(matches, score):
    answers = ["red"] * matches + [f"other {number}" for number in range(10 - matches)]
    assert accuracy("Red.", answers) == pytest.approx(score)


def test_accuracy_is_the_mean_over_every_nine_of_ten_people():
    for said in itertools.product("ab", repeat=10):
        by_nine = [min(1, sum(a == "a" for a in said[:i] + said[i + 1 :]) / 3) for i in range(10)]
        assert accuracy("a b", ["a b" if a == "a" else "c d" for a in said]) == pytest.approx(sum(by_nine) / 10)


def test_one_reference_is_right_or_wrong_and_an_empty_answer_is_wrong():
    assert accuracy("2", ["two"]) == 1 and accuracy("3", ["two"]) == 0
    assert accuracy("", ["red"] * 10) == 0


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Red car.", "red car"),
        ("two", "2"),
        ("None", "0"),
        ("It's", "it's"),
        ("dont know", "don't know"),
        ("isnt", "isn't"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("yes, it is", "yes it is"),
        ("black/white", "black white"),
        ("on-top", "on top"),
        ("black / white", "black white"),
        ("a  an\tthe\n x ", "x"),
        ("ill", "ill"),  # a word, no contraction
        ("", ""),
    ],
)
def test_answers_are_normalized_as_the_official_evaluation_does(answer, normal):
    assert normalize(answer) == normal


class Parrot:
    """Says what the question ends with."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate_batch(self, prompts, max_new_tokens=16, batch_size=64):
        self.asked += [prompt.text for prompt in prompts]
        return [prompt.text.partition("?")[0].split()[-1] for prompt in prompts]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "vqa").mkdir()
    (tmp_path / "val2014").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "val2014" / "COCO_val2014_000000000007.jpg")
    return tmp_path


@pytest.mark.parametrize("names", [("v2_OpenEnded_val", "v2_val"), ("ok_val", "ok_val")])
def test_vqas_pair_of_files_is_scored_by_answer_type(data, names):
    questions = [
        {"question_id": number, "image_id": 7, "question": f"is it {word}?"}
        for number, word in enumerate(("yes", "five", "blue"))
    ]
    kinds = ("yes/no", "number", "other")
    given = (["yes"] * 10, ["5"] * 2 + ["6"] * 8, ["red"] * 10)
    rows = [
        {"question_id": n, "answer_type": kind, "answers": [{"answer": a} for a in some]}
        for n, (kind, some) in enumerate(zip(kinds, given, strict=True))
    ]
    (data / "vqa" / f"{names[0]}_questions.json").write_text(
        json.dumps({"data_subtype": "val2014", "questions": questions})
    )
    annotations = data / "vqa" / f"{names[1]}_annotations.json"
    annotations.write_text(json.dumps({"annotations": rows}))
    model = Parrot()
    done = run(CachedModel(model), data, None)
    name = names[0]
    assert done.results == pytest.approx(
        {
            f"vqav2/{name}/all": 160 / 3,
            f"vqav2/{name}/yes_no": 100,
            f"vqav2/{name}/number": 60,
            f"vqav2/{name}/other": 0,
        }
    )
    assert all(text.endswith("single word or phrase.") for text in model.asked)
    annotations.unlink()
    with pytest.raises(CafeError, match=annotations.name):
        read(find(data)[0])


def test_on_the_scenes_a_model_that_knows_the_answers_is_right(scenes):
    given = json.loads((scenes / "vqa" / "scenes_annotations.json").read_text())["annotations"]
    asked = json.loads((scenes / "vqa" / "scenes_questions.json").read_text())["questions"]
    names = [f"COCO_val2014_{row['image_id']:012}.jpg" for row in asked]
    answers = {
        (name, row["question"]): annotation["answers"][0]["answer"].upper() + "."
        for name, row, annotation in zip(names, asked, given, strict=True)
    }

    class Knows:
        def generate_batch(self, prompts, max_new_tokens=16, batch_size=64):
            return [answers[prompt.images[0].source.name, prompt.text] for prompt in prompts]

    results = run(CachedModel(Knows()), scenes, None).results
    kinds = {"all", *(row["answer_type"].replace("/", "_") for row in given)}
    assert results == {f"vqav2/scenes/{kind}": 100 for kind in kinds}


def test_json_lines_with_ten_answers(data):
    row = {"image": "COCO_val2014_000000000007.jpg", "text": "is it red?"}
    answers = [["red"] * 10, [{"answer": "red"}, *[{"answer": "blue"}] * 9]]
    lines = "".join(json.dumps({**row, "answers": some}) + "\n" for some in answers)
    (data / "vqa" / "mine.jsonl").write_text(lines)
    assert run(CachedModel(Parrot()), data, None).results == {"vqav2/mine/all": pytest.approx(65)}
    assert run(CachedModel(Parrot()), data, 1).results == {"vqav2/mine/all": 100}
    for wrong in ([], [2] * 10, [{"text": "red"}]):
        (data / "vqa" / "mine.jsonl").write_text(json.dumps({**row, "answers": wrong}) + "\n")
        with pytest.raises(CafeError, match=r"Record 1 of .* has no answers, or one that is not text"):
            read(data / "vqa" / "mine.jsonl")


def write_ok_vqa(folder, images):
    """OK-VQA's own names and fields: ten people said the raw answer, and `answer` holds its stem."""
    images.mkdir(exist_ok=True)
    asked, told = [], []
    for number, (raw, stem) in enumerate([("surfing", "surf"), ("racing", "race"), ("dogs", "dog")]):
        Image.new("RGB", (8, 8)).save(images / f"COCO_val2014_{number:012}.jpg")
        asked.append({"image_id": number, "question": f"what is {raw}?", "question_id": 10 * number})
        answers = [{"answer_id": n, "raw_answer": raw, "answer": stem, "answer_confidence": "yes"} for n in range(10)]
        told.append({"question_id": 10 * number, "question_type": "one", "answer_type": "other", "answers": answers})
    (folder / "OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": asked}))
    (folder / "mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": told}))


@pytest.mark.parametrize("folder", ["", "vqa"])
def test_ok_vqa_is_found_by_its_own_names_and_scored_by_the_raw_answers(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    write_ok_vqa(tmp_path / folder, tmp_path / "val2014")
    part = "vqav2/OpenEnded_mscoco_val2014"
    assert run(CachedModel(Parrot()), tmp_path, None).results == {f"{part}/all": 100, f"{part}/other": 100}


def test_annotations_renamed_after_their_questions_are_found(tmp_path):
    write_ok_vqa(tmp_path, tmp_path / "val2014")
    (tmp_path / "mscoco_val2014_annotations.json").rename(tmp_path / "OpenEnded_mscoco_val2014_annotations.json")
    assert run(CachedModel(Parrot()), tmp_path, None).results["vqav2/OpenEnded_mscoco_val2014/all"] == 100


def test_the_same_questions_twice_are_refused(tmp_path):
    (tmp_path / "vqa").mkdir()
    for folder in (tmp_path, tmp_path / "vqa"):
        write_ok_vqa(folder, tmp_path / "val2014")
    with pytest.raises(CafeError, match="measure the same"):
        find(tmp_path)
