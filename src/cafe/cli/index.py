"""The commands index and collections: make collections of images, and look after them."""

import json
import time
from typing import TYPE_CHECKING, Any

import click

from cafe.cli.options import NON_NEGATIVE, POSITIVE, override_arguments
from cafe.errors import CafeError
from cafe.utils.text import escape_controls

if TYPE_CHECKING:
    from cafe.index.collection import Collection
    from cafe.index.indexing import IndexConfig, IndexReport

NUM_FAILURES_SHOWN = 10
SECONDS_BETWEEN_LOOKS = 5.0  # at the folders, with --watch; at least ten times as long as a look takes

collection_option = click.option(
    "--collection", default="default", metavar="NAME|DIRECTORY", help="The collection; a directory has a slash in it."
)
model_option = click.option(
    "--model",
    metavar="CHECKPOINT",
    show_default="the collection's",
    help='A run, a directory, a Hub id, or "scenes".',
)
batch_size_option = click.option("--batch-size", type=POSITIVE, default=32, help="Number of images per forward pass.")
workers_option = click.option(
    "--workers",
    type=NON_NEGATIVE,
    show_default="one less than there are cores",
    help="Number of processes that decode images; 0 decodes in the main one.",
)


@click.command("index")
@click.argument("path", required=False, metavar="[FOLDER|FILE|SOURCE]")
@override_arguments
@collection_option
@model_option
@click.option("--describe/--no-describe", default=None, help="Caption each image, from the pass that embeds it.")
@click.option("--describe-prompt", help="What the model is asked for a caption.")
@click.option("--hidden/--no-hidden", default=None, help="Index hidden files and folders too.")
@click.option("--exclude", multiple=True, metavar="NAME", help="Leave out files and folders of this name.")
@click.option("--retry", is_flag=True, help="Read images again that could not be read, although they are unchanged.")
@click.option("--allow-empty", is_flag=True, help="Drop all images of a folder in which nothing is found any more.")
@click.option("--watch", is_flag=True, help="Keep the collection current, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object.")
@batch_size_option
@workers_option
def index_command(
    path: str | None,
    overrides: tuple[str, ...],
    collection: str,
    model: str | None,
    describe: bool | None,
    describe_prompt: str | None,
    hidden: bool | None,
    exclude: tuple[str, ...],
    retry: bool,
    allow_empty: bool,
    watch: bool,
    as_json: bool,
    batch_size: int,
    workers: int | None,
) -> None:
    """Index images, so that they can be searched and asked.

    FOLDER is walked, FILE is an image or a PDF file, and SOURCE is whatever training takes (CSV, Parquet, tar,
    dataset:NAME, ...), whose fields KEY=VALUE sets. The same command again takes up what is new, changed, moved or
    gone, by content. Without a path, all that was indexed before is indexed again.
    """
    from cafe.index.collection import Collection
    from cafe.index.indexing import IndexConfig

    opened = Collection.open(collection, model)
    config = IndexConfig(
        batch_size=batch_size, num_workers=workers, retry=retry, allow_empty=allow_empty, progress=True
    )
    if path is None:
        reports = list(opened.refresh(config).values())
    else:
        report = opened.add(
            path,
            describe=describe,
            describe_prompt=describe_prompt,
            hidden=hidden,
            exclude=exclude or None,
            overrides=overrides,
            config=config,
        )
        reports = [report]
    _print_reports(opened, reports, as_json)
    if watch:
        _watch(opened, config, as_json, _failures(reports))


def _watch(collection: "Collection", config: "IndexConfig", as_json: bool, last_failures: dict[str, str]) -> None:
    """Index again and again what was indexed, and print what has changed, until Ctrl-C.

    Args:
        collection: the collection.
        config: how images are read and embedded.
        as_json: print the counts as JSON objects.
        last_failures: what was printed already, see `_failures`.
    """
    from dataclasses import replace

    quiet = replace(config, progress=False)
    seconds = 0.0
    last_error = ""
    while True:
        time.sleep(max(SECONDS_BETWEEN_LOOKS, 10 * seconds))
        started = time.monotonic()
        try:
            reports = list(collection.refresh(quiet).values())
        except CafeError as error:
            # A drive may come back, and another process end; until then it is said once.
            if str(error) != last_error:
                click.echo(f"cafe: {escape_controls(str(error))}", err=True)
            last_error = str(error)
            continue
        last_error = ""
        seconds = time.monotonic() - started
        # What fails each time, such as a folder that cannot be listed, is said once.
        failures = _failures(reports)
        if any(report.has_changes for report in reports) or not failures.items() <= last_failures.items():
            _print_reports(collection, reports, as_json)
        last_failures = failures


