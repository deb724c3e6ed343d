"""MMEB-V2's videos in the columns of their Hub datasets: each dataset's rows, frames and prompts."""

import json

import numpy as np
import pytest
from PIL import Image

from cafe.content import Content
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suites.mmeb import run
from cafe.evaluation.suites.mmeb.datasets import DATASETS
from cafe.evaluation.suites.mmeb.readers import read_records
from cafe.evaluation.suites.mmeb.video import VIDEO_FORMATS, WATCH, WATCH_CLIP

COLORS = ("red", "green", "blue")
OPTIONS = [f"{letter}. {color}." for letter, color in zip("ABC", COLORS, strict=True)]


class ByColor:
    """Sees the color of the frames, or reads the one that is named last."""

    def __init__(self) -> None:
        self.seen: list[Content] = []

    def with_prompts(self, mode):
        return self

    def embed(self, contents, batch_size=32):
        self.seen += contents
        return np.array([self.look(content) for content in contents], np.float32)

    def look(self, content):
        if content.images:
            with Image.open(content.images[0].source) as image:
                pixel = image.convert("RGB").getpixel((0, 0))
            return np.eye(4)[int(np.argmax(pixel))]
        named = [content.text.rfind(color) for color in COLORS]
        return np.eye(4)[int(np.argmax(named)) if max(named) >= 0 else 3]


def frames(data, place: str, color: str) -> None:
    folder = data / "video-tasks" / "frames" / place
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(2):
        shade = [255 if color == each else 0 for each in COLORS]
        Image.new("RGB", (8, 8), tuple(shade)).save(folder / f"{number:04}.png")


def moment(folder):
    def row(data, color):
        frames(data, f"{folder}/{color}_0.0_10.0/query", "green")
        frames(data, f"{folder}/{color}_0.0_10.0/positive", "green")
        for number in range(2):
            frames(data, f"{folder}/{color}_0.0_10.0/negative_{number}", "red")
        return {"query": f"something {color}", "video_path": f"videos/{color}_0.0_10.0.mp4"}

    return row


def classified(folder, **more):
    def row(data, color):
        frames(data, f"{folder}/clip-{color}", color)
        return {"video_id": f"clip-{color}", "pos_text": color, **more}

    return row


def found(folder, row):
    def made(data, color):
        frames(data, f"{folder}/{color}_1", color)
        return row(color)

    return made


def sought(data, color):
    for each in COLORS:
        frames(data, f"video_mret/MomentSeeker/video_frames/films_{each}", each)
    image = data / "video-tasks" / "frames" / "video_mret" / "MomentSeeker" / "query_asked.jpg"
    Image.new("RGB", (8, 8), (0, 255, 0)).save(image)
    clips = {each: [{"output_path": f"films/{each}.mp4"}] for each in COLORS}
    shown = {"red": "", "green": "asked.jpg", "blue": "films/blue.mp4"}[color]
    wrong = [clip for each in COLORS if each != color for clip in clips[each]]
    row = {"query": f"seen: {color}", "input_frames": shown, "negative_frames": wrong}
    return {**row, "positive_frames": clips[color] * 2}


def asked(folder, row):
    def made(data, color):
        frames(data, f"{folder.format(color=color)}", color)
        return row(color, COLORS.index(color))

    return made


ROWS = {
    "K700": classified("video_cls/K700"),
    "HMDB51": classified("video_cls/HMDB51"),
    "UCF101": classified("video_cls/UCF101"),
    "Breakfast": classified("video_cls/Breakfast"),
    "SmthSmthV2": classified("video_cls/SSv2", neg_text=["blue", "red", "green"]),
    "MSR-VTT": found("video_ret/MSR-VTT", lambda c: {"video_id": f"{c}_1", "video": f"{c}_1.mp4", "caption": c}),
    "MSVD": found("video_ret/MSVD", lambda c: {"video_id": f"{c}_1", "caption": [c, "something else"]}),
    "DiDeMo": found("video_ret/DiDeMo", lambda c: {"video": f"test/{c}_1.mp4", "caption": c}),
    "VATEX": found("video_ret/VATEX", lambda c: {"videoID": f"{c}_1", "enCap": [c, "another"]}),
    "YouCook2": found("video_ret/YouCook2", lambda c: {"id": f"{c}_1", "video_path": "x.mp4", "sentence": c}),
    "QVHighlight": moment("video_mret/QVHighlight"),
    "Charades-STA": moment("video_mret/Charades_STA"),
    "MomentSeeker": sought,
    "Video-MME": asked(
        "video_qa/Video-MME/{color}",
        lambda c, at: {"videoID": c, "question": "Which?", "options": [*OPTIONS, "D. None."], "answer": "ABC"[at]},
    ),
    "NExTQA": asked(
        "video_qa/NExTQA/{color}",
        lambda c, at: (
            {"video": c, "question": "which", "answer": at}
            | {f"a{number}": option for number, option in enumerate([*COLORS, "grey", "sun"])}
        ),
    ),
    "EgoSchema": asked(
        "video_qa/EgoSchema/{color}",
        lambda c, at: {"video_idx": c, "question": "Which?", "option": OPTIONS, "answer": str(at)},
    ),
    "MVBench": asked(
        "video_qa/MVBench/action_count/{color}.mp4",
        lambda c, at: (
            {"subset": "action_count", "video": f"{c}.mp4", "question": "Which?"}
            | {"candidates": list(COLORS), "answer": c}
        ),
    ),
    "ActivityNetQA": asked(
        "video_qa/ActivityNetQA/v_{color}",
        lambda c, at: {"video_name": c, "question": "is it red", "answer": "yes" if c == "red" else "no"},
    ),
}
ASKED = {
    "K700": "Recognize the category of the video content.",
    "MSVD": "Find the video snippet that corresponds to the given summary: red",
    "Charades-STA": "Find the clip that corresponds to the described scene in the given video: something red",
    "MomentSeeker": "Find the clip that corresponds to the given text: seen: red",
    "Video-MME": "Question:  Which?\nA. red.\nB. green.\nC. blue.\nD. None.",
    "NExTQA": "Question:  which\nOptions:\n(A) red\n(B) green\n(C) blue\n(D) grey\n(E) sun",
    "EgoSchema": "Question:  Which?A. red. B. green. C. blue.",
    "MVBench": "Question:  Which?\nOptions:\n(A) red\n(B) green\n(C) blue",
    "ActivityNetQA": "Question:  is it red? (A) yes; (B) no.",
}
CANDIDATES = {"MVBench": ["(A) red", "(B) green", "(C) blue"], "Video-MME": ["red", "green", "blue", "None"]}


