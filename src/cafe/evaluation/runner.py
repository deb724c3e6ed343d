"""Measures a model on a folder of evaluation files: the suites that are asked for, or all whose files are there."""

import difflib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import EvaluationResult, Suite
from cafe.evaluation.suites import SUITES
from cafe.training.recipe import Recipe
from cafe.utils.atomic import atomic_write_text, commit, staging_path

__all__ = ["EvaluationResult", "training_evaluator", "evaluate", "describe_suites", "measure", "write"]


def evaluate(
    model: Any,
    data: Path,
    limit: int | None = None,
    report: Callable[[str], None] = print,
    *,
    suites: Sequence[str] = (),
    keep: Path | None = None,
    batch_size: int | None = None,
    together: bool = False,
    progress: bool = False,
    judges: Sequence[str] = (),
) -> EvaluationResult:
    """Runs suites on the files in `data`, on the first `limit` records of each.

    Args:
        model: a `Cafe`, or anything with its methods.
        data: the folder of evaluation files.
        limit: records of each suite; all of them unless given.
        report: takes the lines meant for people.
        suites: names of suites, or "all"; the usual ones whose files are there unless given.
        keep: a folder for embeddings and answers as they come, so that an evaluation that was killed goes on.
        batch_size: contents at once; the model's own choice unless given.
        together: share the work among the processes of torch.distributed, all of which must call this alike.
        progress: show rate and time left.
        judges: who judges free descriptions: "exact", "self", or language models by directory or Hub id.

    Raises:
        CafeError: a suite is unknown or lacks its files, there is no evaluation file at all, or a file is not what it
            should be.
    """
    chosen = select_suites(data, suites)
    subject = CachedModel(model, keep, batch_size, together, progress, judges)
    about = {"data": str(data.resolve()), "limit": limit, "fingerprint": subject.fingerprint}
    done = EvaluationResult(samples={"data": str(data.resolve())}, about=about)
    for number, suite in enumerate(chosen, 1):
        if subject.is_main_process:
            files = ", ".join(str(path.relative_to(data)) for path in suite.find_files(data)[:3])
            report(f"[{number}/{len(chosen)}] {suite.name}: {files}")
        subject.suite = suite.name
        done.add(suite.run(subject, data, limit))
    return done


def measure(model: Any, data: Path, directory: Path, suites: Sequence[str] = ()) -> dict[str, float]:
    """Evaluates a model into a directory, with progress, going on from what is kept there; returns the results."""
    evaluation = evaluate(model, data, suites=suites, keep=directory / "kept", progress=True)
    write(evaluation, directory)
    return evaluation.results


class NullModel:
    """A model that says nothing and embeds all alike: what measures it has results of the same names, at no cost."""

    def embed(self, contents: Sequence[Any], batch_size: int = 1) -> Float32[np.ndarray, "contents dim"]:
        return np.tile(np.array([1, 0], np.float32), (len(contents), 1))

    def generate_batch(self, prompts: Sequence[Any], max_new_tokens: int = 1, batch_size: int = 1) -> list[str]:
        return [""] * len(prompts)

    def score_batch(
        self, contents: Sequence[Any], answers: Sequence[Sequence[str]], batch_size: int = 1
    ) -> list[Float[np.ndarray, " answers"]]:
        return [np.zeros(len(said)) for said in answers]

    def with_prompts(self, **changes: Any) -> "NullModel":
        return self


def training_evaluator(recipe: Recipe) -> Callable[[Any], dict[str, float]] | None:
    """What measures a model on `evaluation.data` during training, as a recipe says; None where it does not say so.

    Raises:
        CafeError: there is no evaluation file, or nothing gives the result that `keep_best` names.
    """
    wanted, best = recipe.evaluation, recipe.metric_for_best_model.removeprefix("-")
    if not wanted.eval_steps:
        return None
    data = Path(wanted.data)

    def measured(model: Any) -> dict[str, float]:
        return evaluate(model, data, wanted.limit, lambda line: None).results

    if wanted.data:
        select_suites(data)
    if best:
        names = [*(measured(NullModel()) if wanted.data else ()), *(["held_out/lm_loss"] if wanted.sources else ())]
        nearest = difflib.get_close_matches(best, names, n=1, cutoff=0.0)
        if best not in names and nearest:
            raise CafeError(f"There will be no result {best} for keep_best; the nearest is {nearest[0]}.")
    return measured if wanted.data else None


