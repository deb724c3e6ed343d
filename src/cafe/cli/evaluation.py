"""The commands evaluate, bench-modes, report and ablate: what a checkpoint can do, how fast, and compared with what."""

import json
from pathlib import Path

import click

from cafe.cli.options import PATH, POSITIVE, recipe_arguments, split_names
from cafe.errors import CafeError, RecipeError

# Shared by evaluate and ablate.
suite_option = click.option(
    "--suite",
    default="",
    metavar="NAMES",
    show_default="the default suites whose files exist",
    help='Comma-separated suite names, or "all".',
)


@click.command("evaluate")
@click.argument("checkpoint", required=False)
@click.option("--data", type=PATH, help="Folder of evaluation files.")
@suite_option
@click.option(
    "--output",
    type=PATH,
    show_default="runs/evaluations/CHECKPOINT[-limit-N]",
    help="Directory for results.json.",
)
@click.option("--limit", type=POSITIVE, help="Maximum number of records per suite, for a quick look.")
@click.option("--batch-size", type=POSITIVE, help="Number of inputs per forward pass.")
@click.option(
    "--judge",
    "judges",
    multiple=True,
    metavar="NAME",
    help="Judge of THRONE's descriptions: exact, self, or a language model. May be given several times.",
)
@click.option("--list", "list_suites", is_flag=True, help="List the files each suite expects and where to get them.")
def evaluate_command(
    checkpoint: str | None,
    data: Path | None,
    suite: str,
    output: Path | None,
    limit: int | None,
    batch_size: int | None,
    judges: tuple[str, ...],
    list_suites: bool,
) -> None:
    """Evaluate a checkpoint on a folder of files.

    CHECKPOINT is a run, a directory, a Hub id, or "scenes" for the base model that ships with the package. The same
    command resumes an interrupted evaluation.
    """
    from cafe.evaluation.runner import describe_suites, evaluate, select_suites, write

    if list_suites:
        print(describe_suites(data))
        return
    if not checkpoint or not data:
        raise RecipeError("cafe evaluate takes a checkpoint and --data with the folder of evaluation files, or --list.")
    suites = split_names(suite)
    select_suites(data, suites)  # reports a mistake before the model is loaded

    # Imported only now, so that a mistake is reported at once.
    from cafe.checkpoint import resolve_checkpoint
    from cafe.model import Cafe
    from cafe.utils.distributed import make_accelerator
    from cafe.utils.text import escape_controls

    # Each process evaluates its part of the records on its own device; the main one writes the results.
    processes = make_accelerator()
    device = processes.device if processes.num_processes > 1 else None
    output = output or _default_output(checkpoint, limit)
    evaluation = evaluate(
        Cafe.load(resolve_checkpoint(checkpoint), device=device),
        data,
        limit,
        suites=suites,
        cache_dir=output / "kept",  # answers and embeddings, from which an interrupted evaluation resumes
        batch_size=batch_size,
        distributed=True,
        progress=True,
        judges=judges,
    )
    if processes.is_main_process:
        write(evaluation, output)
        for name, value in evaluation.results.items():
            print(f"{escape_controls(name):44} {value:9.3f}")  # records name categories
        print(f"Written to {output}")
    # The process group is closed by all processes together, or PyTorch warns that it was left open.
    processes.wait_for_everyone()
    processes.end_training()


def _default_output(checkpoint: str, limit: int | None) -> Path:
    """Name the directory of an evaluation after its checkpoint and limit."""
    # A path becomes one name: runs/a/checkpoint is runs-a-checkpoint.
    name = checkpoint.strip("./~").replace("/", "-")
    if limit:
        name += f"-limit-{limit}"
    return Path("runs/evaluations") / name


def _parse_sizes(context: click.Context, parameter: click.Parameter, text: str) -> list[int]:
    """Parse numbers above 0 that are separated by commas."""
    # A wrong part is reported as an option of click reports it.
    return [POSITIVE(part, parameter, context) for part in text.split(",")]


