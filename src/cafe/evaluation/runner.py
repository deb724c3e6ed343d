"""Run suites on a folder of evaluation files: those that are named, or the default ones whose files exist."""

import difflib
import fcntl
import io
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from cafe.errors import RecipeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.stored import (
    read_embeddings,
    read_means,
    read_or_leave_out,
    read_results,
    read_samples,
)
from cafe.evaluation.suite import EvaluationResult, Suite
from cafe.evaluation.suites import SUITES
from cafe.training.recipe import Recipe
from cafe.utils.atomic import atomic_write_bytes, atomic_write_text
from cafe.utils.text import escape_controls

logger = logging.getLogger(__name__)

__all__ = ["EvaluationResult", "training_evaluator", "evaluate", "describe_suites", "measure", "write"]


def evaluate(
    model: Any,
    data: Path,
    limit: int | None = None,
    report: Callable[[str], None] = print,
    *,
    suites: Sequence[str] = (),
    cache_dir: Path | None = None,
    batch_size: int | None = None,
    distributed: bool = False,
    progress: bool = False,
    judges: Sequence[str] = (),
    max_new_tokens: int | None = None,
) -> EvaluationResult:
    """Run suites on the files in `data`, on the first `limit` records of each.

    Args:
        model: a `Cafe`, or anything with its methods.
        data: the folder of evaluation files.
        limit: maximum number of records per suite; None for all.
        report: receives the log lines.
        suites: names of suites, or "all"; if empty, the default suites whose files exist.
        cache_dir: a folder that caches embeddings and answers as they are computed, from which an interrupted
            evaluation resumes.
        batch_size: number of inputs per forward pass; the model's own choice if None.
        distributed: split the work among the processes of torch.distributed, all of which must make the same call.
        progress: show progress bars.
        judges: the judges of free descriptions: "exact", "self", or language models by directory or Hub id.
        max_new_tokens: the maximum number of tokens in an answer where a suite's own is larger. A model that does not
            stop, as after contrastive training alone, answers sooner.

    Raises:
        CafeError: a suite is unknown or lacks its files, there is no evaluation file at all, or a file is invalid.
    """
    selected = select_suites(data, suites)
    cached = CachedModel(model, cache_dir, batch_size, distributed, progress, judges, max_new_tokens)
    # By these, `write` knows whether the results of two calls belong together.
    about = {"data": str(data.resolve()), "limit": limit, "fingerprint": cached.fingerprint}
    # Only where it is given: results that were written without it still belong together.
    if max_new_tokens:
        about["max_new_tokens"] = max_new_tokens
    evaluation = EvaluationResult(samples={"data": str(data.resolve())}, about=about)
    for number, suite in enumerate(selected, 1):
        if cached.is_main_process:
            # The first three of its files tell which data is measured; MMEB alone has dozens.
            files = ", ".join(str(path.relative_to(data)) for path in suite.find_files(data)[:3])
            report(f"[{number}/{len(selected)}] {suite.name}: {escape_controls(files)}")
        cached.suite = suite.name
        evaluation.add(suite.run(cached, data, limit))
    return evaluation


def measure(model: Any, data: Path, directory: Path, suites: Sequence[str] = ()) -> dict[str, float]:
    """Evaluate a model into a directory and return the results. An interrupted call resumes from its cache there.

    Args:
        model: a `Cafe`.
        data: the folder of evaluation files.
        directory: where the results and the cache are written.
        suites: names of suites, as in `evaluate`.
    """
    evaluation = evaluate(model, data, suites=suites, cache_dir=directory / "kept", progress=True)
    write(evaluation, directory)
    return evaluation.results


