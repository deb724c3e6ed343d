"""Measure a checkpoint on every folder of evaluation files, with cafe's suites and one metric that none of them has.

That metric is the share of absent partners that descriptions name. Some pairs of concepts stand together in most
training scenes and never in a test scene. A model that leans on the company of things, and does not look, names the
partner of what it sees; the share of other absent concepts that it names says how often it errs anyway.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from another_hand.concepts import DEVELOPMENT_HAND, draw_unseen, read_list
from another_hand.mentions import mentions
from another_hand.scenes import pair_up
from cafe.checkpoint import resolve_checkpoint
from cafe.errors import CafeError
from cafe.evaluation.ablation import ARMS
from cafe.evaluation.runner import evaluate, select_suites, write
from cafe.evaluation.suite import EvaluationResult, aggregate
from cafe.model import Cafe
from cafe.utils.atomic import atomic_write_text

SUITES = ("retrieval", "geometry", "captions", "chair", "throne", "pope", "vqa", "mmeb")
JUDGES = ("exact",)  # of THRONE: all names are known, so that a word for a class states it
# Tokens of a description; one of four names takes half of that. All suites that ask for one then share it.
LONGEST = 64
VARIANTS_ON = (DEVELOPMENT_HAND, "new-scenes")  # the folders that variants of the joint run are measured on
DONE = "measured.json"  # tells which model a folder's results are of, and is written last


def measure_all(
    checkpoint: str, data: Path, output: Path, limit: int | None = None, names: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Measure a checkpoint on folders of evaluation files. What was measured before is read back.

    Args:
        checkpoint: a directory, a run's output directory, or a Hub id.
        data: the directory of the folders.
        output: gets a directory of results for each folder, by the same name.
        limit: the number of records per suite; all of them if None.
        names: the folders; all if there are none.

    Returns:
        by folder, the results.
    """
    model = Cafe.load(resolve_checkpoint(checkpoint))
    folders = [folder for folder in evaluation_folders(data) if not names or folder.name in names]
    return {folder.name: _measure(model, folder, output / folder.name, limit) for folder in folders}


def measure_photographs(checkpoint: str, data: Path, output: Path, limit: int | None = None) -> dict[str, float]:
    """Measure retrieval on photographs and the gap between their embeddings and those of their sentences."""
    results = output / "results.json"
    if not results.is_file():
        model = Cafe.load(resolve_checkpoint(checkpoint))
        write(evaluate(model, data, limit, suites=["retrieval", "geometry"], progress=True), output)
    return dict(json.loads(results.read_text(encoding="utf-8")))


def evaluation_folders(data: Path) -> list[Path]:
    """List the folders of evaluation files in a directory, which may also have others."""
    return sorted(path.parent for path in data.glob("*/captions_test.jsonl"))


def _measure(model: Any, data: Path, directory: Path, limit: int | None) -> dict[str, float]:
    """Measure a model on one folder, unless its results are there already."""
    suites = [suite.name for suite in select_suites(data, ["all"]) if suite.name in SUITES]
    wanted = {"fingerprint": model.fingerprint(), "suites": suites, "limit": limit, "data": str(data.resolve())}
    done = directory / DONE
    if done.is_file() and json.loads(done.read_text(encoding="utf-8")) == wanted:
        return dict(json.loads((directory / "results.json").read_text(encoding="utf-8")))
    evaluation = evaluate(
        model,
        data,
        limit,
        suites=suites,
        cache_dir=directory / "kept",
        progress=True,
        judges=JUDGES,
        max_new_tokens=LONGEST,
    )
    seen = seen_names()
    evaluation.add(measure_partners(evaluation.outputs.get("captions", []), seen, pair_up(seen)))
    write(evaluation, directory)
    atomic_write_text(done, json.dumps(wanted, indent=2) + "\n")
    return evaluation.results


def seen_names() -> list[str]:
    """List the concepts that training shows, in the order of the list."""
    names = []
    for subgroup, members in read_list().items():
        unseen = draw_unseen(subgroup, members)
        names += [name for name in members if name not in unseen]
    return names


def measure_partners(
    captions: Iterable[Mapping[str, Any]], seen: Sequence[str], partners: Mapping[str, str]
) -> EvaluationResult:
    """Measure how often descriptions name absent partners of what is shown, and other absent concepts.

    Args:
        captions: the output rows of the captions suite.
        seen: the concepts that training shows.
        partners: by concept, its partner, if it has one.

    Returns:
        `partners/named`, the share of named ones among all chances: each pair of a scene and an absent partner of a
        concept that it shows; and `partners/others_named`, among the pairs of a scene and any other absent concept.
    """
    rows = []
    for row in captions:
        mentioned, present = set(mentions(row["said"], seen)), set(row["objects"])
        absent_partners = {partners[name] for name in present if name in partners} - present
        others = set(seen) - present - absent_partners
        marks = {
            "partners/named": [len(mentioned & absent_partners), len(absent_partners)],
            "partners/others_named": [len(mentioned & others), len(others)],
        }
        named = sorted(mentioned & absent_partners)
        rows.append({**{key: row[key] for key in ("id", "group", "image", "said")}, "partners": named, "marks": marks})
    return EvaluationResult(aggregate(rows), {"partners": rows} if rows else {})


def find_runs(output: Path) -> Iterator[tuple[str, Path]]:
    """Find the finished runs of an ablation, as `cafe ablate` writes them: a checkpoint and a directory each."""
    for path in sorted(output.glob("*-*/checkpoint")):
        yield str(path), path.parent


def measure_ablation(base: str, data: Path, output: Path, limit: int | None = None) -> None:
    """Measure the base and every run of an ablation, each into the directory of the run.

    Variants of the joint run are measured on two folders, of which none is by a test hand: what is chosen among them
    is not chosen by the tests.
    """
    for checkpoint, directory in [(base, output / "base"), *find_runs(output)]:
        print(f"{directory.name}: {checkpoint}")
        varied = directory.name.rpartition("-")[0] not in ("", *ARMS)
        measure_all(checkpoint, data, directory / "measured", limit, VARIANTS_ON if varied else ())


def main() -> None:
    """Measure the base and all finished runs of an ablation; what was measured before is left as it is."""
    parser = argparse.ArgumentParser(prog="python -m another_hand.measure", description=main.__doc__)
    parser.add_argument("base", help="the base's checkpoint")
    parser.add_argument("data", type=Path, help="the folders of evaluation files")
    parser.add_argument("output", type=Path, help="the ablation's directory")
    options = parser.parse_args()
    try:
        measure_ablation(options.base, options.data, options.output)
    except CafeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
