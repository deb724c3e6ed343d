"""Build the data, train the base, tune it in three ways, measure everything and write what came of it.

    python -m another_hand runs/another-hand

Whatever is finished is not done again, so the same command resumes.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from another_hand import build, photographs
from another_hand.base import BaseConfig, make_base, train_further
from another_hand.build import BuildConfig
from another_hand.concepts import DEVELOPMENT_HAND, read_concepts
from another_hand.floors import measure_all_floors
from another_hand.gates import check_gates
from another_hand.measure import measure_ablation, measure_all, measure_photographs
from another_hand.packages import PackageError
from another_hand.pictures import write_pictures
from another_hand.tables import format_photographs, write_tables
from cafe.errors import CafeError
from cafe.evaluation.ablation import ablate
from cafe.training.loop import train
from cafe.training.recipe_io import read_recipe, read_sweep
from cafe.utils.atomic import atomic_write_text

RECIPES = Path(__file__).parent / "recipes"
SUITES = ("retrieval", "captions", "pope", "geometry")  # on the development hand; `measure.py` runs all on each folder
SHOWN = "openmoji"  # the folder that pictures are of


@dataclass(frozen=True)
class Scale:
    """Say how much of everything is done.

    Attributes:
        build: how much data is written.
        base: how long the base is trained.
        seeds: number of runs of each arm.
        sweep_seeds: number of runs of each value of a sweep.
        steps: of each run; None for the recipe's.
        sweeps: fields of the joint run that are varied, as `cafe ablate --sweep` takes them.
        limit: the number of records that each suite is measured on; all of them if None.
        photographs: whether the photographs are fetched too, 161 MB.
    """

    build: BuildConfig = field(default_factory=BuildConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    seeds: int = 3
    sweep_seeds: int = 1
    steps: int | None = None
    sweeps: Sequence[str] = (
        "objective.contrastive_weight=0.1,0.3,1,2,3",
        "objective.temperature=0.05,0.14",
        "objective.hard_negatives=true",
    )
    limit: int | None = None
    photographs: bool = True


CUT = Scale(
    build=build.CUT,
    base=BaseConfig(
        teacher_steps=3,
        tower_steps=3,
        teacher_batch=32,
        tower_batch=32,
        tower_variants=1,
        variants=2,
        steps=10,
        batch=4,
    ),
    seeds=1,
    steps=10,
    sweeps=(),
    limit=2,
    photographs=False,
)
"""Everything in three minutes, to see that it runs. Its results mean nothing."""


def run(directory: Path, scale: Scale) -> None:
    """Run every stage that is not finished.

    Raises:
        PackageError: packages cannot be fetched.
    """
    data, base, ablation = directory / "data", directory / "base", directory / "ablation"
    build.build(directory, scale.build)
    packages = directory / "packages"
    concepts = read_concepts(packages)
    floors = directory / "floors.json"
    if not floors.is_file():
        atomic_write_text(floors, json.dumps(measure_all_floors(packages, data), indent=2) + "\n")
    reference = json.loads(floors.read_text(encoding="utf-8"))

    make_base(base, packages, concepts, scale.base)
    train_further(base, directory / "further", packages, concepts, scale.base)
    # The test hands are not looked at until everything is trained.
    measured = measure_all(str(base), data, ablation / "base" / "measured", scale.limit, [DEVELOPMENT_HAND])
    further = measure_all(str(directory / "further"), data, directory / "further", scale.limit, [DEVELOPMENT_HAND])
    gates = check_gates(measured[DEVELOPMENT_HAND], further[DEVELOPMENT_HAND], reference[DEVELOPMENT_HAND])
    print(gates)

    joint, overrides = place_recipe("joint", directory), [] if scale.steps is None else [f"max_steps={scale.steps}"]
    sweeps = [read_sweep(joint, overrides, sweep) for sweep in scale.sweeps]
    ablate(read_recipe(joint, overrides), scale.seeds, SUITES, sweeps, sweep_seeds=scale.sweep_seeds)
    measure_ablation(str(base), data, ablation, scale.limit)
    if scale.photographs:
        tune_on_stamps(directory, overrides, scale.limit)
    tables = f"## The base\n\n{gates}\n\n{write_tables(ablation, reference)}"
    of_photographs = directory / "stamps" / "measured"
    if of_photographs.is_dir():
        tables += f"\n## Photographs\n\n{format_photographs(of_photographs)}\n"
    atomic_write_text(directory / "tables.md", tables)
    write_pictures(packages, data, ablation, directory / "pictures", SHOWN)
    print(f"The tables are {directory / 'tables.md'}, the report is {ablation / 'report.html'}.")


def place_recipe(name: str, directory: Path) -> Path:
    """Write a recipe into the directory, with its paths in there, and return where."""
    target = directory / "recipes" / f"{name}.yaml"
    target.parent.mkdir(exist_ok=True)
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    target.write_text(text.replace("runs/another-hand", str(directory)), encoding="utf-8")
    return target


def tune_on_stamps(directory: Path, overrides: Sequence[str], limit: int | None) -> None:
    """Train the base on Tux Paint's drawings, and measure it on photographs beside the runs that never saw stamps."""
    try:
        folders = photographs.build(directory)
    except PackageError as error:
        print(f"Without photographs: {error}")
        return
    trained = train(read_recipe(place_recipe("stamps", directory), overrides))
    runs = {"base": directory / "base", "joint": directory / "ablation" / "joint-0", "stamps": trained}
    for name, checkpoint in runs.items():
        measure_photographs(str(checkpoint), folders["photographs"], directory / "stamps" / "measured" / name, limit)


def main() -> None:
    """Build, train and measure everything; a mistake is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m another_hand", description=main.__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/another-hand"))
    parser.add_argument("--cut", action="store_true", help="do a hundredth of it, to see that everything runs")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that is needed is made here
    started = time.monotonic()
    try:
        run(options.directory, CUT if options.cut else Scale())
    except (PackageError, CafeError) as error:
        sys.exit(str(error))
    print(f"{(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