class NullModel:
    """Give empty answers and equal embeddings: evaluating it yields the names of all results at no cost."""

    def embed(self, contents: Sequence[Any], batch_size: int = 1) -> Float32[np.ndarray, "contents dim"]:
        """Return the same vector for every content."""
        return np.tile(np.array([1, 0], np.float32), (len(contents), 1))

    def generate_batch(self, prompts: Sequence[Any], max_new_tokens: int = 1, batch_size: int = 1) -> list[str]:
        """Return an empty answer to every prompt."""
        return [""] * len(prompts)

    def score_batch(
        self, contents: Sequence[Any], answers: Sequence[Sequence[str]], batch_size: int = 1, with_end: bool = True
    ) -> list[Float[np.ndarray, " answers"]]:
        """Return the same score for every answer."""
        return [np.zeros(len(choices)) for choices in answers]

    def with_prompts(self, **changes: Any) -> "NullModel":
        """Return itself, whose answers do not depend on prompts."""
        return self


def training_evaluator(recipe: Recipe) -> Callable[[Any], dict[str, float]] | None:
    """Make the function that evaluates a model during training, as the recipe says; None if it does not ask for one.

    Raises:
        RecipeError: there is no evaluation file, or no evaluation gives the result that `metric_for_best_model` names.
    """
    config = recipe.evaluation
    data = Path(config.data)
    if not config.eval_steps:
        return None

    def evaluate_quietly(model: Any) -> dict[str, float]:
        """Evaluate on the default suites, without log lines between those of the training."""
        return evaluate(model, data, config.limit, lambda line: None).results

    # Both mistakes are found now, not hours later at the first evaluation.
    if config.data:
        select_suites(data)
    if recipe.metric_for_best_model:
        names: list[str] = []
        if config.data:
            names += evaluate_quietly(NullModel())
        if config.sources:  # the training loop itself measures the loss on held-out records
            names.append("held_out/lm_loss")
        # A leading minus means that less is better.
        _require_result(recipe.metric_for_best_model.removeprefix("-"), names)
    return evaluate_quietly if config.data else None


def _require_result(wanted: str, names: Sequence[str]) -> None:
    """Check that an evaluation gives a result; one whose results are not known passes."""
    if not names or wanted in names:
        return
    [nearest] = difflib.get_close_matches(wanted, names, n=1, cutoff=0.0)
    raise RecipeError(f"The evaluation gives no result {wanted} for metric_for_best_model; the nearest is {nearest}.")


def select_suites(data: Path, names: Sequence[str] = ()) -> list[Suite]:
    """Select suites by name, or all those whose files exist by the name "all".

    Without names, select the default suites whose files exist; if there are none, the other suites whose files exist.

    Raises:
        RecipeError: a suite is unknown or lacks its files, or there is no evaluation file in `data`.
    """
    if not data.is_dir():
        raise RecipeError(f"The folder of evaluation files {data} does not exist.")
    # A named suite without files is an error, also beside "all". Suites run in the order of `SUITES`.
    named = [_named_suite(name, data) for name in names if name != "all"]
    if named and "all" not in names:
        return [suite for suite in SUITES if suite in named]

    existing = _existing_suites(data)
    if names:
        return existing
    # Without names, a folder with files for long suites alone runs those.
    return [suite for suite in existing if suite.default] or existing


def _existing_suites(data: Path) -> list[Suite]:
    """List the suites whose files exist; raise if there are none."""
    existing = [suite for suite in SUITES if suite.find_files(data)]
    if not existing:
        raise RecipeError(
            f"There is no evaluation file in {data}; `cafe evaluate --list` shows the files each suite expects."
        )
    return existing


def _named_suite(name: str, data: Path) -> Suite:
    """Look up a suite whose files exist."""
    suites = {suite.name: suite for suite in SUITES}
    if name not in suites:
        raise RecipeError(f"There is no suite {name!r}; the suites are {', '.join(suites)}, or all.")
    suite = suites[name]
    if not suite.find_files(data):
        expected = "; ".join(suite.files)
        raise RecipeError(f"The suite {name} lacks its files in {data}: {expected}. Download: {suite.download}.")
    return suite


def describe_suites(data: Path | None = None) -> str:
    """Describe every suite: what it measures, the files it expects in the folder, and where to download them."""
    return "\n".join(_describe_suite(suite, data) for suite in SUITES)


