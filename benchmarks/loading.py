"""Training from real files beside the same tensors in memory.

python benchmarks/loading.py [--json FILE]
"""

import json
import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

from common import Row, clock, show, tiny_cafe

from cafe.data.batch import Batch
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.loader import iterate_batches
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.images import decoding
from cafe.lvlm.processing import with_fast_images
from cafe.scenes.draw import paint
from cafe.scenes.words import CAPTION_PROMPT, paragraph
from cafe.scenes.world import draw_scenes
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep

PAIRS, GROUP, WARM, REPETITIONS = 16, 8, 4, 5  # batches of so many pairs: timed, and before the clock runs
SIZES = ((320, 240), (640, 480))  # (width, height) of files in pixels: about twice and four times what the model sees


def write(directory: Path, width: int = 640, height: int = 480) -> Path:
    """Write JPEG images and a LLaVA file about them."""
    records = []
    for scene in draw_scenes(0, "train", PAIRS * GROUP):
        paint(scene).resize((width, height)).save(directory / f"{scene.name}.jpg", quality=90)
        conversation = ("human", f"<image>\n{CAPTION_PROMPT}"), ("gpt", paragraph(scene, Random(scene.name)))
        turns = [{"from": speaker, "value": words} for speaker, words in conversation]
        records.append({"id": scene.name, "image": f"{scene.name}.jpg", "conversations": turns})
    (directory / "records.json").write_text(json.dumps(records))
    return directory / "records.json"


def compare(width: int, height: int) -> float:
    """Compare pairs/s from files of a size with those of batches in memory, as their ratio."""
    model = tiny_cafe()
    step = JointStep(model.lvlm.train(), ObjectiveConfig())

    def train(some: Iterable[Batch]) -> None:
        for batch in some:
            step.forward_backward(batch)
            model.lvlm.zero_grad()

    with tempfile.TemporaryDirectory() as directory:
        source = open_source(Source(path=str(write(Path(directory), width, height))))
        chat_processor, normalization = with_fast_images(model.chat_processor)
        packing = replace(model.packing, normalization=normalization)
        batches = ContrastiveBatchDataset([source], chat_processor, PAIRS, seed=0, packing=packing)
        held = [batches[number] for number in range(GROUP)]

        def from_files() -> float:
            """Time it, once the worker is as far ahead as it gets; it has ended when the time is over."""
            stream = iterate_batches(batches, 0, 2 * GROUP + WARM, num_workers=1)
            train(islice(stream, WARM))
            return clock(lambda: train(islice(stream, GROUP)))

        train(held)
        times = [(from_files(), clock(lambda: train(held))) for _ in range(REPETITIONS)]
    files = statistics.median(one for one, _ in times)
    print(
        f"{GROUP * PAIRS / files:.1f} pairs/s from JPEG files of {width} x {height} pixels, one loader worker",
        flush=True,
    )
    return statistics.median(other / one for one, other in times)


def main() -> None:
    """Print the table."""
    print(f"JPEG files are decoded by {'simplejpeg' if decoding.simplejpeg else 'Pillow'}", flush=True)
    rows = [
        Row(f"13: pairs/s, files of {width} x {height} / memory", compare(width, height), 0.95, 0.99)
        for width, height in SIZES
    ]
    show("Training from files", rows)


if __name__ == "__main__":
    main()
