"""Write the small world in the public formats that real data has. The same seed writes the same bytes."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from cafe.scenes.draw import paint
from cafe.scenes.files import image_path, write_json
from cafe.scenes.mmeb import write_mmeb
from cafe.scenes.suites import write_suites
from cafe.scenes.words import CAPTION_PROMPT, PARAGRAPH_PROMPT, caption, hard_negatives, paragraph, questions
from cafe.scenes.world import Scene, Split, draw_scenes

_MMEB_ROWS = 400  # of one task


def write_scenes(
    directory: Path, seed: int = 0, train: int = 8000, test: int = 500, report: Callable[[str], None] = print
) -> None:
    """Write `train` training images and `test` distinct test images, with annotations in every format.

    Images are written to `images/`; the paths in annotation files are relative to `directory`.
    """
    splits: dict[Split, list[Scene]] = {
        "train": draw_scenes(seed, "train", train),
        "test": draw_scenes(seed, "test", test, distinct=True),
    }
    for split, scenes in splits.items():
        (directory / "images" / split).mkdir(parents=True, exist_ok=True)
        for scene in tqdm(scenes, desc=f"{split} images", unit="image"):
            paint(scene).save(directory / image_path(scene))
    # Training data, in LLaVA's and Karpathy's formats; the second holds both splits in one file.
    write_json(directory / "llava_train.json", list(map(_llava, range(train), splits["train"])))
    write_json(directory / "vqa_train.json", list(map(_llava_questions, splits["train"])))
    write_json(directory / "dataset_scenes.json", _karpathy([*splits["train"], *splits["test"]]))
    write_suites(splits["test"], directory)
    for split, scenes in splits.items():
        write_mmeb(scenes[:_MMEB_ROWS], split, directory)
    report(f"Wrote {train} training and {test} test images with annotations to {directory}")


def _llava(index: int, scene: Scene) -> dict[str, Any]:
    """Make a record with a caption, or a paragraph every tenth time, and false captions as hard negatives."""
    rng = Random(f"llava {scene.name}")
    if index % 10 == 9:
        exchange = (PARAGRAPH_PROMPT, paragraph(scene, rng))
    else:
        exchange = (CAPTION_PROMPT, caption(scene.things, rng))
    false_scenes = hard_negatives(scene.things, rng).values()
    negatives = [caption(things, rng) for things in false_scenes]
    return {"id": scene.name, "image": image_path(scene), "conversations": _turns([exchange]), "negatives": negatives}


def _llava_questions(scene: Scene) -> dict[str, Any]:
    """Make a record with three questions, as in instruction data: no answer occurs earlier in the dialogue."""
    rng = Random(f"llava questions {scene.name}")
    chosen = rng.sample(questions(scene, rng), 3)
    exchanges = [(question.text, question.answer) for question in chosen]
    return {"id": scene.name, "image": image_path(scene), "conversations": _turns(exchanges)}


def _turns(exchanges: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Turn prompts with answers into LLaVA's conversations, with the image in the first turn."""
    conversations = []
    for turn, (prompt, answer) in enumerate(exchanges):
        image = "<image>\n" if turn == 0 else ""
        conversations.append({"from": "human", "value": image + prompt})
        conversations.append({"from": "gpt", "value": answer})
    return conversations


def _karpathy(scenes: list[Scene]) -> dict[str, Any]:
    """Make a Karpathy split file, with two different captions per image."""
    images = []
    for number, scene in enumerate(scenes):
        rng = Random(f"karpathy {scene.name}")
        texts: dict[str, None] = {}  # a dict, since it keeps the order that a set does not
        while len(texts) < 2:
            texts[caption(scene.things, rng)] = None
        sentences = []
        for text in texts:
            words = text.strip(".").replace(",", "").replace(":", "").split()
            sentences.append({"raw": text, "tokens": words})
        row = {"filename": f"{scene.name}.png", "filepath": f"images/{scene.split}", "split": scene.split}
        images.append({**row, "sentences": sentences, "imgid": number, "cocoid": number})
    return {"dataset": "scenes", "images": images}