@click.command("bench-modes")
@click.argument("checkpoint")
@click.option("--data", type=PATH, required=True, help="Folder that contains images.")
@click.option(
    "--batch-sizes", callback=_parse_sizes, metavar="N,...", default="1,2,4,8,16,32,64", help="Comma-separated sizes."
)
@click.option("--repeats", type=POSITIVE, default=20, help="Number of timings per mode and batch size.")
@click.option("--max-new-tokens", type=POSITIVE, default=32, help="Maximum number of tokens in an answer.")
@click.option("--output", type=PATH, help="JSON file for the rows of the table.")
def bench_modes_command(
    checkpoint: str, data: Path, batch_sizes: list[int], repeats: int, max_new_tokens: int, output: Path | None
) -> None:
    """Time embedding, generation and both together.

    CHECKPOINT is a run, a directory, a Hub id, or "scenes" for the base model that ships with the package.
    """
    from dataclasses import asdict

    from cafe.checkpoint import resolve_checkpoint
    from cafe.evaluation.latency import format_timings, list_images, time_modes
    from cafe.model import Cafe

    images = list_images(data)
    if output:  # fails before the measurement if the folder cannot be made
        output.parent.mkdir(parents=True, exist_ok=True)
    model = Cafe.load(resolve_checkpoint(checkpoint))
    timings = time_modes(model, images, batch_sizes, repeats, max_new_tokens, progress=True)
    print(format_timings(timings))
    if output:
        # `throughput` is a property, which `asdict` leaves out.
        rows = [{**asdict(timing), "throughput": timing.throughput} for timing in timings]
        output.write_text(json.dumps(rows, indent=2) + "\n")


@click.command("report")
@click.argument("evaluations", nargs=-1, required=True, metavar="RUN...")
@click.option("--log", type=PATH, help="The log.jsonl of the training run that the last evaluation belongs to.")
@click.option("--output", type=PATH, default=Path("report.html"), help="The HTML file to write.")
def report_command(evaluations: tuple[str, ...], log: Path | None, output: Path) -> None:
    """Compare evaluations on one HTML page.

    RUN is a directory that `cafe evaluate` wrote, or NAME=DIRECTORY to choose the name it has on the page.
    """
    from cafe.evaluation.report.page import write_report
    from cafe.evaluation.report.run import ReportRun

    *earlier, last = [_parse_evaluation(evaluation) for evaluation in evaluations]
    runs = [ReportRun(*evaluation, None) for evaluation in earlier]
    runs.append(ReportRun(*last, log))  # --log belongs to the last one
    write_report(output, runs)
    print(f"The report is {output}")


def _parse_evaluation(text: str) -> tuple[str, Path]:
    """Parse a directory of results, or NAME=DIRECTORY, to a name and a directory."""
    name, directory = Path(text).name, Path(text).expanduser()
    # The name of a directory may itself contain "=", as those of sweeps do.
    if "=" in text and not directory.is_dir():
        name, _, path = text.partition("=")
        directory = Path(path).expanduser()
    if not (directory / "results.json").is_file():
        raise CafeError(f"{text!r} is no directory, nor NAME=DIRECTORY, with a results.json in it.")
    return name, directory


@click.command("ablate")
@recipe_arguments
@click.option("--seeds", type=POSITIVE, default=3, help="Number of runs of each kind.")
@suite_option
@click.option(
    "--sweep",
    "sweeps",
    multiple=True,
    metavar="KEY=A,B,C",
    help="Also train the joint run with each of these values of a recipe field. May be given several times.",
)
@click.option(
    "--sweep-seeds",
    type=POSITIVE,
    show_default="as --seeds",
    help="Number of runs of each value of a sweep.",
)
@click.option(
    "--arm",
    "arms",
    multiple=True,
    metavar="NAME",
    show_default="contrastive, language and joint",
    help="Train this arm. May be given several times.",
)
def ablate_command(
    recipe: Path,
    overrides: tuple[str, ...],
    seeds: int,
    suite: str,
    sweeps: tuple[str, ...],
    sweep_seeds: int | None,
    arms: tuple[str, ...],
) -> None:
    """Compare contrastive, language and joint training.

    RECIPE is a YAML file that describes the joint run, as in recipes/; KEY=VALUE replaces one of its fields. Results
    are given as mean and standard deviation over the seeds, and compared in report.html in the output directory. The
    same command resumes an interrupted ablation.
    """
    from cafe.training.recipe_io import read_recipe, read_sweep

    joint = read_recipe(recipe, overrides)
    read_sweeps = [read_sweep(recipe, overrides, sweep) for sweep in sweeps]

    # Imported only now, so that a mistake is reported at once.
    from cafe.evaluation.ablation import ARMS, ablate

    ablate(joint, seeds, split_names(suite), read_sweeps, arms or tuple(ARMS), sweep_seeds)
