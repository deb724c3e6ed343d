"""The tiny base model: at most 3M parameters in the real LLaVA-OneVision classes, trained on scenes.

It is trained from scratch with the language-modeling loss alone, so that like any LVLM it captions and answers, but its
last hidden state retrieves nothing. `cafe scenes train-base` reproduces it from one seed.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean

import torch
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from cafe.content import Content, Dialogue, Turn
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts, dialogue_messages
from cafe.packing import Branch, PackedBatch, PackingConfig, pack
from cafe.scenes.draw import SIDE, paint
from cafe.scenes.tiny_llava import (
    TinyLlavaConfig,
    make_model,
    make_optimizer,
    make_processor,
    make_scheduler,
    train_step,
)
from cafe.scenes.words import (
    CAPTION_PROMPT,
    PARAGRAPH_PROMPT,
    Question,
    caption,
    caption_by_place,
    in_reading_order,
    name,
    paragraph,
    questions,
)
from cafe.scenes.world import Scene, draw_scene, split_of
from cafe.utils.dataloader import make_loader

# An image is encoded as a thumbnail and four crops, as in anyres: each place is a crop.
MODEL = TinyLlavaConfig(vocabulary=640, crop=SIDE // 2, grid_pinpoints=((SIDE, SIDE),))
COLUMNS = 256  # tokens in a row: room for two scenes with their dialogues
ONE_THING_UNTIL, BY_PLACE_UNTIL = 0.015, 0.17  # fraction of the steps: the easy lessons come first
DESCRIBED = 0.46  # fraction of the scenes; the others get questions, which take longer to learn
PARAGRAPHS = 0.1  # fraction of the descriptions
HARD = ("presence", "color", "place")  # the kinds of question that are learned last


def lessons(scene: Scene, image: Image.Image, kind: str, rng: Random) -> list[Dialogue]:
    """Make dialogues about a scene: a caption (by place, or of any form, or a paragraph), or up to eight questions.

    Each is a dialogue of its own, so that no answer can be copied from an earlier turn.
    """
    match kind:
        case "by place":
            exchanges = [(CAPTION_PROMPT, caption_by_place(in_reading_order(scene.things)))]
        case "caption" if rng.random() < PARAGRAPHS:
            exchanges = [(PARAGRAPH_PROMPT, paragraph(scene, rng))]
        case "caption":
            exchanges = [(CAPTION_PROMPT, caption(scene.things, rng))]
        case _:
            exchanges = [(question.text, question.answer) for question in _draw_questions(scene, rng)]
    dialogues = []
    for prompt, answer in exchanges:
        user = Turn("user", Content.of({"image": image, "text": prompt}))
        dialogues.append(Dialogue((user, Turn("assistant", Content.of(answer)))))
    return dialogues


def _draw_questions(scene: Scene, rng: Random) -> list[Question]:
    """Draw up to eight different questions: all of the hard kinds, and two others."""
    # Finding the one thing that is named takes longest to learn, so such questions are asked twice.
    first, second = questions(scene, rng), questions(scene, rng)
    hard = [question for question in (*first, *second) if question.kind in HARD]
    easy = [question for question in first if question.kind not in HARD]
    chosen = dict.fromkeys([*hard, *rng.sample(easy, 2)])  # without repetitions, in order
    return list(chosen)


def in_one_color(scene: Scene) -> Scene:
    """Give the first two things of a scene the same color, unless the result would not be a training scene.

    Few scenes have two things in one color. Without more of them, the color is enough to find most things that
    questions are about, and the model never learns to use their kind as well.
    """
    if len(scene.things) < 2:
        return scene
    first, second, *others = scene.things
    things = (first, replace(second, color=first.color), *others)
    # Two things of one name could not be told apart in words.
    if len(set(map(name, things))) < len(things):
        return scene
    if split_of(things) != scene.split:
        return scene
    return replace(scene, things=things)


def corpus(seed: int, count: int) -> Iterator[str]:
    """Yield texts to train the tokenizer on."""
    for index in range(count):
        scene = draw_scene(seed, "train", index)
        rng = Random(f"corpus {scene.name}")
        yield paragraph(scene, rng)
        yield caption(scene.things, rng)
        for question in questions(scene, rng):
            yield from (question.text, question.answer)
        prompts = Prompts()
        yield from (prompts.system, prompts.image_instruction, prompts.text_instruction)
        yield from (CAPTION_PROMPT, PARAGRAPH_PROMPT, "system\n", "user\n", "assistant\n")


class Lessons(Dataset[dict[str, PackedBatch]]):
    """Make the packed batches of each step, by kind of lesson, from one seed; no scene occurs twice.

    Each image occurs once, followed by all dialogues about it. The first lessons are captions that name each place
    before the thing that is there: the model is told where to look, and has to learn only to see. After a few with one
    thing, their scenes have four, since each thing is one more to learn from. Then some scenes are described and the
    others get questions.
    """

    def __init__(self, chat_processor: ChatProcessor, seed: int, steps: int, batch: int) -> None:
        self.chat_processor, self.seed, self.steps, self.batch = chat_processor, seed, steps, batch
        self.packing = PackingConfig(max_row_tokens=COLUMNS)

    def __getitem__(self, step: int) -> dict[str, PackedBatch]:
        first = step * self.batch
        scenes = range(first, first + self.batch)
        if step < BY_PLACE_UNTIL * self.steps:
            things = 1 if step < ONE_THING_UNTIL * self.steps else 4
            return {"by place": self._pack(scenes, "by place", things, things)}
        described = round(DESCRIBED * self.batch)
        return {
            "caption": self._pack(scenes[:described], "caption"),
            "questions": self._pack(scenes[described:], "questions"),
        }

    def _pack(self, indices: range, kind: str, min_things: int = 1, max_things: int = 4) -> PackedBatch:
        """Pack the lessons of one kind about some scenes."""
        scenes = [draw_scene(self.seed, "train", index, max_things, min_things) for index in indices]
        if kind == "questions":
            scenes = list(map(in_one_color, scenes))
        images = list(map(paint, scenes))
        branches: list[list[Branch]] = []
        for scene, image, processed in zip(scenes, images, self._process_images(images), strict=True):
            dialogues = lessons(scene, image, kind, Random(f"lesson {scene.name}"))
            branches.append([self._encode(dialogue, processed) for dialogue in dialogues])
        no_embeddings: list[list[Branch]] = [[]] * len(branches)
        return pack(no_embeddings, branches, self.packing)

    def _encode(self, dialogue: Dialogue, processed: ProcessedImages) -> Branch:
        """Encode a dialogue about an image that is processed already."""
        messages = dialogue_messages(dialogue, self.chat_processor.prompts)
        return self.chat_processor.encode_dialogue(messages, processed)

    def _process_images(self, images: list[Image.Image]) -> list[ProcessedImages]:
        """Process images as if one at a time, in one call: all have the same size and therefore the same tokens."""
        token_runs = self.chat_processor.process_images(images[:1]).token_runs
        tensors = self.chat_processor.processor.image_processor(images, return_tensors="pt")
        processed = []
        for number in range(len(images)):
            # Slices, not indices: each image keeps the dimension that images are joined in.
            inputs = {name: batch[number : number + 1] for name, batch in tensors.items()}
            processed.append(ProcessedImages(token_runs, inputs))
        return processed


def train_base(
    directory: Path,
    seed: int = 0,
    steps: int = 1900,
    batch: int = 46,
    learning_rate: float = 1e-3,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> None:
    """Train the base model and write it as a Hugging Face checkpoint in half precision."""
    directory.mkdir(parents=True, exist_ok=True)  # fails before the training if it cannot be made
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = make_processor(corpus(seed, 3000), MODEL)
    chat_processor = ChatProcessor(processor, Prompts())
    model = make_model(processor, MODEL).to(device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    report(f"{num_parameters:,} parameters, {len(processor.tokenizer)} tokens")
    optimizer = make_optimizer([model], learning_rate)
    scheduler = make_scheduler(optimizer, steps)
    stream = iter(make_loader(Lessons(chat_processor, seed, steps, batch), range(steps), workers))
    history: dict[str, list[float]] = {}
    started = time.monotonic()
    progress = tqdm(range(steps), desc="base", unit="step", mininterval=5)
    for step in progress:
        for kind, loss in train_step(model, next(stream), optimizer, scheduler).items():
            history.setdefault(kind, []).append(loss)
        if step % 25 == 24:
            progress.set_postfix({kind: f"{fmean(losses[-25:]):.4f}" for kind, losses in history.items()})
    # Half precision halves the files, which the package ships.
    model.half().save_pretrained(directory)
    chat_processor.save(directory)
    record = {
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "learning_rate": learning_rate,
        "loss": {kind: fmean(losses[-25:]) for kind, losses in history.items()},
    }
    (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    report(f"{steps} steps in {time.monotonic() - started:.0f} s, last losses {record['loss']}: {directory}")
