"""Training from real files beside the same tensors in memory.

python benchmarks/loading.py [--json FILE]
"""

import json
import statistics
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

from common import Row, clock, show, tiny_cafe

from cafe.data.formats import Source, open_source
from cafe.data.loading import Batch, Batches, load
from cafe.scenes.draw import paint
from cafe.scenes.words import CAPTION_PROMPT, paragraph
from cafe.scenes.world import draw_scenes
from cafe.training.recipe import ObjectiveRecipe
from cafe.training.step import JointStep

PAIRS, GROUP, REPETITIONS = 16, 6, 5
WIDTH, HEIGHT = 640, 480  # pixels of a file


def write(directory: Path) -> Path:
    """JPEG pictures and a LLaVA file about them."""
    records = []
    for scene in draw_scenes(0, "train", PAIRS * GROUP):
        paint(scene).resize((WIDTH, HEIGHT)).save(directory / f"{scene.name}.jpg", quality=90)
        spoken = ("human", f"<image>\n{CAPTION_PROMPT}"), ("gpt", paragraph(scene, Random(scene.name)))
        turns = [{"from": speaker, "value": words} for speaker, words in spoken]
        records.append({"id": scene.name, "image": f"{scene.name}.jpg", "conversations": turns})
    (directory / "records.json").write_text(json.dumps(records))
    return directory / "records.json"


def main() -> None:
    """Prints the table."""
    model = tiny_cafe()
    step = JointStep(model.lvlm.train(), ObjectiveRecipe())
    with tempfile.TemporaryDirectory() as directory:
        source = open_source(Source(path=str(write(Path(directory)))))
        processing, normalization = model.processing.raw()
        packing = replace(model.packing, normalization=normalization)
        batches = Batches([source], processing, PAIRS, seed=0, packing=packing)
        held = [batches[number] for number in range(GROUP)]
        stream = load(batches, 0, GROUP * (REPETITIONS + 1), workers=1)

        def train(some: list[Batch] | None) -> None:
            for batch in some or islice(stream, GROUP):
                step(batch)
                model.lvlm.zero_grad()

        train(held)
        train(None)
        times = [(clock(lambda: train(None)), clock(lambda: train(held))) for _ in range(REPETITIONS)]
    files = statistics.median(one for one, _ in times)
    ratio = statistics.median(other / one for one, other in times)
    print(f"{GROUP * PAIRS / files:.1f} pairs/s from JPEG files of {WIDTH} x {HEIGHT} pixels, one loader worker")
    show("Training from files", [Row("13: pairs/s, files / memory", ratio, 0.95, 0.99)])


if __name__ == "__main__":
    main()
