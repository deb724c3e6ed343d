"""Everything that is measured on a GPU, in one command of at most twelve minutes: `make gpu`.

Each step is a process with a time limit of its own. Its rows, and how it ended, are written to docs/gpu.json as soon as
it has, so whatever happens later, what was measured is kept; meanwhile its output is in runs/gpu. A step that would not
fit into the time that is left is skipped.

python benchmarks/gpu.py [--only NAME ...] [--seconds 720] [--output docs/gpu.json] [--logs runs/gpu]
python benchmarks/gpu.py --table    # writes the tables of docs/gpu.json into docs/benchmarks.md
python benchmarks/gpu.py --smoke    # tiny sizes, as a CPU can; into runs/gpu/smoke.json

With --only, the other steps of the file stay as they are: where a machine is lent for ten minutes at a time, two calls
measure everything.
"""

import argparse
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from cafe.utils.atomic import atomic_write_text

ROOT = Path(__file__).parents[1]
OUTPUT, LOGS, PAGE = ROOT / "docs" / "gpu.json", ROOT / "runs" / "gpu", ROOT / "docs" / "benchmarks.md"
TOTAL = 720  # seconds
SMOKE_LIMIT = 240  # seconds of each step, on a CPU
LAST_LINES = 12  # of the output of a step, which are kept
BEGIN, END = "<!-- gpu.json: begin -->", "<!-- gpu.json: end -->"
NEVER_RUN = (
    "`make gpu` has not been run since attention over trees was rewritten, so there are no figures of its kernels yet."
)
PACKAGES = ("torch", "transformers", "triton", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")


@dataclass(frozen=True)
class Step:
    """Describe a process that measures something.

    Attributes:
        name: of the step.
        arguments: of Python, without `--json FILE`.
        limit: seconds after which it is killed.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float


def real_sizes(*arguments: str) -> tuple[str, ...]:
    """Return a command of the benchmark of real sizes."""
    return ("benchmarks/real_sizes.py", *arguments)


SEVEN_B = ("--recipe", "recipes/cafe-7b.yaml", "--image", "384x384", "--dtype", "bfloat16")
TESTS = ("-m", "pytest", "-p", "pytest_journal", "--tb=short", "tests/attention/test_devices.py", "tests/test_cuda.py")
STEPS = (
    Step("attention kernels", ("benchmarks/attention_kernels.py",), 110),
    Step("0.5B beside A and B", real_sizes("--pairs", "4", "--measure", "compare"), 70),
    Step("7B beside A and B", real_sizes(*SEVEN_B, "--pairs", "2", "--measure", "compare"), 70),
    Step("tests", TESTS, 130),
    Step("0.5B by every kernel", real_sizes("--many", "8", "--measure", "attentions", "--compile"), 130),
    Step("7B by every kernel", real_sizes(*SEVEN_B, "--many", "5", "--measure", "attentions", "--compile"), 130),
    Step("0.5B with more pairs", real_sizes("--measure", "growth"), 45),
    Step(
        "0.5B in bfloat16 weights",
        real_sizes("--dtype", "bfloat16", "--many", "8", "--measure", "attentions", "--kernels", "paths"),
        35,
    ),
)

TINY = ("--small", "--image", "384x384", "--caption", "20", "--pairs", "1")
SMOKE_STEPS = (
    Step("attention kernels", ("benchmarks/attention_kernels.py", "--small"), SMOKE_LIMIT),
    Step("beside A and B", real_sizes(*TINY, "--measure", "compare"), SMOKE_LIMIT),
    Step("by every kernel", real_sizes(*TINY, "--measure", "attentions", "--compile"), SMOKE_LIMIT),
    Step("with more pairs", real_sizes(*TINY, "--measure", "growth", "--dtype", "bfloat16"), SMOKE_LIMIT),
    Step("tests", TESTS, SMOKE_LIMIT),
)


def run_steps(steps: Sequence[Step], output: Path, logs: Path, seconds: float, keep: bool = False) -> dict[str, Any]:
    """Run steps one after the other, and write what there is after each.

    Args:
        steps: what to run.
        output: the JSON file.
        logs: the directory of what steps print, and of their rows while they run.
        seconds: for all of them.
        keep: keep the other steps that are in the file.

    Returns:
        What the file holds.
    """
    deadline = time.monotonic() + seconds
    results = read_results(output) if keep else None
    results = results or {"steps": {}}
    results["machine"] = describe_machine()
    commit = describe_commit()  # now: results are files of the repository too
    for directory in (logs, output.parent):
        directory.mkdir(parents=True, exist_ok=True)
    for step in steps:
        left = deadline - time.monotonic()
        if step.limit > left:
            result = {"status": f"skipped: it may take {step.limit:.0f} s, and {max(left, 0):.0f} s were left"}
            results["steps"].setdefault(step.name, result)
        else:
            print(f"{step.name} ...", flush=True)
            result = {**run_step(step, logs), "commit": commit}
            results["steps"][step.name] = result
        print(f"{step.name}: {result['status']}", flush=True)
        atomic_write_text(output, without_paths(json.dumps(results, indent=1)) + "\n")
    return results


def run_step(step: Step, logs: Path) -> dict[str, Any]:
    """Run a step, and return how it ended and its rows, also those from before it failed or was killed."""
    file_name = re.sub(r"\W+", "-", step.name)
    log, rows_file = logs / f"{file_name}.log", logs / f"{file_name}.json"
    rows_file.unlink(missing_ok=True)
    command = [sys.executable, *step.arguments, "--json", str(rows_file)]
    started = time.monotonic()
    with log.open("w") as stream:
        # A session of its own, so that the processes which it starts are killed with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            exit_status: int | None = process.wait(step.limit)
        except subprocess.TimeoutExpired:
            exit_status = None
        finally:
            kill_group(process)

    status = {0: "ok", None: f"timed out after {step.limit:.0f} s"}.get(exit_status, f"failed ({exit_status})")
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {
        "status": status,
        "seconds": round(time.monotonic() - started, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(("python", *step.arguments)),
        "rows": json.loads(rows_file.read_text()) if rows_file.exists() else [],
        "last_lines": lines[-LAST_LINES:] if status != "ok" else lines[-1:],
    }


def without_paths(text: str) -> str:
    """Cut the paths of this machine out of what steps print, which is committed."""
    return text.replace(f"{ROOT}/", "").replace(f"{sys.prefix}/", "")


def kill_group(process: "subprocess.Popen[bytes]") -> None:
    """Kill what is left of a process and those that it started."""
    with suppress(ProcessLookupError):  # all may have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, str]:
    """Return the environment of a step."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        # Segments that grow leave no gaps of the wrong size where several layouts are measured in one process.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def describe_machine() -> dict[str, str]:
    """Describe the GPU, its driver, and the versions of what is measured with."""
    gpu = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"gpu": gpu.splitlines()[0] if gpu else "no GPU", **versions}


