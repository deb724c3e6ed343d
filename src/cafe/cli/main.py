"""The command `cafe`: parses, calls, prints. A user's mistake is one sentence and exit status 1, never a traceback."""

import argparse
import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names of them, in malloc.h


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    # Imported here so that `cafe --help` answers at once.
    from cafe.errors import CafeError, RunInterrupted

    options = parse(arguments)
    _tune_malloc()
    try:
        options.run(options)
    except CafeError as error:
        print(f"cafe: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if error.filename is None:  # no path that a user could have given
            raise
        print(f"cafe: {error.filename} cannot be used: {error.strerror}.", file=sys.stderr)
        return 1
    except RunInterrupted as stopped:
        print(f"cafe: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("cafe: stopped.", file=sys.stderr)
        return 130
    return 0


def _tune_malloc() -> None:
    """Has glibc keep what large tensors free: to get it back from the system costs each step on a CPU anew."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another system, another allocator
        libc = ctypes.CDLL(None)
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            libc.mallopt(option, 2**30)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as options. argparse takes no key=value that follows an option: those are gathered here."""
    grammar = parser()
    options, rest = grammar.parse_known_args(arguments)
    overrides = [word for word in rest if "overrides" in options and "=" in word and not word.startswith("-")]
    if unknown := [word for word in rest if word not in overrides]:
        grammar.error(f"unrecognized arguments: {' '.join(unknown)}")
    if overrides:
        options.overrides += overrides
    return options


def positive_int(text: str) -> int:
    """A number of things."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"should be a whole number above 0, not {text!r}")
    return int(text)


def non_negative_int(text: str) -> int:
    """A number of things that may be none."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"should be a whole number, 0 or more, not {text!r}")
    return int(text)


def fraction(text: str) -> float:
    """A share."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"should be a number from 0 to 1, not {text!r}")


def _counts(text: str) -> list[int]:
    return [positive_int(part) for part in text.split(",")]


def add_recipe_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=Path, help="a YAML file, as in recipes/")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="fields of it, as batch_size=16")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(prog="cafe", description="One vision-language checkpoint that retrieves and talks.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="fine-tune with the joint objective, as a recipe says")
    add_recipe_arguments(train)
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="what a recipe is expected to cost: parameters, FLOPs, memory, hours")
    add_recipe_arguments(plan)
    plan.add_argument("--gpus", type=positive_int, default=1, help="how many share the run")
    plan.add_argument("--image", default="640x480", help="pixels of a typical picture, WIDTHxHEIGHT")
    plan.add_argument("--caption", type=positive_int, default=200, help="tokens of a typical caption")
    plan.add_argument("--pairs", type=positive_int, help="records of the data")
    plan.set_defaults(run=_plan)

    merge = commands.add_parser("merge", help="write a run's adapter and its base as one plain checkpoint")
    merge.add_argument("directory", metavar="RUN", type=Path, help="the run's output directory, or a checkpoint in it")
    merge.add_argument("output", type=Path, help="the checkpoint's directory")
    merge.set_defaults(run=_merge)

    push_to_hub = commands.add_parser(
        "push", help="upload a run's checkpoint to the Hugging Face Hub, with a model card"
    )
    push_to_hub.add_argument(
        "directory", metavar="RUN", type=Path, help="the run's output directory, or a checkpoint in it"
    )
    push_to_hub.add_argument("repository", metavar="REPO_ID", help="owner/name; made where there is none")
    push_to_hub.add_argument(
        "--results", type=Path, help="an evaluation's directory, whose results.json the card shows"
    )
    push_to_hub.add_argument("--public", action="store_true", help="a repository that is made is private without it")
    push_to_hub.set_defaults(run=_push)

    evaluate = commands.add_parser("evaluate", help="measure a checkpoint on a folder of evaluation files")
    evaluate.add_argument(
        "checkpoint", nargs="?", help="a run, a directory, a Hub id, or 'scenes' for the shipped base"
    )
    evaluate.add_argument("--data", type=Path, help="the folder of evaluation files")
    evaluate.add_argument("--suite", default="", help="names, commas between, or all; the usual ones without it")
    evaluate.add_argument(
        "--output", type=Path, help="where results.json goes; runs/evaluations/CHECKPOINT[-limit-N] without it"
    )
    evaluate.add_argument("--limit", type=positive_int, help="records a suite, for a quick look")
    evaluate.add_argument("--batch-size", type=positive_int, help="contents at once")
    evaluate.add_argument(
        "--judge",
        action="append",
        default=[],
        help="who judges THRONE's descriptions: exact, self, or a language model",
    )
    evaluate.add_argument("--list", action="store_true", help="which files each suite expects and where they are had")
    evaluate.set_defaults(run=_evaluate)

    modes = commands.add_parser("bench-modes", help="time embedding, generation and both, at several batch sizes")
    modes.add_argument("checkpoint", help="a run, a directory, a Hub id, or 'scenes' for the shipped base")
    modes.add_argument("--data", type=Path, required=True, help="a folder with pictures in it")
    modes.add_argument("--batch-sizes", type=_counts, default="1,2,4,8,16,32,64", help="with commas between")
    modes.add_argument("--repeats", type=positive_int, default=20, help="timings of each mode and size")
    modes.add_argument("--max-new-tokens", type=positive_int, default=32, help="the longest answer")
    modes.add_argument("--output", type=Path, help="a JSON file for the rows")
    modes.set_defaults(run=_bench_modes)

    report = commands.add_parser("report", help="one HTML page that compares evaluations")
    report.add_argument(
        "evaluations", nargs="+", metavar="RUN", help="a directory of `cafe evaluate`, or NAME=DIRECTORY"
    )
    report.add_argument("--log", type=Path, help="the log.jsonl of the last one's training")
    report.add_argument("--output", type=Path, default=Path("report.html"), help="the page: %(default)s")
    report.set_defaults(run=_report)

    ablate = commands.add_parser("ablate", help="train contrastive-only, language-only and joint; mean ± sd over seeds")
    add_recipe_arguments(ablate)
    ablate.add_argument("--seeds", type=positive_int, default=3, help="runs of each kind")
    ablate.add_argument("--suite", default="", help="names with commas between, or all; the usual ones if not given")
    ablate.set_defaults(run=_ablate)

    data = commands.add_parser("data", help="look at data").add_subparsers(required=True, metavar="COMMAND")
    inspect = data.add_parser("check", help="counts, sizes, lengths, duplicates, bad records, and a page of examples")
    inspect.add_argument(
        "what", metavar="SOURCE|RECIPE", help="a data file, or a recipe (.yaml) for all of its sources"
    )
    inspect.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, or of the source")
    inspect.add_argument(
        "--base", help="whose tokens to count: a run, a directory, a Hub id or 'scenes'; a recipe says it itself"
    )
    inspect.add_argument("--sample", type=non_negative_int, default=1000, help="records a source; 0 for all")
    inspect.add_argument("--examples", type=non_negative_int, default=6, help="examples a source on the page")
    inspect.add_argument("--workers", type=non_negative_int, default=1, help="processes that read")
    inspect.add_argument("--output", type=Path, default=Path("data-check.html"), help="the page: %(default)s")
    inspect.set_defaults(run=_data_check)

    mine = commands.add_parser("mine", help="find hard negatives with a checkpoint; write them as a new source")
    add_recipe_arguments(mine)
    mine.add_argument(
        "--checkpoint", help="what embeds: a run, a directory, a Hub id or 'scenes'; the recipe's base if absent"
    )
    mine.add_argument("--output", type=Path, required=True, help="a folder for the new source")
    mine.add_argument("--negatives", type=positive_int, default=4, help="a record, at most")
    mine.add_argument("--top", type=positive_int, default=64, help="closest targets to look at")
    mine.add_argument(
        "--max-positive-ratio",
        type=fraction,
        default=0.95,
        help="of the positive's similarity, not reached; 0 for none",
    )
    mine.add_argument("--margin", type=float, help="below the positive's similarity")
    mine.add_argument(
        "--judge", type=float, nargs="?", const=0.5, metavar="P",
        help="ask the model of each whether it matches, and drop those it says yes to with probability P (0.5)",
    )  # fmt: skip
    mine.add_argument("--soft", action="store_true", help="keep those as soft targets, with that probability")
    mine.add_argument("--question", help="what the judge is asked")
    mine.add_argument("--batch-size", type=positive_int, default=16, help="contents at once")
    mine.set_defaults(run=_mine)

    scenes = commands.add_parser("scenes", help="the small world").add_subparsers(required=True, metavar="COMMAND")
    write = scenes.add_parser("write", help="write generated pictures in public formats")
    write.add_argument("directory", type=Path, help="where they go")
    write.add_argument("--train", type=non_negative_int, default=8000, help="training pictures")
    write.add_argument("--test", type=non_negative_int, default=500, help="test pictures")
    write.add_argument("--seed", type=int, default=0)
    write.set_defaults(run=_scenes_write)
    base = scenes.add_parser("train-base", help="train the tiny base model from scratch")
    base.add_argument("directory", type=Path, help="where it goes")
    base.add_argument("--seed", type=int, default=0)
    base.set_defaults(run=_scenes_train_base)

    quickstart = commands.add_parser("quickstart", help="the main job on the small world: train, evaluate, report")
    quickstart.add_argument("--directory", type=Path, default=Path("runs/quickstart"))
    quickstart.add_argument("--recipe", type=Path, default=Path("recipes/scenes.yaml"))
    quickstart.set_defaults(run=_quickstart)
    return top


def _train(options: argparse.Namespace) -> None:
    from cafe.evaluation.runner import training_evaluator
    from cafe.training.loop import train
    from cafe.training.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    train(recipe, training_evaluator(recipe))


def _plan(options: argparse.Namespace) -> None:
    from cafe.errors import CafeError
    from cafe.planning.plan import format_plan, plan
    from cafe.planning.workload import TypicalSample
    from cafe.training.recipe import read_recipe

    width, _, height = options.image.partition("x")
    if not all(side.isdecimal() and int(side) for side in (width, height)):
        raise CafeError(f"--image should be like 640x480, not {options.image!r}.")
    data = TypicalSample(width=int(width), height=int(height), caption=options.caption)
    print(format_plan(plan(read_recipe(options.recipe, options.overrides), options.gpus, data, options.pairs)))


def _merge(options: argparse.Namespace) -> None:
    from cafe.checkpoint import checkpoint_dir, ensure_overwritable
    from cafe.errors import CafeError
    from cafe.lvlm.adapters import has_adapter, merge
    from cafe.model import Cafe

    if not options.directory.is_dir():
        raise CafeError(f"The run {options.directory} does not exist.")
    checkpoint = checkpoint_dir(options.directory)
    if options.output.resolve() == checkpoint.resolve():
        raise CafeError(f"The merged checkpoint would take the place of the adapter {checkpoint}: name another output.")
    ensure_overwritable(options.output)
    model = Cafe.load(checkpoint, dtype="auto", device="cpu")
    if not has_adapter(model.lvlm):
        raise CafeError(f"{checkpoint} has no adapter to merge: it is a plain checkpoint already.")
    merge(model.lvlm)
    model.save(options.output)
    print(f"The merged checkpoint is in {options.output}")


def _push(options: argparse.Namespace) -> None:
    from cafe.checkpoint import checkpoint_dir, read_metadata
    from cafe.errors import CafeError
    from cafe.export import detect_library, model_card, push_to_hub

    checkpoint = checkpoint_dir(options.directory)
    record = read_metadata(checkpoint)
    if not record:
        raise CafeError(f"{checkpoint} is no checkpoint of cafe: it has no cafe.json.")
    results = None
    if options.results:
        file = options.results / "results.json"
        if not file.is_file():
            raise CafeError(f"{options.results} has no results.json: `cafe evaluate` writes one.")
        results = json.loads(file.read_text())
    card = model_card(record, results, detect_library(checkpoint))
    print(push_to_hub(checkpoint, options.repository, card, private=not options.public))


def _evaluate(options: argparse.Namespace) -> None:
    from cafe.errors import CafeError
    from cafe.evaluation.runner import describe_suites, evaluate, select_suites, write

    if options.list:
        print(describe_suites(options.data))
        return
    if not options.checkpoint or not options.data:
        raise CafeError("cafe evaluate takes a checkpoint and --data with the folder of evaluation files, or --list.")
    suites = _names(options.suite)
    select_suites(options.data, suites)  # before the model is loaded

    from cafe.checkpoint import resolve_checkpoint
    from cafe.model import Cafe
    from cafe.utils.distributed import make_accelerator

    processes = make_accelerator()  # each takes its share on its own device
    device = processes.device if processes.num_processes > 1 else None
    name = options.checkpoint.strip("./").replace("/", "-") + (f"-limit-{options.limit}" if options.limit else "")
    output = options.output or Path("runs/evaluations") / name
    evaluation = evaluate(
        Cafe.load(resolve_checkpoint(options.checkpoint), device=device),
        options.data,
        options.limit,
        suites=suites,
        keep=output / "kept",
        batch_size=options.batch_size,
        together=True,
        progress=True,
        judges=options.judge,
    )
    if processes.is_main_process:
        write(evaluation, output)
        for name, value in evaluation.results.items():
            print(f"{name:44} {value:9.3f}")
        print(f"Written to {output}")
    processes.wait_for_everyone()
    processes.end_training()


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _bench_modes(options: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from cafe.checkpoint import resolve_checkpoint
    from cafe.evaluation.latency import format_timings, list_images, time_modes
    from cafe.model import Cafe

    pictures = list_images(options.data)
    if options.output:  # which is written to at the end
        options.output.parent.mkdir(parents=True, exist_ok=True)
    model = Cafe.load(resolve_checkpoint(options.checkpoint))
    timings = time_modes(model, pictures, options.batch_sizes, options.repeats, options.max_new_tokens, progress=True)
    print(format_timings(timings))
    if options.output:
        rows = [{**asdict(timing), "throughput": timing.throughput} for timing in timings]
        options.output.write_text(json.dumps(rows, indent=2) + "\n")


def _report(options: argparse.Namespace) -> None:
    from cafe.errors import CafeError
    from cafe.evaluation.report.page import ReportRun, write_report

    runs = []
    for evaluation in options.evaluations:
        name, directory = Path(evaluation).name, Path(evaluation)
        if "=" in evaluation and not directory.is_dir():  # as the directory of a sweep may have one in its name
            name, _, place = evaluation.partition("=")
            directory = Path(place)
        if not (directory / "results.json").is_file():
            raise CafeError(f"{evaluation!r} is no directory, nor NAME=DIRECTORY, with a results.json in it.")
        runs.append((name, directory, None))
    runs[-1] = (*runs[-1][:2], options.log)
    write_report(options.output, [ReportRun(*run) for run in runs])
    print(f"The report is {options.output}")


def _ablate(options: argparse.Namespace) -> None:
    from cafe.evaluation.ablation import ablate
    from cafe.training.recipe import read_recipe

    ablate(read_recipe(options.recipe, options.overrides), options.seeds, _names(options.suite))


def _data_check(options: argparse.Namespace) -> None:
    from cafe.checkpoint import prompts_from_metadata, read_metadata, resolve_checkpoint
    from cafe.data.inspection import inspect, write_page
    from cafe.data.records import open_source
    from cafe.errors import CafeError
    from cafe.training.build import build_chat_processor
    from cafe.training.recipe import ModelConfig, read_recipe, read_source

    if options.what.endswith((".yaml", ".yml")):
        recipe = read_recipe(options.what, options.overrides)
        sources, max_bad_share, max_tokens = recipe.data.sources, recipe.data.max_bad_fraction, recipe.model.max_length
        base, prompts, model = resolve_checkpoint(options.base or recipe.model.base), recipe.prompts, recipe.model
    elif options.base:
        sources, max_bad_share, max_tokens = (read_source(options.what, options.overrides),), 0.01, None
        base = resolve_checkpoint(options.base)
        prompts, model = prompts_from_metadata(read_metadata(base)), ModelConfig(base=base)
    else:
        raise CafeError("A source alone does not say which model is to read it: give --base.")
    chat_processor = build_chat_processor(base, prompts, model)
    checks = inspect(
        [open_source(source) for source in sources],
        chat_processor,
        max_tokens=max_tokens,
        sample=options.sample,
        examples=options.examples,
        workers=options.workers,
    )
    write_page(options.output, checks, chat_processor, max_tokens)
    for found in checks:
        print(found.name)
        for name, value in found.table():
            print(f"  {name:20} {value}")
    print(f"The page is {options.output}; spreads are least, median, 95th percentile and most.")
    for found in checks:
        if len(found.errors) > max_bad_share * len(found.stats):
            share = len(found.errors) / len(found.stats)
            raise CafeError(f"{share:.1%} of the records of {found.name} are bad. The first: {found.errors[0]}")


def _mine(options: argparse.Namespace) -> None:
    from cafe.checkpoint import resolve_checkpoint
    from cafe.data.records import open_source
    from cafe.lvlm.image_size import set_max_image_size
    from cafe.mining.config import QUESTION, MiningConfig
    from cafe.mining.hard_negatives import mine
    from cafe.model import Cafe
    from cafe.training.recipe import read_recipe

    recipe = read_recipe(options.recipe, options.overrides)
    if options.checkpoint:  # which says itself how it was trained to read
        model = Cafe.load(resolve_checkpoint(options.checkpoint))
    else:
        model = Cafe.load(resolve_checkpoint(recipe.model.base), recipe.prompts)
        set_max_image_size(
            model.lvlm, model.chat_processor.processor, recipe.model.max_image_pixels, recipe.model.image_grids
        )
    mining = MiningConfig(
        negatives=options.negatives,
        top=options.top,
        max_positive_ratio=options.max_positive_ratio or None,
        margin=options.margin,
        judge=options.judge if options.judge is not None or not options.soft else 0.5,
        soft=options.soft,
        question=options.question or QUESTION,
        batch_size=options.batch_size,
        workers=recipe.data.num_workers,
    )
    sources = [open_source(source) for source in recipe.data.sources]
    mine(model, sources, options.output, mining, recipe.seed, recipe.model.max_length)


def _scenes_write(options: argparse.Namespace) -> None:
    from cafe.scenes.write import write_scenes

    write_scenes(options.directory, options.seed, options.train, options.test)


def _scenes_train_base(options: argparse.Namespace) -> None:
    from cafe.scenes.base import train_base

    train_base(options.directory, options.seed)


def _quickstart(options: argparse.Namespace) -> None:
    """Everything once: write the scenes, measure the base, train, measure again, report."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from dataclasses import replace

    from cafe.checkpoint import resolve_checkpoint
    from cafe.evaluation.report.page import ReportRun, write_report
    from cafe.evaluation.runner import measure, training_evaluator
    from cafe.model import Cafe
    from cafe.scenes.write import write_scenes
    from cafe.training.loop import train
    from cafe.training.recipe import read_recipe

    directory: Path = options.directory
    data = directory / "scenes"
    recipe = read_recipe(options.recipe, [f"output={directory / 'run'}", f"evaluation.data={data}"])
    sources = tuple(replace(source, path=str(data / Path(source.path).name)) for source in recipe.data.sources)
    recipe = replace(recipe, data=replace(recipe.data, sources=sources))
    if not (data / "llava_train.json").is_file():
        write_scenes(data)
    measure(Cafe.load(resolve_checkpoint(recipe.model.base)), data, directory / "before")
    measure(Cafe.load(train(recipe, training_evaluator(recipe))), data, directory / "after")
    runs = [
        ReportRun("base", directory / "before", None),
        ReportRun("joint", directory / "after", directory / "run" / "log.jsonl"),
    ]
    write_report(directory / "report.html", runs)
    print(f"Open {directory / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