def _describe_suite(suite: Suite, data: Path | None) -> str:
    """Describe one suite in a few lines."""
    title = f"{suite.name}: {suite.measures}"
    if not suite.default:
        title += "  [runs only when named]"
    if data is not None:
        title += "  [files found]" if suite.find_files(data) else "  [files missing]"
    lines = [title, *(f"    {file}" for file in suite.files), f"    from: {suite.download}"]
    if suite.sources:
        lines.append(f"    protocol: {', '.join(suite.sources)}")
    return "\n".join(lines)


def write(evaluation: EvaluationResult, directory: Path) -> None:
    """Write `results.json` and what it rests on: `outputs/PART.jsonl`, samples, embeddings, means and `about.json`.

    Results that an evaluation of the same model, data and limit wrote there before are kept beside the new ones. Of two
    evaluations that write at the same time, one waits for the other.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        _write(evaluation, directory)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory, waiting for whoever holds it."""
    with (directory / ".lock").open("w") as handle:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write(evaluation: EvaluationResult, directory: Path) -> None:
    """Write the files of an evaluation into a directory that no other process writes to."""
    if _continues(evaluation, directory):
        evaluation = _merge_existing(evaluation, directory)
    else:
        # The rows of another model or other data would count in the report.
        shutil.rmtree(directory / "outputs", ignore_errors=True)
    for part, rows in evaluation.outputs.items():
        path = directory / "outputs" / f"{part.replace('/', '_')}.jsonl"
        path.parent.mkdir(exist_ok=True)
        atomic_write_text(path, "".join(dump_json(row) + "\n" for row in rows))
    for name, value in evaluation.files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        _write_json(directory / name, value)
    # What a later call merges is complete before `about.json` says that it belongs to this evaluation.
    atomic_write_text(directory / "samples.json", dump_json(evaluation.samples) + "\n")
    _write_arrays(directory / "embeddings.npz", evaluation.embeddings)
    _write_json(directory / "means.json", evaluation.means)
    _write_json(directory / "about.json", evaluation.about)
    _write_json(directory / "results.json", evaluation.results)


def _continues(evaluation: EvaluationResult, directory: Path) -> bool:
    """Return whether a directory holds an evaluation of the same model, data and limit."""
    path = directory / "about.json"
    # Without a cache there is no fingerprint: two models cannot be told apart.
    if not path.is_file() or not evaluation.about.get("fingerprint"):
        return False
    try:
        return bool(json.loads(path.read_bytes()) == evaluation.about)
    except (ValueError, RecursionError):  # damaged
        return False


def dump_json(value: Any, indent: int | None = None) -> str:
    """Write a value as JSON: a number that is not finite, which JSON does not have, as null, other kinds as text."""
    write_finite = partial(json.dumps, indent=indent, allow_nan=False, default=str)  # the id of a table may be a date
    try:
        return write_finite(value)
    except ValueError:
        return write_finite(_without_nan(value))


def _without_nan(value: Any) -> Any:
    """Replace what is not finite by None, in lists and mappings too."""
    match value:
        case dict():
            return {name: _without_nan(item) for name, item in value.items()}
        case list() | tuple():
            return [_without_nan(item) for item in value]
        case float() if not math.isfinite(value):
            return None
    return value


def _write_json(path: Path, value: Any) -> None:
    """Write JSON that people can read, whole or not at all."""
    atomic_write_text(path, dump_json(value, indent=2) + "\n")


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an `npz` file whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    atomic_write_bytes(path, buffer.getvalue())


def _merge_existing(evaluation: EvaluationResult, directory: Path) -> EvaluationResult:
    """Add the results of other suites that a directory holds, as far as its files are whole."""
    read = partial(read_or_leave_out, warn=logger.warning)
    return EvaluationResult(
        results=read(read_results, directory / "results.json") | evaluation.results,
        outputs=evaluation.outputs,
        samples=read(read_samples, directory / "samples.json") | evaluation.samples,
        embeddings=read(read_embeddings, directory / "embeddings.npz") | evaluation.embeddings,
        about=evaluation.about,
        files=evaluation.files,
        means=read(read_means, directory / "means.json") | evaluation.means,
    )
