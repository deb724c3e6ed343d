"""Any JSON value in any field of an evaluation file ends in a measurement or in one clear sentence."""

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import paths_in

from cafe.errors import CafeError
from cafe.evaluation.report.significance import tally_results
from cafe.evaluation.runner import NullModel, dump_json, evaluate

KARPATHY = {
    "images": [
        {"filename": f"{n}.png", "filepath": "", "split": "test", "sentences": [{"raw": f"a {n}"}, {"raw": "b"}]}
        for n in range(2)
    ]
}
ANSWERS = [{"answer": "red", "answer_id": n} for n in range(10)]
BOX = {"bbox_x": 1, "bbox_y": 1, "bbox_w": 4, "bbox_h": 4}
INSTANCES = {
    "info": {"prompt": "Describe."},
    "images": [{"id": 1, "file_name": "0.png"}],
    "categories": [{"id": 1, "name": "dog"}],
    "annotations": [{"image_id": 1, "category_id": 1}],
}
# By suite and file, a small document; a list is written as JSON lines where the file has them.
DOCUMENTS: list[tuple[str, str, Any]] = [
    ("retrieval", "dataset_own.json", KARPATHY),
    ("retrieval", "captions.jsonl", [{"image": "0.png", "caption": ["a", "b"], "split": "test"}]),
    ("pope", "pope/own_random.json", [{"question_id": 1, "image": "0.png", "text": "Is there a dog?", "label": "no"}]),
    ("vqa", "vqa_test.jsonl", [{"image": "0.png", "text": "what?", "answer": "red", "category": "color"}]),
    ("captions", "captions_test.jsonl", [{"image": "0.png", "text": "say", "answers": ["a"], "objects": ["dog"]}]),
    (
        "vqav2",
        "vqa/own.jsonl",
        [{"image": "0.png", "text": "what?", "answers": ["red"] * 10, "kind": "a/b", "prompt": ""}],
    ),
    (
        "vqav2",
        "vqa/v2_OpenEnded_own_questions.json",
        {
            "info": {"prompt": ""},
            "data_subtype": "own",
            "questions": [{"question_id": 1, "image_id": 1, "question": "what?"}],
        },
    ),
    (
        "vqav2",
        "vqa/v2_own_annotations.json",
        {"annotations": [{"question_id": 1, "answer_type": "other", "answers": ANSWERS}]},
    ),
    ("sugarcrepe", "sugarcrepe/add_att.json", {"0": {"filename": "0.png", "caption": "a", "negative_caption": "b"}}),
    (
        "winoground",
        "winoground/examples.jsonl",
        [{"id": 1, "caption_0": "a", "caption_1": "b", "image_0": "0.png", "image_1": "1.png"}],
    ),
    (
        "aro",
        "aro/visual_genome_relation.json",
        [{"image_path": "0.png", "true_caption": "a", "false_caption": "b", "relation_name": "on", **BOX}],
    ),
    (
        "aro",
        "aro/visual_genome_attribution.json",
        [{"image_path": "0.png", "true_caption": "a", "false_caption": "b", "attributes": ["red", "blue"], **BOX}],
    ),
    ("chair", "annotations/instances_val2014.json", INSTANCES),
    ("chair", "annotations/captions_val2014.json", {"annotations": [{"image_id": 1, "caption": "a dog"}]}),
    ("throne", "annotations/instances_val2017.json", INSTANCES),
    (
        "mmeb",
        "mmeb_eval/Own.jsonl",
        [
            {
                "qry_inst": "find",
                "qry_text": "a",
                "qry_img_path": "0.png",
                "tgt_inst": "it",
                "tgt_text": ["a", "b"],
                "tgt_img_path": ["0.png", ""],
            }
        ],
    ),
    (
        "mmeb",
        "mmeb_eval/MVBench.jsonl",
        [{"subset": "s", "video": "v", "question": "q", "candidates": ["a"], "answer": "a"}],
    ),
    (
        "mmeb",
        "mmeb_eval/Video-MME.jsonl",
        [{"videoID": "v", "question": "q", "options": ["A. x", "B. y"], "answer": "A"}],
    ),
    ("mmeb", "mmeb_eval/MSVD.jsonl", [{"video_id": "v", "caption": ["a", "b"]}]),
    ("mmeb", "mmeb_eval/SmthSmthV2.jsonl", [{"video_id": "v", "pos_text": "a", "neg_text": ["a", "b"]}]),
    (
        "mmeb",
        "mmeb_eval/MomentSeeker.jsonl",
        [
            {
                "query": "q",
                "input_frames": "a.jpg",
                "positive_frames": [{"output_path": "movie/a.mp4"}],
                "negative_frames": [{"output_path": "movie/b.mp4"}],
            }
        ],
    ),
    ("cider", "cider/dataset_own.json", KARPATHY),
]