def _failures(reports: "list[IndexReport]") -> dict[str, str]:
    """Return what could not be read, by its id, with the reason."""
    return {id: reason for report in reports for id, reason in report.failures.items()}


def _print_reports(collection: "Collection", reports: "list[IndexReport]", as_json: bool) -> None:
    """Print what could not be read, and the counts of all reports in one line."""
    # One line for all paths.
    counts: dict[str, int] = {}
    for report in reports:
        for name, value in report.counts().items():
            counts[name] = counts.get(name, 0) + value
    # A folder of damaged files would fill the screen.
    failures = list(_failures(reports).items())
    for id, reason in failures[:NUM_FAILURES_SHOWN]:
        click.echo(f"cafe: {escape_controls(id)}: {escape_controls(reason)}", err=True)
    if len(failures) > NUM_FAILURES_SHOWN:
        others = len(failures) - NUM_FAILURES_SHOWN
        command = f"cafe collections info {collection.argument} --failures"
        click.echo(f"cafe: {others:,} more could not be read: {command}", err=True)
    if as_json:
        click.echo(json.dumps(counts))
        return
    seconds = sum(report.seconds for report in reports)
    parts = ", ".join(f"{value:,} {name}" for name, value in counts.items())
    click.echo(f"{parts} in {seconds:,.1f} s ({len(collection):,} images in {collection.directory})")


@click.group("collections")
def collections_group() -> None:
    """List collections, check them, remove them, and change their model."""


@collections_group.command("list")
def list_command() -> None:
    """List the collections that have a name."""
    from cafe.index.collection import Collection
    from cafe.index.locations import collections_home, list_collections

    directories = list_collections()
    if not directories:
        click.echo(f"There is no collection in {collections_home()}.")
    for directory in directories:
        try:
            collection = Collection.open(directory)
            click.echo(f"{collection.name:20} {len(collection):9,} images  {collection.manifest.model}")
        except CafeError as error:  # the others are listed all the same
            click.echo(f"{directory.name:20} {error}")


@collections_group.command("info")
@click.argument("name", default="default")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--failures", is_flag=True, help="List what could not be read, with the reasons.")
def info_command(name: str, as_json: bool, failures: bool) -> None:
    """Show what a collection holds and was made with."""
    from cafe.index.collection import Collection

    collection = Collection.open(name)
    if failures:
        for id, reason in collection.failures().items():
            click.echo(f"{escape_controls(id)}: {escape_controls(reason)}")
        return
    info = collection.info()
    if as_json:
        click.echo(json.dumps(info))
        return
    for key, value in info.items():
        click.echo(f"{key:13} {_format(value)}")


def _format(value: Any) -> str:
    """Return a value of a collection's info as people read it."""
    match value:
        case int():
            return f"{value:,}"
        case list():
            return "\n              ".join(escape_controls(str(item)) for item in value) or "none"
        case dict():
            return ", ".join(f"{name} {_format(item)}" for name, item in value.items() if item is not None)
        case float():
            return f"{value:.4g}"
        case None:
            return "none"
        case _:
            return escape_controls(str(value))


@collections_group.command("verify")
@click.argument("name", default="default")
def verify_command(name: str) -> None:
    """Check rows, hashes of files and golden vectors."""
    from cafe.index.collection import Collection

    problems = Collection.open(name).verify(progress=True)
    for problem in problems:
        click.echo(problem)
    if problems:
        raise CafeError(f"The collection {name} has {len(problems):,} problem{'s' if len(problems) > 1 else ''}.")
    click.echo(f"The collection {name} is sound.")


@collections_group.command("remove")
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def remove_command(name: str, yes: bool) -> None:
    """Delete a collection; the images that were indexed are not touched."""
    from cafe.index.collection import Collection
    from cafe.index.locations import locate_collection, no_collection
    from cafe.index.manifest import CURRENT_FILE

    # Not by `open`, which refuses a damaged one.
    collection = Collection(locate_collection(name))
    if not (collection.directory / CURRENT_FILE).is_file():
        raise no_collection(collection.directory)
    if yes or click.confirm(f"Delete the collection {collection.directory}?"):
        collection.remove()


@collections_group.command("reindex")
@click.argument("name", default="default")
@click.option("--model", required=True, metavar="CHECKPOINT", help="The other model.")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as one JSON object.")
@batch_size_option
@workers_option
def reindex_command(name: str, model: str, as_json: bool, batch_size: int, workers: int | None) -> None:
    """Build a collection anew with another model.

    It is built beside the one in use and then put in its place. The same command resumes an interrupted one.
    """
    from cafe.index.collection import Collection
    from cafe.index.indexing import IndexConfig

    collection = Collection.open(name)
    config = IndexConfig(batch_size=batch_size, num_workers=workers, progress=True)
    _print_reports(collection, list(collection.reindex(model, config).values()), as_json)
