"""The files of an evaluation, read back when they are whole, damaged or a stranger's."""

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import paths_in

from cafe.errors import CafeError
from cafe.evaluation.report.page import write_report
from cafe.evaluation.report.run import ReportRun, load_run
from cafe.evaluation.runner import dump_json, write
from cafe.evaluation.stored import read_embeddings, read_log, read_outputs, read_results, read_samples
from cafe.evaluation.suite import EvaluationResult

ABOUT = {"data": "here", "limit": None, "fingerprint": "same"}


def measured(data: Path) -> EvaluationResult:
    """Make up an evaluation with a file of each kind."""
    hits = [{"image": "0.png", "right": True}]
    random = np.random.default_rng(0)
    return EvaluationResult(
        results={"captions/exact": 50.0, "pope/mean/F1": 50.0},
        outputs={"captions": [{"id": n, "group": "a", "marks": {"captions/exact": n}} for n in range(2)]},
        samples={
            "data": str(data),
            "text_queries": [{"text": "a", "hits": hits}],
            "image_queries": [{"image": "0.png", "hits": [{"text": "b", "right": False}]}],
            "captions": [{"image": "0.png", "said": "a", "right": True}],
            "answers": [{"image": "0.png", "asked": "?", "said": "a", "answer": "b", "right": False}],
            "histogram": {"bins": [-1.0, 0.0, 1.0], "matched": [0.0, 1.0], "mismatched": [1.0, 0.0]},
        },
        embeddings={name: random.normal(size=(4, 3)).astype(np.float32) for name in ("images", "texts")},
        about=dict(ABOUT),
        means={"pope/mean/F1": ["captions/exact"]},
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an evaluation."""
    folder = tmp_path_factory.mktemp("whole")
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    write(measured(folder), folder / "run")
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    return folder


def test_what_is_not_finite_is_written_as_null_and_read_as_missing(tmp_path):
    evaluation = EvaluationResult(
        results={"a/b": math.nan, "a/c": math.inf, "a/d": 1.0},
        samples={"scores": [[math.nan, 1.0], (2.0, -math.inf)]},
        outputs={"a": [{"id": 0, "scores": math.nan, "marks": {}}]},
    )
    write(evaluation, tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in (*tmp_path.glob("*.json"), *tmp_path.glob("outputs/*")):
        json.loads(path.read_text(), parse_constant=refuse)
    assert json.loads((tmp_path / "results.json").read_text()) == {"a/b": None, "a/c": None, "a/d": 1.0}
    assert read_results(tmp_path / "results.json") == {"a/d": 1.0}
    write_report(tmp_path / "report.html", [ReportRun("run", tmp_path)])
    assert dump_json({"a": [1, "b"]}) == '{"a": [1, "b"]}'


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_results, "{"),
        (read_results, "[]"),
        (read_results, '{"a": "b"}'),
        (read_results, '{"a": true}'),
        (read_results, '{"a": 1' + "0" * 400 + "}"),
        (read_results, '{"a":' * 100_000),
        (read_samples, '{"captions": [{"image": "0.png", "said": 1, "right": true}]}'),
        (read_samples, '{"text_queries": {"text": "a"}}'),
        (read_samples, '{"data": 5}'),
        (read_samples, '{"histogram": {"bins": [0, 1], "matched": [1, 2], "mismatched": [1]}}'),
        (read_samples, '{"histogram": {"bins": [0, NaN], "matched": [1], "mismatched": [1]}}'),
        (read_outputs, '{"id": 1}'),
        (read_outputs, '{"marks": {"a": [1, 2, 3]}}'),
        (read_outputs, '{"marks": {"a": "b"}}'),
        (read_outputs, '{"marks": {"a": [NaN, 1]}}'),
        (read_outputs, "[1]"),
        (read_log, "5"),
        (read_embeddings, "no archive"),
    ],
)
def test_a_broken_file_is_named_in_a_value_error(tmp_path, read, text):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        read(path)


def test_embeddings_that_are_objects_or_not_finite(tmp_path, whole, caplog):
    np.savez(tmp_path / "objects.npz", images=np.array([{"a": 1}], object))
    with pytest.raises(ValueError, match="damaged"):
        read_embeddings(tmp_path / "objects.npz")
    np.savez(tmp_path / "texts.npz", images=np.array(["a"]))
    with pytest.raises(ValueError, match="does not hold numbers"):
        read_embeddings(tmp_path / "texts.npz")
    for images in (np.full((4, 3), np.nan), np.zeros((0, 3)), np.zeros(3), np.zeros((4, 2)), np.zeros((4, 1))):
        evaluation = measured(whole)
        evaluation.embeddings["images"] = images
        write(evaluation, tmp_path / "run")
        caplog.clear()
        write_report(tmp_path / "report.html", [ReportRun("run", tmp_path / "run")])
        assert '<section id="map">' not in (tmp_path / "report.html").read_text()
        assert "no map is drawn" in caplog.text


def test_equal_embeddings_have_a_map(tmp_path, whole):
    evaluation = measured(whole)
    evaluation.embeddings = {"images": np.ones((4, 3)), "texts": np.ones((4, 3))}
    write(evaluation, tmp_path)
    write_report(tmp_path / "report.html", [ReportRun("run", tmp_path)])
    assert '<section id="map">' in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("name", ["results.json", "samples.json", "means.json", "embeddings.npz", "about.json"])
@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": [1, {}]}'])
def test_an_evaluation_that_adds_to_a_damaged_one_is_written(tmp_path, caplog, name, damage):
    write(EvaluationResult(results={"vqa/all": 1.0}, about=dict(ABOUT)), tmp_path)
    (tmp_path / name).write_bytes(damage)
    write(EvaluationResult(results={"pope/all": 2.0}, about=dict(ABOUT)), tmp_path)
    is_lost = name in ("results.json", "about.json")
    kept = {} if is_lost else {"vqa/all": 1.0}
    if name != "samples.json" or damage != b'{"a": [1, {}]}':  # samples of a kind that is not shown may be anything
        assert name == "about.json" or name in caplog.text
    assert read_results(tmp_path / "results.json") == kept | {"pope/all": 2.0}
    load_run(ReportRun("run", tmp_path))


TEXTS = st.sampled_from(["", "0.png", "..", "\0", "\ud83d", "/etc/hostname", "<b>", "data:x"]) | st.text(max_size=5)
NUMBERS = st.sampled_from([0, 10**400, 1e308, float("nan")]) | st.integers() | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


@st.composite
def changed(draw: Any, document: Any) -> Any:
    """Replace a value of a document, or the whole of it."""
    result = [copy.deepcopy(document)]
    *way, last = [0, *draw(st.sampled_from(paths_in(document)))]
    target: Any = result
    for key in way:
        target = target[key]
    target[last] = draw(VALUES)
    return result[0]


@pytest.mark.parametrize("name", ["results.json", "samples.json", "means.json", "outputs/captions.jsonl", "log"])
def test_any_value_in_any_field_ends_in_a_page_or_a_sentence(whole, tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("changed")
    write(measured(whole), folder)
    (folder / "log").write_text('{"step": 1, "loss": 0.5}\n')
    path = folder / name
    is_lines = path.suffix != ".json"
    parsed = [json.loads(line) for line in path.read_text().splitlines()] if is_lines else []
    document = parsed if is_lines else json.loads(path.read_text())
    runs = [ReportRun("a", whole / "run"), ReportRun("b", folder, folder / "log")]

    @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changed(document))
    def run(other: Any) -> None:
        rows = other if is_lines and isinstance(other, list) else [other]
        path.write_text("\n".join(map(json.dumps, rows)))
        try:
            write_report(folder / "report.html", runs)
        except CafeError as error:
            assert "\n" not in str(error)

    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    run()