TEXTS = (
    st.sampled_from(["", " ", "0.png", "..", "/", "\0", "\ud83d", "test", "<image>", "a" * 300, "[", "{0}"]) | st.text()
)
NUMBERS = st.sampled_from([0, -1, 1, 10**400, 1e308, float("nan"), float("inf")]) | st.integers() | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed(draw: Any, document: Any) -> Any:
    """Replace one to three values of a document, or leave them out."""
    result = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(paths_in(result)[1:] or [[None]]))
        if last is None:
            break
        target = result
        for key in way:
            target = target[key]
        if draw(st.integers(0, 5)):
            target[last] = draw(VALUES)
        else:
            del target[last]
    return result


def as_text(document: Any, path: Path) -> str:
    """Write a document as JSON, or as JSON lines."""
    if path.suffix == ".jsonl" or path.parent.name == "pope":
        return "".join(json.dumps(row) + "\n" for row in document)
    return json.dumps(document)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    (data / "video-tasks" / "frames").mkdir(parents=True)
    for name in ("0.png", "1.png", "COCO_own_000000000001.jpg"):
        Image.new("RGB", (8, 8)).save(data / name)
    return data


def check(data: Path, suite: str) -> None:
    """Measure a suite, and use its output rows as the report does."""
    try:
        done = evaluate(NullModel(), data, report=lambda line: None, suites=[suite])
    except CafeError as error:
        assert 10 < len(str(error)) < 2000 and "\n" not in str(error)
        return
    dump_json([done.results, done.samples, done.outputs]).encode()
    for rows in done.outputs.values():
        tally_results(rows)


def write_files(data: Path, suite: str, file: str, text: str) -> None:
    """Write a file and, of VQA's pair, the other one; all others of suites are removed."""
    for _, other, document in DOCUMENTS:
        (data / other).unlink(missing_ok=True)
        is_partner = {file, other} <= {"vqa/v2_OpenEnded_own_questions.json", "vqa/v2_own_annotations.json"}
        is_partner |= file.startswith("annotations/captions") and other.startswith("annotations/instances_val2014")
        if is_partner:
            (data / other).write_text(as_text(document, data / other))
    (data / file).parent.mkdir(exist_ok=True)
    (data / file).write_text(text)


@pytest.mark.parametrize(("suite", "file", "document"), DOCUMENTS, ids=[file for _, file, _ in DOCUMENTS])
def test_any_value_in_any_field_ends_in_results_or_a_sentence(folder, suite, file, document):
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changed(document))
    def run(other: Any) -> None:
        write_files(folder, suite, file, as_text(other, folder / file))
        check(folder, suite)

    run()


@pytest.mark.parametrize(("suite", "file", "document"), DOCUMENTS, ids=[file for _, file, _ in DOCUMENTS])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[]", "{}", "null", "", "\ufeff", "5\n5", '["a"]'])
def test_a_file_of_another_kind_ends_in_a_sentence(folder, suite, file, document, text):
    write_files(folder, suite, file, text)
    check(folder, suite)


@pytest.mark.parametrize(("suite", "file", "document"), DOCUMENTS, ids=[file for _, file, _ in DOCUMENTS])
def test_a_byte_order_mark_changes_nothing(folder, suite, file, document):
    results = []
    for mark in ("", "\ufeff"):
        write_files(folder, suite, file, mark + as_text(document, folder / file))
        try:
            results.append(evaluate(NullModel(), folder, report=lambda line: None, suites=[suite]).results)
        except CafeError as error:  # of videos, whose frames are not there
            results.append(str(error))
    assert results[0] == results[1]


WINOGROUND = {"id": 1, "caption_0": "a", "caption_1": "b", "image_0": {"path": "0.png"}, "image_1": {"path": "1.png"}}
RECORD = {"qry_text": "a", "qry_img_path": "0.png", "tgt_text": ["a", "b"], "tgt_img_path": ["0.png", ""]}
PARTS = {
    "queries": {"query-id": 1, "query": "a"},
    "corpus": {"corpus-id": 1, "image": {"path": "0.png"}},
    "qrels": {"query-id": 1, "corpus-id": 1, "score": 1},
}
TABLES = [
    *(("winoground", "winoground/test.parquet", WINOGROUND, column) for column in WINOGROUND),
    *(("mmeb", "mmeb_eval/Table.parquet", RECORD, column) for column in RECORD),
    *(("mmeb", f"mmeb_eval/Pages/{part}/0.parquet", row, column) for part, row in PARTS.items() for column in row),
]


@pytest.mark.parametrize("value", [None, 5, 0.5, "a", b"a", [], [5], ["a", None], {"path": 5}, {"bytes": b""}, [["a"]]])
@pytest.mark.parametrize(("suite", "file", "row", "column"), TABLES)
def test_any_type_of_a_column_ends_in_results_or_a_sentence(tmp_path, suite, file, row, column, value):
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    if "Pages" in file:
        for part, whole in PARTS.items():
            (tmp_path / "mmeb_eval" / "Pages" / part).mkdir(parents=True)
            pq.write_table(pa.Table.from_pylist([whole]), tmp_path / "mmeb_eval" / "Pages" / part / "0.parquet")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([row | {column: value}]), tmp_path / file)
    check(tmp_path, suite)
