"""Test that a killed evaluation resumes with the same numbers, and that several processes give the same as one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cafe import Cafe
from cafe.content import Content
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.runner import evaluate, write

SUITES = ("retrieval", "pope")
LIMIT, BATCH = 12, 1  # so that there are several chunks


def command(base: Path, data: Path, output: Path) -> list[str]:
    options = {"--data": data, "--output": output, "--suite": ",".join(SUITES), "--limit": LIMIT, "--batch-size": BATCH}
    return [
        sys.executable,
        "-m",
        "cafe",
        "evaluate",
        str(base),
        *(str(part) for pair in options.items() for part in pair),
    ]


def start(arguments: list[str], **environment: str) -> subprocess.Popen[bytes]:
    known = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(arguments, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def written(output: Path) -> dict[str, str]:
    """Read what an evaluation wrote, by file."""
    files = [output / "results.json", output / "samples.json", *sorted((output / "outputs").glob("*.jsonl"))]
    assert len(files) > 3
    return {file.name: file.read_text() for file in files}


@pytest.fixture(scope="module")
def alone(random_base, scenes, tmp_path_factory):
    """Evaluate in one process that is never killed, with an empty cache."""
    output = tmp_path_factory.mktemp("alone")
    model = Cafe.load(random_base)
    done = evaluate(model, scenes, LIMIT, lambda line: None, suites=SUITES, cache_dir=output / "kept", batch_size=BATCH)
    write(done, output)
    return written(output)


def test_a_killed_evaluation_resumes_and_ends_with_the_same_files(alone, random_base, scenes, tmp_path):
    process = start(command(random_base, scenes, tmp_path))
    deadline = time.monotonic() + 1800
    while len(list((tmp_path / "kept").glob("*.npy"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()[-2000:]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").glob("*.npy")}
    assert len(kept) >= 3 and not (tmp_path / "results.json").exists()

    model = Counting(Cafe.load(random_base))
    done = evaluate(
        model, scenes, LIMIT, lambda line: None, suites=SUITES, cache_dir=tmp_path / "kept", batch_size=BATCH
    )
    write(done, tmp_path)
    assert written(tmp_path) == alone
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())
    assert model.embedded < 3 * LIMIT  # images and two captions each: some were cached


@pytest.mark.parametrize("launched", [{"ACCELERATE_USE_CPU": "true"}, {}], ids=["accelerate launch", "torchrun"])
def test_two_processes_write_the_same_files_as_one(launched, alone, random_base, scenes, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", **launched}
    ranks = [
        start(command(random_base, scenes, tmp_path), RANK=str(rank), LOCAL_RANK=str(rank), **meeting)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=1800)[0].decode() for process in ranks]
    assert all(process.returncode == 0 for process in ranks), said
    assert written(tmp_path) == alone
    assert "retrieval/image_to_text/R@1" in said[0] and "R@1" not in said[1]  # only the main process prints


class Counting:
    """Count what a model is given."""

    def __init__(self, model: Any, fingerprint: str = "") -> None:
        self.model, self.name = model, fingerprint
        self.embedded = self.answered = 0

    def fingerprint(self) -> str:
        return self.name or self.model.fingerprint()

    def embed(self, contents, **options):
        self.embedded += len(contents)
        return self.model.embed(contents, **options)

    def generate_batch(self, prompts, **options):
        self.answered += len(prompts)
        return self.model.generate_batch(prompts, **options)

    def score_batch(self, contents, answers, **options):
        return self.model.score_batch(contents, answers, **options)


class Words:
    """Embed a text by its length and answer with it."""

    def embed(self, contents, **options):
        return np.float32([[len(content), 1] for content in contents])

    def generate_batch(self, prompts, max_new_tokens=64, **options):
        return [prompt.text[:max_new_tokens] for prompt in prompts]


def test_cached_outputs_are_returned_without_the_model(tmp_path):
    first, second = Counting(Words(), "same"), Counting(Words(), "same")
    texts, prompts = ["a", "bb", "ccc"], [Content.of("ask")]
    for model in (first, second):
        subject = CachedModel(model, tmp_path)
        assert subject.embed(texts).tolist() == [[1, 1], [2, 1], [3, 1]]
        assert subject.generate(prompts, 2) == ["as"]
    assert (first.embedded, first.answered) == (3, 1)
    assert (second.embedded, second.answered) == (0, 0)


def test_other_weights_prompts_and_lengths_miss_the_cache(tmp_path):
    CachedModel(Counting(Words(), "one"), tmp_path).generate([Content.of("ask"), Content.of("more")], 2)
    other = Counting(Words(), "two")
    assert CachedModel(other, tmp_path).generate([Content.of("ask"), Content.of("more")], 2) == ["as", "mo"]
    same = Counting(Words(), "one")
    assert CachedModel(same, tmp_path).generate([Content.of("ask"), Content.of("more")], 3) == ["ask", "mor"]
    assert CachedModel(same, tmp_path).generate([Content.of("ask")], 2) == ["as"]
    assert CachedModel(same, tmp_path).generate([Content.of("asks"), Content.of("more")], 2) == ["as", "mo"]
    assert (other.answered, same.answered) == (2, 5)


def test_an_image_that_changed_misses_the_cache(tmp_path):
    class Bytes:
        def embed(self, contents, **options):
            return np.float32([[len(content.read_bytes())] for content in contents])

    image = tmp_path / "a.png"
    for text in ("one", "longer"):
        image.write_text(text)
        assert CachedModel(Counting(Bytes(), "same"), tmp_path / "kept").embed([image]).tolist() == [[len(text)]]


def test_the_fingerprint_follows_weights_and_prompts(random_base):
    from dataclasses import replace

    model, again = Cafe.load(random_base), Cafe.load(random_base)
    assert model.fingerprint() == again.fingerprint()
    again.chat_processor.prompts = replace(again.chat_processor.prompts, image_instruction="Other:")
    assert model.fingerprint() != again.fingerprint()
    before = model.fingerprint()
    next(model.lvlm.parameters()).data.view(-1)[0] += 1e-3
    assert model.fingerprint() != before


def test_the_cache_holds_no_partial_files(tmp_path):
    CachedModel(Counting(Words(), "same"), tmp_path).embed(["a"])
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
    CachedModel(Counting(Words(), "same"), tmp_path).generate([Content.of("ask")], 4)
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text()) == ["ask"]


def kept_file(folder: Path, suffix: str) -> Path:
    """Keep an embedding or an answer and return its file."""
    subject = CachedModel(Counting(Words(), "same"), folder)
    subject.embed(["a", "bb"]) if suffix == "npy" else subject.generate([Content.of("ask")], 4)
    (path,) = folder.glob(f"*.{suffix}")
    return path


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [
        ("npy", lambda whole: whole[:40]),
        ("npy", lambda whole: whole[:-1]),
        ("npy", lambda whole: b""),
        ("npy", lambda whole: b"no array"),
        ("npy", lambda whole: whole.replace(b"(2, 2)", b"(1, 4)")),
        ("npy", lambda whole: whole.replace(b"<f4", b"|O8")),
        ("json", lambda whole: b""),
        ("json", lambda whole: b'["ask"'),
        ("json", lambda whole: b"[]"),
        ("json", lambda whole: b"[null]"),
        ("json", lambda whole: b'{"ask": 1}'),
        ("json", lambda whole: b"[" * 100_000),
        ("json", lambda whole: b"\xff\xfe\xfd"),
    ],
)
def test_a_damaged_cached_result_is_computed_again_with_a_line_in_the_log(tmp_path, caplog, suffix, damage):
    path = kept_file(tmp_path, suffix)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = Counting(Words(), "same")
    assert CachedModel(again, tmp_path).embed(["a", "bb"]).tolist() == [[1, 1], [2, 1]]
    assert CachedModel(again, tmp_path).generate([Content.of("ask")], 4) == ["ask"]
    assert path.name in caplog.text and "damaged" in caplog.text
    assert path.read_bytes() == whole


def test_damaged_scores_are_computed_again(tmp_path):
    class Scores(Counting):
        def score_batch(self, contents, answers, **options):
            self.answered += len(contents)
            return [np.arange(len(some), dtype=float) for some in answers]

    for text in (None, "[[null]]", '["no"]', "[[[1]]]", '[{"a": 1}]'):
        model = Scores(Words(), "same")
        if text:
            (path,) = tmp_path.glob("*.json")
            path.write_text(text)
        (scores,) = CachedModel(model, tmp_path).score(["a"], [["x", "y"]])
        assert scores.tolist() == [0, 1] and model.answered == 1


def test_answers_are_limited_where_a_suite_allows_more():
    model = CachedModel(Words(), max_new_tokens=3)
    prompts = [Content.of("abcdef")]
    for same in (model, model.with_model(Words())):
        assert [same.generate(prompts, limit) for limit in (2, 3, 5)] == [["ab"], ["abc"], ["abc"]]


def test_scores_with_and_without_the_end_are_cached_apart(tmp_path):
    class Scores(Words):
        def score_batch(self, contents, answers, with_end=True, **options):
            return [np.array([float(with_end)] * len(some)) for some in answers]

    for with_end in (True, False, True):
        (scores,) = CachedModel(Counting(Scores(), "same"), tmp_path).score(["a"], [["x"]], with_end)
        assert scores.tolist() == [with_end]
    assert len(list(tmp_path.glob("*.json"))) == 2


RACE = """
import sys
from pathlib import Path
import numpy as np
from cafe.evaluation.cached_model import CachedModel

class Length:
    def fingerprint(self):
        return "same"

    def embed(self, contents, **options):
        return np.float32([[len(content), 1] for content in contents])

for number in range(300):
    subject = CachedModel(Length(), Path(sys.argv[1]))
    assert subject.embed(["a" * number]).tolist() == [[number, 1]]
"""


def test_two_evaluations_that_share_a_cache_do_not_disturb_each_other(tmp_path):
    racers = [start([sys.executable, "-c", RACE, str(tmp_path)]) for _ in range(2)]
    for racer in racers:
        said, _ = racer.communicate(timeout=300)
        assert racer.returncode == 0, said.decode()
    assert len(list(tmp_path.iterdir())) == 300
