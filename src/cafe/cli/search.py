"""The commands search, ask and duplicates: what a collection of images is for."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cafe.cli.index import collection_option, model_option
from cafe.cli.options import NON_NEGATIVE, PATH, POSITIVE
from cafe.errors import MissingPackageError
from cafe.utils.text import escape_controls, shorten

if TYPE_CHECKING:
    from cafe.index.searching import Hit, Sort

Command = TypeVar("Command", bound=Callable[..., Any])
CAPTION_WIDTH = 60  # characters in the table


def filter_options(command: Command) -> Command:
    """Add the options that limit a search."""
    options = [
        click.option("--after", metavar="DATE", help="Taken at this time or later: 2024, 2024-05, 2024-05-31."),
        click.option("--before", metavar="DATE", help="Taken before this year, month or day."),
        click.option("--in", "folder", metavar="FOLDER", help="In a folder with this in its name, or below this path."),
        click.option("--min-width", type=NON_NEGATIVE, default=0, help="Least width, in pixels."),
        click.option("--min-height", type=NON_NEGATIVE, default=0, help="Least height, in pixels."),
        click.option(
            "--where", multiple=True, metavar="COLUMN=VALUE", help="A column that came along; also != < > <= >=."
        ),
        click.option("--min-score", type=float, help="Least score.", show_default="any"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command("search")
@click.argument("query", nargs=-1, required=True)
@collection_option
@model_option
@click.option("-k", "--top", "count", type=POSITIVE, default=20, help="Number of images to find.")
@filter_options
@click.option(
    "--sort",
    type=click.Choice(["score", "newest", "oldest", "name"]),
    default="score",
    help="Order of the images found.",
)
@click.option("--rerank", is_flag=True, help="Order the best images by how likely the model is to describe them so.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object per line.")
@click.option("-f", "--filepath-only", is_flag=True, help="Print the paths of files alone.")
@click.option("-0", "null", is_flag=True, help="With -f, end each path with a NUL character instead of a newline.")
@click.option("--sheet", type=PATH, metavar="FILE", help="Write a contact sheet, .png or .html.")
@click.option("--show/--no-show", default=None, show_default="if the terminal can", help="Show the images inline.")
def search_command(
    query: tuple[str, ...],
    collection: str,
    model: str | None,
    count: int,
    sort: "Sort",
    rerank: bool,
    as_json: bool,
    filepath_only: bool,
    null: bool,
    sheet: Path | None,
    show: bool | None,
    **filters: Any,
) -> None:
    """Find images by words, by an image, or by both.

    QUERY is words, or the path of an image (./boat.jpg). Terms are combined by + and -, each with a weight if it begins
    with one: cafe search ./boat.jpg + "at night" - 0.5:people

    The score, from 0 to 1, is by the image's embedding: above 0.5, a match is more likely than a similar image that is
    none. With fewer than 8 images it is the cosine similarity instead. Searches by words also look at captions, texts
    and file names, so an image may come before others with a higher score.
    """
    from cafe.index.collection import Collection
    from cafe.index.query import Query
    from cafe.index.sheet import check_suffix, write_sheet

    # What is wrong with the command line is said before the model is loaded.
    parsed = Query.parse(query)
    if sheet:
        check_suffix(sheet)
    opened = Collection.open(collection, model)
    hits = opened.search(parsed, count, sort=sort, rerank=rerank, **filters)
    if sheet:
        write_sheet(sheet, " ".join(query), hits, opened.load_image)
    if as_json:
        for hit in hits:
            click.echo(json.dumps(_json_row(hit)))
    elif filepath_only:
        _print_paths(hits, null)
    else:
        print_hits(hits)
        _show(hits, opened.load_image, show)


@click.command("ask")
@click.argument("question", nargs=-1, required=True)
@collection_option
@model_option
@click.option("-k", "--top", "count", type=POSITIVE, default=4, help="Number of images to ask about.")
@click.option("--find", metavar="QUERY", show_default="the question", help="What to search for.")
@click.option("--each", is_flag=True, help="Ask about each image by itself, and answer in a line for each.")
@filter_options
@click.option("--max-new-tokens", type=POSITIVE, default=256, help="Maximum number of tokens in an answer.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ask_command(
    question: tuple[str, ...],
    collection: str,
    model: str | None,
    count: int,
    find: str | None,
    each: bool,
    max_new_tokens: int,
    as_json: bool,
    **filters: Any,
) -> None:
    """Answer a question from the images that are found for it.

    The images are those that `cafe search` finds for the question, or for --find; the answer names them by numbers.
    """
    from cafe.index.collection import Collection
    from cafe.index.query import Query

    opened = Collection.open(collection, model)
    answer = opened.ask(
        " ".join(question),
        find=Query.parse(find.split()) if find else None,
        k=count,
        each=each,
        max_new_tokens=max_new_tokens,
        stream=not as_json,
        **filters,
    )
    if as_json:
        click.echo(json.dumps({"text": answer.text, "sources": [_json_row(hit) for hit in answer.sources]}))
        return
    # As it comes; a model may have been trained to write escape sequences.
    for piece in answer:
        click.echo(escape_controls(piece, keep="\n"), nl=False)
        sys.stdout.flush()
    click.echo()
    # Only the images that the answer names, or all if it names none.
    cited = {hit.id for hit in answer.cited}
    for number, hit in enumerate(answer.sources, 1):
        if hit.id in cited:
            click.echo(f"[{number}] {escape_controls(hit.id)}")


@click.command("duplicates")
@collection_option
@click.option("--min-similarity", type=float, default=0.95, help="Least similarity of two images in a group.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list per group.")
def duplicates_command(collection: str, min_similarity: float, as_json: bool) -> None:
    """Find images that look the same, in groups."""
    from cafe.index.collection import Collection

    groups = Collection.open(collection).duplicates(min_similarity)
    if as_json:
        for group in groups:
            click.echo(json.dumps([_json_row(hit) for hit in group]))
        return
    for number, group in enumerate(groups):
        if number:
            click.echo()
        for hit in group:
            click.echo(f"{hit.similarity:5.3f}  {hit.width:>5} x {hit.height:<5}  {escape_controls(hit.id)}")


def _print_paths(hits: "Sequence[Hit]", null: bool) -> None:
    """Print the path of each file once, as it is for other programs, and safely for a terminal."""
    is_safe = not null and sys.stdout.isatty()
    for path in dict.fromkeys(hit.path for hit in hits):  # a file may have several pages
        shown = escape_controls(path) if is_safe else path
        # As bytes: click would leave out of a text what looks like a terminal's color.
        click.echo(os.fsencode(shown) + (b"\0" if null else b"\n"), nl=False)


def print_hits(hits: "Sequence[Hit]") -> None:
    """Print hits as a table: score, date, path, and the beginning of the caption or of the page's text."""
    if not hits:
        click.echo("Nothing was found.")
    for hit in hits:
        caption = shorten(" ".join((hit.caption or hit.text).split()), CAPTION_WIDTH)
        line = f"{hit.score:5.3f}  {hit.taken_at:%Y-%m-%d}  {hit.id}  {caption}"
        click.echo(escape_controls(line.rstrip()))


def _json_row(hit: "Hit") -> dict[str, Any]:
    """Return a hit as JSON has it."""
    row = {
        "id": hit.id,
        "path": hit.path,
        "page": hit.page,
        "score": hit.score,
        "similarity": hit.similarity,
        "caption": hit.caption,
        "taken_at": hit.taken_at.isoformat(),
        "width": hit.width,
        "height": hit.height,
    }
    return {**row, **({"columns": hit.columns} if hit.columns else {})}


def _show(hits: "Sequence[Hit]", load_image: Callable[["Hit"], Any], wanted: bool | None) -> None:
    """Show images inline, where the terminal can."""
    if wanted is False or not (wanted or sys.stdout.isatty()):
        return
    try:
        from cafe.index.terminal import show_images
    except ImportError:
        if wanted:
            raise MissingPackageError(
                "Showing images needs the package textual-image: pip install 'cafe-lvlm[terminal]'."
            ) from None
        return
    show_images(hits, load_image, anywhere=bool(wanted))
