"""The driver of what is measured on a GPU keeps whatever was measured, and its commands run without one."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

# A benchmark that ends as its first argument says, once it has written a row.
FAKE = """
import json, subprocess, sys, time
ending, rows = sys.argv[1], sys.argv[-1]
with open(rows, "w") as file:
    json.dump([{"figure": ending, "ms": 1234.5, "error": ["1e-07", "2e-07"], "kernels": ["void f<a|b>"]}], file)
print("this is", ending)
if ending == "fails":
    sys.exit("it is broken in ROOT/benchmarks")
if ending == "hangs":
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
    time.sleep(600)
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


gpu = load("gpu")


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE.replace("ROOT", str(ROOT)))
    return lambda ending, limit=60.0: gpu.Step(ending, (str(script), ending), limit)


def is_running(pid: int) -> bool:
    """Tell whether a process exists and is more than an entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_whatever_happens_to_a_step_what_was_measured_is_kept(fake, tmp_path):
    output = tmp_path / "docs" / "gpu.json"
    steps = [fake("works"), fake("hangs", 3), fake("fails"), fake("works too"), fake("comes too late", 500)]
    gpu.run_steps(steps, output, tmp_path / "logs", seconds=400)
    results = json.loads(output.read_text())["steps"]
    assert list(results) == [step.name for step in steps]
    statuses = [result["status"] for result in results.values()]
    assert statuses[:4] == ["ok", "timed out after 3 s", "failed (1)", "ok"]
    assert statuses[4].startswith("skipped: it may take 500 s")
    for name in ("works", "hangs", "fails", "works too"):
        assert [row["figure"] for row in results[name]["rows"]] == [name]
    assert results["fails"]["last_lines"] == ["this is fails", "it is broken in benchmarks"]  # not where
    # What the killed step had started is gone as well.
    deadline = time.monotonic() + 10
    while is_running(int(results["hangs"]["last_lines"][-1])):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_results_are_written_after_each_step(fake, tmp_path, monkeypatch):
    output, written = tmp_path / "gpu.json", []
    run_step = gpu.run_step

    def run_and_look(step, logs):
        written.append(list(json.loads(output.read_text())["steps"]) if output.exists() else [])
        return run_step(step, logs)

    monkeypatch.setattr(gpu, "run_step", run_and_look)
    gpu.run_steps([fake("a"), fake("b"), fake("c")], output, tmp_path, 400)
    assert written == [[], ["a"], ["a", "b"]]


def test_steps_can_be_run_in_two_calls(fake, tmp_path):
    output = tmp_path / "gpu.json"
    gpu.run_steps([fake("first"), fake("second", 500)], output, tmp_path, 400)
    results = gpu.run_steps([fake("second")], output, tmp_path, 400, keep=True)
    assert [result["status"] for result in results["steps"].values()] == ["ok", "ok"]
    # A step that does not fit takes nothing away that was measured before.
    results = gpu.run_steps([fake("second", 500)], output, tmp_path, 400, keep=True)
    assert results["steps"]["second"]["status"] == "ok"


def test_a_step_is_killed_with_the_driver(fake, tmp_path):
    script = fake("hangs").arguments[0]
    code = (
        f"import signal, sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import gpu; from pathlib import Path;"
        "signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1));"
        f"gpu.run_step(gpu.Step('hangs', ({script!r}, 'hangs'), 600), Path({str(tmp_path)!r}))"
    )
    log = tmp_path / "hangs.log"
    driver = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (log.exists() and len(log.read_text().splitlines()) == 2):
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    driver.terminate()
    driver.wait(30)
    pid = int(log.read_text().splitlines()[1])
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_all_steps_fit_into_the_time_and_name_files_that_exist():
    assert sum(step.limit for step in gpu.STEPS) <= gpu.TOTAL <= 720
    assert len({step.name for step in gpu.STEPS}) == len(gpu.STEPS)
    for step in (*gpu.STEPS, *gpu.SMOKE_STEPS):
        for argument in step.arguments:
            if "/" in argument:
                assert (ROOT / argument).exists()


def test_tables_hold_the_rows_and_how_steps_ended(fake, tmp_path):
    results = gpu.run_steps([fake("works"), fake("fails"), fake("late", 500)], tmp_path / "gpu.json", tmp_path, 400)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{gpu.BEGIN}\nyesterday\n{gpu.END}\nafter\n")
    gpu.write_tables(results, page)
    text = page.read_text()
    assert text.startswith(f"before\n{gpu.BEGIN}\n\nMeasured by `make gpu`: gpu ") and text.endswith("\nafter\n")
    assert "yesterday" not in text and "python 3." in text
    assert "| figure | ms | error | kernels |\n| --- | --- | --- | --- |\n" in text
    assert "| works | 1234 | 1e-07<br>2e-07 | void f&lt;a\\|b> |" in text
    assert "**fails**: failed (1)" in text and "it is broken" in text
    assert "**late**: skipped" in text
    gpu.write_tables(None, page)
    assert page.read_text() == f"before\n{gpu.BEGIN}\n\n{gpu.NEVER_RUN}\n\n{gpu.END}\nafter\n"


def test_the_page_shows_the_results_that_there_are():
    text = gpu.PAGE.read_text()
    shown = text[text.index(gpu.BEGIN) : text.index(gpu.END)]
    assert shown == f"{gpu.BEGIN}\n\n{gpu.format_results(gpu.read_results(gpu.OUTPUT))}\n\n"


def rows_of(tmp_path: Path, *arguments: str) -> list[dict]:
    rows = tmp_path / "rows.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments, "--json", str(rows)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    return json.loads(rows.read_text())


def test_every_kernel_gives_the_attention_of_float64(tmp_path):
    rows = rows_of(tmp_path, "benchmarks/attention_kernels.py", "--small")
    compared = {row["figure"].removeprefix("small: "): row for row in rows if row["figure"].startswith("small: ")}
    errors = {name: row["error"] for name, row in compared.items() if "error" in row}
    assert set(errors) == set(compared) - {"flex"} >= {"dense mask, as PyTorch chooses", "blocks", "paths"}
    for error in errors.values():
        assert len(error) == 4 and max(map(float, error)) <= 1e-5
    assert "does not support backward on CPU" in compared["flex"]["failed"]
    assert [len(row["ms first"]) for row in rows if "ms first" in row] == [2, 2]
    assert [row["count"] for row in rows if row["figure"].startswith("NaN")] == [0, 0]


def test_outcomes_of_tests_are_rows(tmp_path):
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pytest\n@pytest.fixture\ndef broken(): 1 / 0\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "def test_c(broken): pass\ndef test_d(): pytest.skip('no')\n"
    )
    step = gpu.Step("tests", (*gpu.TESTS[:-2], str(tests), "-c", os.devnull), 60)
    result = gpu.run_steps([step], tmp_path / "gpu.json", tmp_path, 400)["steps"]["tests"]
    assert result["status"] == "failed (1)"
    outcomes = {row["figure"].rpartition("::")[2]: row["outcome"] for row in result["rows"]}
    assert outcomes == {"test_a": "passed", "test_b": "failed", "test_c": "failed", "test_d": "skipped"}
    text = gpu.format_step("tests", result)
    assert "1 passed, 2 failed, 1 skipped." in text
    assert "::test_b | failed" in text and "::test_a" not in text


def test_steps_of_real_sizes_are_measured_and_fitted_by_a_line(tmp_path):
    arguments = ("--small", "--image", "384x384", "--caption", "20", "--pairs", "1", "--kernels", "paths")
    rows = rows_of(tmp_path, "benchmarks/real_sizes.py", *arguments, "--measure", "attentions", "growth")
    used, one, two, line = rows
    assert used["figure"] == "MFU, 1 pairs in one pass, paths" and used["kernels"]
    assert line["ms fixed"] + line["ms a pair"] == pytest.approx(one["ms"])
    assert line["ms fixed"] + 2 * line["ms a pair"] == pytest.approx(two["ms"])
