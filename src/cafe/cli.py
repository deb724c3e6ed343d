"""The command `cafe`: parses, calls, prints. A user's mistake is one sentence and exit status 1, never a traceback."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    # Imported here so that `cafe --help` answers at once.
    from cafe.errors import CafeError

    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except CafeError as error:
        print(f"cafe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("cafe: stopped.", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="cafe", description="One vision-language checkpoint that retrieves and talks.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="fine-tune with the joint objective, as a recipe says")
    train.add_argument("recipe", type=Path)
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on a folder of evaluation files")
    evaluate.add_argument("checkpoint", nargs="?", help="a directory, a Hub id, or 'scenes' for the shipped base model")
    evaluate.add_argument("--data", type=Path, help="the folder of evaluation files")
    evaluate.add_argument("--suite", default="", help="names, commas between, or all; the usual ones without it")
    evaluate.add_argument("--output", type=Path, help="where results.json goes; runs/evaluations/CHECKPOINT without it")
    evaluate.add_argument("--limit", type=int, help="records a suite, for a quick look")
    evaluate.add_argument("--batch-size", type=int, help="contents at once")
    evaluate.add_argument(
        "--judge",
        action="append",
        default=[],
        help="who judges THRONE's descriptions: exact, self, or a language model",
    )
    evaluate.add_argument("--list", action="store_true", help="which files each suite expects and where they are had")
    evaluate.set_defaults(run=_evaluate)

    report = commands.add_parser("report", help="one HTML page that compares evaluations")
    report.add_argument("evaluations", nargs="+", metavar="NAME=DIRECTORY")
    report.add_argument("--log", type=Path, help="the log.jsonl of the last one's training")
    report.add_argument("--output", type=Path, default=Path("report.html"))
    report.set_defaults(run=_report)

    ablate = commands.add_parser("ablate", help="train contrastive-only, language-only and joint; mean ± sd over seeds")
    ablate.add_argument("recipe", type=Path)
    ablate.add_argument("overrides", nargs="*", metavar="key=value")
    ablate.add_argument("--seeds", type=int, default=3)
    ablate.set_defaults(run=_ablate)

    scenes = commands.add_parser("scenes", help="the small world").add_subparsers(required=True, metavar="COMMAND")
    write = scenes.add_parser("write", help="write generated pictures in public formats")
    write.add_argument("directory", type=Path)
    write.add_argument("--train", type=int, default=8000, help="training pictures")
    write.add_argument("--test", type=int, default=500, help="test pictures")
    write.add_argument("--seed", type=int, default=0)
    write.set_defaults(run=_scenes_write)
    base = scenes.add_parser("train-base", help="train the tiny base model from scratch")
    base.add_argument("directory", type=Path)
    base.add_argument("--seed", type=int, default=0)
    base.set_defaults(run=_scenes_train_base)

    quickstart = commands.add_parser("quickstart", help="the main job on the small world: train, evaluate, report")
    quickstart.add_argument("--directory", type=Path, default=Path("runs/quickstart"))
    quickstart.add_argument("--recipe", type=Path, default=Path("recipes/scenes.yaml"))
    quickstart.set_defaults(run=_quickstart)
    return top


def _train(options: argparse.Namespace) -> None:
    from cafe.evaluation.evaluate import evaluate
    from cafe.training.loop import train
    from cafe.training.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    held_out = recipe.evaluation
    train(
        recipe,
        lambda model: evaluate(model, Path(held_out.data), held_out.limit, report=lambda line: None).results,
    )


def _evaluate(options: argparse.Namespace) -> None:
    from cafe.errors import CafeError
    from cafe.evaluation.evaluate import choose, evaluate, listing, write

    if options.list:
        print(listing(options.data))
        return
    if not options.checkpoint or not options.data:
        raise CafeError("cafe evaluate takes a checkpoint and --data with the folder of evaluation files, or --list.")
    if not options.data.is_dir():
        raise CafeError(f"The folder of evaluation files {options.data} does not exist.")
    suites = [name.strip() for name in options.suite.split(",") if name.strip()]
    choose(options.data, suites)  # before the model is loaded

    from accelerate import PartialState

    from cafe.model import Cafe
    from cafe.training.loop import resolve_base

    state = PartialState()  # started by `accelerate launch`, each process takes its share on its own device
    device = state.device if state.num_processes > 1 else None
    output = options.output or Path("runs/evaluations") / options.checkpoint.strip("./").replace("/", "-")
    evaluation = evaluate(
        Cafe.load(resolve_base(options.checkpoint), device=device),
        options.data,
        options.limit,
        suites=suites,
        keep=output / "kept",
        batch_size=options.batch_size,
        together=True,
        progress=True,
        judges=options.judge,
    )
    if state.is_main_process:
        write(evaluation, output)
        for name, value in evaluation.results.items():
            print(f"{name:44} {value:9.3f}")
        print(f"Written to {output}")
    state.wait_for_everyone()


def _report(options: argparse.Namespace) -> None:
    from cafe.errors import CafeError
    from cafe.evaluation.report import ReportRun, write_report

    runs = []
    for evaluation in options.evaluations:
        name, equals, directory = evaluation.partition("=")
        if not equals or not (Path(directory) / "results.json").is_file():
            raise CafeError(f"{evaluation!r} is not NAME=DIRECTORY with a results.json in the directory.")
        runs.append((name, Path(directory), None))
    runs[-1] = (*runs[-1][:2], options.log)
    write_report(options.output, [ReportRun(*run) for run in runs])
    print(f"The report is {options.output}")


def _ablate(options: argparse.Namespace) -> None:
    from cafe.evaluation.ablation import ablate
    from cafe.training.recipe import read_recipe

    ablate(read_recipe(options.recipe, options.overrides), options.seeds)


def _scenes_write(options: argparse.Namespace) -> None:
    from cafe.scenes.write import write_scenes

    write_scenes(options.directory, options.seed, options.train, options.test)


def _scenes_train_base(options: argparse.Namespace) -> None:
    from cafe.scenes.base import train_base

    train_base(options.directory, options.seed)


def _quickstart(options: argparse.Namespace) -> None:
    """Everything once: write the scenes, measure the base, train, measure again, report."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from cafe.evaluation.evaluate import evaluate, write
    from cafe.evaluation.report import ReportRun, write_report
    from cafe.model import Cafe
    from cafe.scenes.write import write_scenes
    from cafe.training.loop import resolve_base, train
    from cafe.training.recipe import read_recipe

    directory: Path = options.directory
    data = directory / "scenes"
    recipe = read_recipe(
        options.recipe,
        [
            f"output={directory / 'run'}",
            f"data.sources=[{{path: {data / 'llava_train.json'}, format: llava}}]",
            f"evaluation.data={data}",
        ],
    )
    if not (data / "llava_train.json").is_file():
        write_scenes(data)
    write(evaluate(Cafe.load(resolve_base(recipe.model.base)), data), directory / "before")
    checkpoint = train(recipe)
    write(evaluate(Cafe.load(checkpoint), data), directory / "after")
    runs = [
        ReportRun("base", directory / "before", None),
        ReportRun("joint", directory / "after", directory / "run" / "log.jsonl"),
    ]
    write_report(directory / "report.html", runs)
    print(f"Open {directory / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