def describe_commit() -> str:
    """Describe the commit that is measured; "unknown" where the files are no repository."""
    return output_of("git", "describe", "--always", "--dirty") or "unknown"


def output_of(*command: str) -> str:
    """Return what a command prints, or nothing where it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def read_results(path: Path) -> dict[str, Any] | None:
    """Read a file of results, if there is one."""
    if not path.exists():
        return None
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def format_results(results: dict[str, Any] | None) -> str:
    """Format results as Markdown."""
    if results is None:
        return NEVER_RUN
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    steps = [format_step(name, result) for name, result in results["steps"].items()]
    return "\n\n".join([f"Measured by `make gpu`: {machine}.", *steps])


def format_step(name: str, result: dict[str, Any]) -> str:
    """Format a step: how it ended, and a table of each kind of its rows."""
    if "command" not in result:
        return f"**{name}**: {result['status']}."
    about = f"**{name}**: {result['status']}, {result['seconds']:.0f} s, {result['date'][:10]}, {result['commit']}"
    parts = [about, f"`{result['command']}`"]
    tests = [row["outcome"] for row in result["rows"] if "outcome" in row]
    if tests:
        parts.append(", ".join(f"{count} {outcome}" for outcome, count in Counter(tests).items()) + ".")
    shown = [row for row in result["rows"] if row.get("outcome") != "passed"]
    for columns, rows in groupby(shown, key=tuple):
        lines = [columns, ["---"] * len(columns), *([cell(value) for value in row.values()] for row in rows)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    if result["status"] != "ok":
        parts.append("```text\n" + "\n".join(result["last_lines"]) + "\n```")
    return "\n\n".join(parts)


def cell(value: Any) -> str:
    """Format a figure for a table."""
    if isinstance(value, list):
        return "<br>".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def write_tables(results: dict[str, Any] | None, page: Path) -> None:
    """Write results between the marks in a page."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    atomic_write_text(page, f"{before}{BEGIN}\n\n{format_results(results)}\n\n{END}{after}")


def main() -> int:
    """Run the steps, or write their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(step.name for step in STEPS)}")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all steps")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--logs", type=Path, default=LOGS)
    parser.add_argument("--table", action="store_true", help="write the tables into docs/benchmarks.md")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, as a CPU can")
    options = parser.parse_args()
    output = options.output or (LOGS / "smoke.json" if options.smoke else OUTPUT)
    if options.table:
        write_tables(read_results(output), PAGE)
        return 0

    # A step is killed with this process, which a time limit from outside ends by SIGTERM.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    steps = SMOKE_STEPS if options.smoke else STEPS
    if unknown := set(options.only or ()) - {step.name for step in steps}:
        parser.error(f"There is no step {', '.join(sorted(unknown))}.")
    chosen = [step for step in steps if not options.only or step.name in options.only]
    results = run_steps(chosen, output, options.logs, options.seconds, keep=bool(options.only))
    return int(any(results["steps"][step.name]["status"] != "ok" for step in chosen))


if __name__ == "__main__":
    sys.exit(main())