def written(data, name, colors=COLORS):
    rows = [ROWS[name](data, color) for color in colors]
    path = data / "mmeb_eval" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_video_dataset_has_a_row_format():
    names = sorted(name for name, dataset in DATASETS.items() if dataset.modality == "video")
    assert sorted(VIDEO_FORMATS) == sorted(ROWS) == names


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_hub_datasets_own_columns_are_read(tmp_path, name):
    path = written(tmp_path, name)
    queries = read_records(path, video=name, rank_all=DATASETS[name].ranks_all_candidates, data=tmp_path)
    assert len(queries) == 3
    if name in ASKED:
        assert queries[0].side.text.endswith(ASKED[name])
    if name in CANDIDATES:
        assert [side.text for side in queries[0].candidates] == CANDIDATES[name]
    done = run(CachedModel(ByColor()), tmp_path, None)
    if name == "ActivityNetQA":  # ByColor cannot say yes
        assert [query.candidates[0].text for query in queries] == ["yes", "no", "no"]
    else:
        assert done.results[f"mmeb/{name}/P@1"] == 100


def test_clips_are_separated_from_the_video_and_several_may_be_right(tmp_path):
    (first, *_) = read_records(written(tmp_path, "QVHighlight"), video="QVHighlight", data=tmp_path)
    assert first.side.images == ("video_mret/QVHighlight/red_0.0_10.0/query",)
    assert [side.images[0].rsplit("/", 1)[1] for side in first.candidates] == ["positive", "negative_0", "negative_1"]
    assert {side.text for side in first.candidates} == {WATCH} and first.gains == {0: 1.0}
    path = written(tmp_path, "MomentSeeker")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["positive_frames"][1]["output_path"] = "films/blue.mp4"
    path.write_text(json.dumps(rows[0]) + "\n")
    (first,) = read_records(path, video="MomentSeeker", data=tmp_path)
    assert first.gains == {0: 1.0, 1: 1.0} and {side.text for side in first.candidates} == {WATCH_CLIP}


def test_classes_in_a_labels_file_are_candidates_too(tmp_path):
    path = written(tmp_path, "HMDB51", ("red", "green"))
    assert len(read_records(path, video="HMDB51", rank_all=True, data=tmp_path)[0].candidates) == 2
    (tmp_path / "mmeb_eval" / "HMDB51_labels.txt").write_text("red\n\nblue\ngreen\n")
    first = read_records(path, video="HMDB51", rank_all=True, data=tmp_path)[0]
    assert [side.text for side in first.candidates] == ["red", "green", "blue"] and first.gains == {0: 1.0}


def test_something_something_uses_the_first_thousand_rows(tmp_path):
    path = written(tmp_path, "SmthSmthV2")
    path.write_text(path.read_text() * 400)
    assert len(read_records(path, video="SmthSmthV2", data=tmp_path)) == 1000


def test_video_records_in_mmeb_eval_format_are_read_too(tmp_path):
    frames(tmp_path, "video_ret/MSVD/red_1", "red")
    row = {"qry_text": "red", "qry_img_path": "", "tgt_text": [""], "tgt_img_path": ["video_ret/MSVD/red_1"]}
    path = tmp_path / "mmeb_eval" / "MSVD.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(row) + "\n")
    assert read_records(path, video="MSVD", rank_all=True, data=tmp_path)[0].side.text == "red"


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("MSVD", {"caption": []}, "Record 0 of .*MSVD.jsonl is not a row of MSVD"),
        ("Video-MME", {"answer": "Z"}, "Record 0 of .*Video-MME.jsonl is not a row of Video-MME"),
        ("QVHighlight", {"video_path": "elsewhere.mp4"}, "elsewhere, which .*QVHighlight.jsonl names, is in none of"),
        ("QVHighlight", {"video_path": "bare.mp4"}, "no folder of the clip that is right"),
        ("K700", {"video_id": "elsewhere"}, "K700/elsewhere, which .*K700.jsonl names, is in none of"),
    ],
)
def test_a_bad_row_and_missing_frames_are_named(tmp_path, name, change, said):
    path = written(tmp_path, name, ("red",))
    (tmp_path / "video-tasks" / "frames" / "video_mret" / "QVHighlight" / "bare").mkdir(parents=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | change) + "\n")
    with pytest.raises(CafeError, match=said):
        run(CachedModel(ByColor()), tmp_path, None)


def test_a_missing_column_is_named(tmp_path):
    path = written(tmp_path, "VATEX", ("red",))
    path.write_text(json.dumps({"videoID": "red_1"}) + "\n")
    with pytest.raises(CafeError, match=r"VATEX.jsonl lacks the field 'enCap' in record 1"):
        run(CachedModel(ByColor()), tmp_path, None)
