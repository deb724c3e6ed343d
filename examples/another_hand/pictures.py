"""Show what was found and said: a grid of queries by words with the drawings found, and descriptions, errors marked.

Wrong drawings have a red frame and a cross; names of what is not there are struck out.
"""

import argparse
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from another_hand.concepts import Concept, read_concepts
from another_hand.measure import seen_names
from another_hand.mentions import replace
from another_hand.tables import ARMS, collect
from cafe.checkpoint import resolve_checkpoint
from cafe.errors import CafeError
from cafe.evaluation.io import evenly_spaced, find_image, json_lines
from cafe.model import Cafe

HITS = 5
SHOWN = 60  # characters of a description; a model that cannot stop repeats itself
RIGHT, WRONG = "#2a7d4f", "#c0392b"
FOREIGN = ("de", "fr", "es", "it")  # of the queries in another language, in turn


@dataclass(frozen=True)
class Query:
    """Hold a query by words, and the concept that it looks for."""

    text: str
    concept: str


@dataclass(frozen=True)
class Hit:
    """Hold an image that was found, and whether it shows what was looked for."""

    image: Path
    right: bool


def make_queries(concepts: Sequence[Concept], count: int) -> list[Query]:
    """Make queries for some concepts, evenly spaced: by name, keywords and the name in another language in turn."""
    queries = []
    chosen = [concepts[number] for number in evenly_spaced(len(concepts), count)]
    for number, concept in enumerate(chosen):
        texts = {0: concept.name, 1: ", ".join(concept.keywords[:4]), 2: ""}
        language = FOREIGN[number // 3 % len(FOREIGN)]
        texts[2] = concept.foreign.get(language, "")
        # Not every concept has all three.
        queries.append(Query(texts[number % 3] or concept.name, concept.name))
    return queries


def read_gallery(data: Path) -> dict[Path, str]:
    """Read which single drawings a folder of evaluation files has, and what each shows."""
    path = data / "vqa_test.jsonl"
    records = json_lines(path, {"image": str, "answer": str, "category": str})
    singles = [record for record in records if record["category"] == "name"]
    return {data / find_image(record["image"], data, path): record["answer"] for record in singles}


def search(model: Any, queries: Sequence[Query], gallery: Mapping[Path, str], count: int = HITS) -> list[list[Hit]]:
    """Find the images most similar to each query, best first.

    Args:
        model: a `Cafe`, or anything with its `embed`.
        queries: what is looked for.
        gallery: what each image shows.
        count: the number of hits.
    """
    paths = list(gallery)
    similarities = model.embed([query.text for query in queries]) @ model.embed(paths).T
    # Of equal similarities the first image wins, on every machine.
    found = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
    pairs = zip(queries, found, strict=True)
    return [[Hit(paths[number], gallery[paths[number]] == query.concept) for number in hits] for query, hits in pairs]


def draw_grid(queries: Sequence[Query], found: Sequence[Sequence[Hit]], path: Path, title: str = "") -> None:
    """Draw a row for each query: its words, what it looks for, and the images found; write a PNG."""
    columns, widest = max(map(len, found)), 4  # the words take as much room as four images
    figure = Figure(figsize=(0.8 * (widest + columns), 0.85 * len(queries) + (0.4 if title else 0.1)), dpi=110)
    ratios = [widest, *[1] * columns]
    grid = figure.add_gridspec(len(queries), columns + 1, width_ratios=ratios, wspace=0.08, hspace=0.12)
    for row, (query, hits) in enumerate(zip(queries, found, strict=True)):
        axes = figure.add_subplot(grid[row, 0])
        axes.axis("off")
        axes.text(0.98, 0.62, f"“{query.text}”", ha="right", va="center", fontsize=9, wrap=True)
        if query.text != query.concept:
            axes.text(0.98, 0.22, query.concept, ha="right", va="center", fontsize=7, color="#666666")
        for column, hit in enumerate(hits):
            _draw_hit(figure.add_subplot(grid[row, column + 1]), hit)
    if title:
        figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the version of the library, the same figure is the same file.
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})


def _draw_hit(axes: Axes, hit: Hit) -> None:
    """Draw one image, with a frame that says whether it is right, and a cross if it is not."""
    axes.imshow(np.asarray(Image.open(hit.image).convert("RGB")), interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(RIGHT if hit.right else WRONG)
        spine.set_linewidth(2.5 if hit.right else 1)
    if not hit.right:
        axes.plot([0.84, 0.96], [0.84, 0.96], [0.84, 0.96], [0.96, 0.84], color=WRONG, lw=1.2, transform=axes.transAxes)


def strike_out(text: str, names: Collection[str], present: Collection[str]) -> str:
    """Strike out, in Markdown, the names in a text of what is not present."""
    shown = {name.lower() for name in present}
    return replace(text, names, lambda name: name if name.lower() in shown else f"~~{name}~~")


def describe(said: Mapping[str, Sequence[Mapping[str, Any]]], names: Collection[str], count: int) -> str:
    """Format a Markdown table of what each arm says of some images, with names of what is absent struck out.

    Args:
        said: by arm, the output rows of the captions suite on the same images.
        names: all names that a description may contain.
        count: the number of images, evenly spaced.
    """
    lines = ["| the scene shows | " + " | ".join(said) + " |", "|---|" + "---|" * len(said)]
    rows = list(zip(*said.values(), strict=True))
    for number in evenly_spaced(len(rows), count):
        shown = set(rows[number][0]["objects"])
        said_in_short = [row["said"][:SHOWN] + "…" * (len(row["said"]) > SHOWN) for row in rows[number]]
        cells = [strike_out(_escape(text), names, shown) or "(nothing)" for text in said_in_short]
        lines.append(f"| {', '.join(sorted(shown))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Keep what a model says on one line, and from being taken for Markdown or HTML."""
    return re.sub(r"([\\`*_~|<>\[\]])", r"\\\1", " ".join(text.split()))


def write_pictures(packages: Path, data: Path, output: Path, target: Path, folder: str, queries: int = 12) -> None:
    """Write `another-hand-queries.png` and `another-hand-descriptions.md` of a folder of evaluation files.

    Args:
        packages: where the npm packages are.
        data: the directory of the folders of evaluation files.
        output: the ablation's directory, whose first joint run answers the queries.
        target: the directory to write to.
        folder: the folder.
        queries: the number of queries.
    """
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    gallery = read_gallery(data / folder)
    concepts = [concept for concept in read_concepts(packages) if concept.name in gallery.values()]
    asked = make_queries(concepts, queries)
    model = Cafe.load(resolve_checkpoint(str(output / "joint-0")))
    draw_grid(asked, search(model, asked, gallery), target / "another-hand-queries.png")
    runs = collect(output, folder)
    said = {arm: runs[arm][0].rows["captions"] for arm in ARMS if arm in runs}
    text = describe(said, seen_names(), 12) + "\n"
    (target / "another-hand-descriptions.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Draw what the first joint run finds, and write down what the first run of each arm says."""
    parser = argparse.ArgumentParser(prog="python -m another_hand.pictures", description=main.__doc__)
    parser.add_argument("packages", type=Path, help="the npm packages' archives")
    parser.add_argument("data", type=Path, help="the folders of evaluation files")
    parser.add_argument("output", type=Path, help="the ablation's directory, in which every run was measured")
    parser.add_argument("target", type=Path, help="the directory to write to")
    parser.add_argument("--folder", default="openmoji", help="the folder to show")
    options = parser.parse_args()
    try:
        write_pictures(options.packages, options.data, options.output, options.target, options.folder)
    except CafeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
