"""Indexing a folder beside plain loops over the same images, and captions from one prefill beside two.

The images are scenes, as JPEG files of 256 x 256 pixels; the model is the small one that comes with the package.
Indexing starts workers, hashes, decodes, embeds and writes, and at its end builds indices and calibrates scores; all of
that counts. The loops only embed: by transformers alone, one file at a time; and in batches as large as those of
indexing, from images that were decoded and encoded beforehand. They are measured on some of the images. On a CPU,
indexing leaves one core to its worker, and so do the loops: the model has the others, or as many as `--threads` says.

Captions are measured with the model of the other benchmarks, which reads 192 tokens an image, and without the
calibration, which is the same either way.

python benchmarks/indexing.py [--images 10000] [--captioned 512] [--threads N] [--json FILE]
"""

import argparse
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Row, clock, show, tiny_cafe
from PIL import Image
from transformers import AutoModelForImageTextToText

from cafe import Cafe, Collection
from cafe.checkpoint import resolve_checkpoint
from cafe.content import Content, ImageLimits
from cafe.index.indexing import IndexConfig, IndexReport
from cafe.index.reading import FileItem, Reader
from cafe.index.store import Place
from cafe.lvlm.loading import load_processor
from cafe.lvlm.processing import with_fast_images
from cafe.lvlm.prompts import DESCRIBE_PROMPT, embedding_messages
from cafe.scenes.draw import paint
from cafe.scenes.world import draw_scenes

SIDE = 256  # pixels of the files
PLAIN_IMAGES, HELD_IMAGES = 256, 2048  # on which the loops are measured
NEW_TOKENS = 16  # of a caption
REPETITIONS = 3


def write_images(folder: Path, count: int) -> list[Path]:
    """Write JPEG files."""
    folder.mkdir()
    paths = []
    for scene in draw_scenes(0, "train", count):
        paths.append(folder / f"{scene.name}.jpg")
        paint(scene).resize((SIDE, SIDE)).save(paths[-1], quality=90)
    return paths


def plain_rate(model: Cafe, paths: list[Path]) -> float:
    """Return the images/s of a loop that is written with transformers alone."""
    processor = load_processor(model.name)  # the family's own; `AutoProcessor` would want torchvision
    lvlm = AutoModelForImageTextToText.from_pretrained(model.name, dtype=torch.float32).eval()
    messages = embedding_messages(Content.of(Image.new("RGB", (SIDE, SIDE))), model.chat_processor.prompts)
    answered = [*messages, {"role": "assistant", "content": [{"type": "text", "text": ""}]}]
    template = model.chat_processor.processor.chat_template
    prompt = processor.apply_chat_template(answered, chat_template=template).rstrip()

    @torch.inference_mode()
    def embed(path: Path) -> np.ndarray:
        """Embed one file."""
        inputs = processor(images=Image.open(path).convert("RGB"), text=prompt, return_tensors="pt")
        hidden = lvlm.model(**inputs, use_cache=False).last_hidden_state[0, -1]
        return F.normalize(hidden, dim=-1).numpy()

    np.testing.assert_allclose(embed(paths[0]), model.embed([paths[0]])[0], atol=0.02)  # resized in another way
    return len(paths) / clock(lambda: [embed(path) for path in paths])


def held_rate(model: Cafe, paths: list[Path], batch_size: int) -> float:
    """Return the images/s of a loop over images that were encoded beforehand."""
    chat_processor, normalization = with_fast_images(model.chat_processor)
    reader = Reader(chat_processor, np.array([b""]), "", ImageLimits())
    places = [Place(str(path), str(path), None, path.name, "", 0, 0) for path in paths]
    branches = [reading.encoded.embedding for reading in reader[[FileItem(place) for place in places]]]  # type: ignore[union-attr]
    batches = [branches[start : start + batch_size] for start in range(0, len(branches), batch_size)]
    packing = replace(model.packing, normalization=normalization)

    def embed() -> None:
        """Embed all."""
        for batch in batches:
            model.embed_branches(batch, packing=packing)

    embed()
    return len(paths) / statistics.median(clock(embed) for _ in range(REPETITIONS))


def index(model: Cafe, folder: Path, directory: Path, config: IndexConfig, describe: bool = False) -> IndexReport:
    """Index a folder into a new collection."""
    return Collection.open(directory, model).add(folder, describe=describe, config=config)


def caption_ratio(paths: list[Path], scratch: Path) -> float:
    """Return the time of indexing with captions, as a fraction of that of embedding first and captioning then."""
    model = tiny_cafe()
    folder = scratch / "captioned"
    folder.mkdir()
    for path in paths:
        (folder / path.name).hardlink_to(path)
    config = IndexConfig(max_new_tokens=NEW_TOKENS)
    prompts = [Content.of([path, DESCRIBE_PROMPT]) for path in paths]

    def caption() -> None:
        """Caption the files, and embed the captions."""
        model.embed(model.generate_batch(prompts, NEW_TOKENS, config.batch_size), config.batch_size)

    ratios = []
    for number in range(REPETITIONS):
        once = index(model, folder, scratch / f"once{number}", config, describe=True).seconds
        twice = index(model, folder, scratch / f"twice{number}", config).seconds + clock(caption)
        print(f"images/s: {len(paths) / once:.1f} with captions in one prefill, {len(paths) / twice:.1f} in two")
        ratios.append(once / twice)
    return statistics.median(ratios)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--captioned", type=int, default=512, help="images that are captioned")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="of the loops' model")
    options, _ = parser.parse_known_args()
    if not torch.cuda.is_available():
        torch.set_num_threads(options.threads)
    model = Cafe.load(resolve_checkpoint("scenes"))
    config = IndexConfig()
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        paths = write_images(scratch / "images", options.images)
        plain = plain_rate(model, paths[:PLAIN_IMAGES])
        held = held_rate(model, paths[:HELD_IMAGES], config.batch_size)
        reports: list[IndexReport] = []
        seconds = clock(lambda: reports.append(index(model, scratch / "images", scratch / "all", config)))
        [report] = reports
        assert report.added == options.images, report
        rate = report.added / seconds
        print(
            f"images/s: {plain:.1f} in a plain loop, {held:.1f} in memory, {rate:.1f} indexed ({report.added} images "
            f"in {seconds:.1f} s, of which the model waited {report.seconds_waited:.1f} s)"
        )
        ratio = caption_ratio(paths[: options.captioned], scratch)
    waited = report.seconds_waited / seconds
    show(
        "Indexing a folder",
        [
            Row("images/s, indexing / a plain loop at batch 1", rate / plain, 3, 5),
            Row("images/s, indexing / a loop in memory", rate / held, 0.85, 0.95),
            Row("share of the time that the model waits for images", waited, 0.1, 0.05, at_least=False),
            Row("time with captions, one prefill / embed then caption", ratio, 0.65, 0.58, at_least=False),
        ],
    )


if __name__ == "__main__":
    main()