def select_suites(data: Path, names: Sequence[str] = ()) -> list[Suite]:
    """The suites of these names; where none is named, the usual ones whose files are in `data`, or whatever is there.

    "all" names every suite whose files are there.

    Raises:
        CafeError: a suite is unknown or lacks its files, or there is no evaluation file in `data`.
    """
    if not data.is_dir():
        raise CafeError(f"The folder of evaluation files {data} does not exist.")
    known = {suite.name: suite for suite in SUITES}
    named = [name for name in names if name != "all"]
    for name in named:
        if name not in known:
            raise CafeError(f"There is no suite {name!r}: there are {', '.join(known)}, and all.")
        if not known[name].find_files(data):
            expected = "; ".join(known[name].files)
            raise CafeError(f"The suite {name} lacks its files in {data}: {expected}. From: {known[name].download}.")
    if named and "all" not in names:
        return [suite for suite in SUITES if suite.name in named]
    there = [suite for suite in SUITES if suite.find_files(data)]
    if not there:
        raise CafeError(f"There is no evaluation file in {data}: `cafe evaluate --list` says what each suite expects.")
    return there if names else [suite for suite in there if suite.default] or there


def describe_suites(data: Path | None = None) -> str:
    """Every suite: what it measures, the files it expects under the folder, and where they are had."""
    lines = []
    for suite in SUITES:
        found = "" if data is None else "  [files found]" if suite.find_files(data) else "  [files missing]"
        named = "" if suite.default else "  [runs when named]"
        lines += [f"{suite.name}: {suite.measures}{named}{found}", *(f"    {file}" for file in suite.files)]
        lines += [f"    from: {suite.download}"]
        lines += [f"    protocol: {', '.join(suite.sources)}"] if suite.sources else []
    return "\n".join(lines)


def write(evaluation: EvaluationResult, directory: Path) -> None:
    """Writes `results.json` and what it rests on: `outputs/PART.jsonl`, samples, embeddings, means, what it is about.

    What another evaluation of the same model, data and limit wrote there stays beside it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    about = directory / "about.json"
    if evaluation.about.get("fingerprint") and about.is_file() and json.loads(about.read_text()) == evaluation.about:
        evaluation = _merge_existing(evaluation, directory)
    else:
        shutil.rmtree(directory / "outputs", ignore_errors=True)
    for part, rows in evaluation.outputs.items():
        path = directory / "outputs" / f"{part.replace('/', '_')}.jsonl"
        path.parent.mkdir(exist_ok=True)
        atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    for name, value in evaluation.files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(directory / name, json.dumps(value, indent=2) + "\n")
    atomic_write_text(directory / "samples.json", json.dumps(evaluation.samples) + "\n")
    arrays = directory / "embeddings.npz"
    with staging_path(arrays).open("wb") as out:
        np.savez_compressed(out, **evaluation.embeddings)  # type: ignore[arg-type]
    commit(staging_path(arrays), arrays)
    atomic_write_text(directory / "means.json", json.dumps(evaluation.means, indent=2) + "\n")
    atomic_write_text(about, json.dumps(evaluation.about, indent=2) + "\n")
    atomic_write_text(directory / "results.json", json.dumps(evaluation.results, indent=2) + "\n")


def _merge_existing(evaluation: EvaluationResult, directory: Path) -> EvaluationResult:
    """The evaluation with what a directory holds of other suites."""
    with np.load(directory / "embeddings.npz") as arrays:
        embeddings = dict(arrays)
    return EvaluationResult(
        json.loads((directory / "results.json").read_text()) | evaluation.results,
        evaluation.outputs,
        json.loads((directory / "samples.json").read_text()) | evaluation.samples,
        embeddings | evaluation.embeddings,
        evaluation.about,
        evaluation.files,
        means=json.loads((directory / "means.json").read_text()) | evaluation.means,
    )
