"""The tiny base model: at most 3M parameters in the real LLaVA-OneVision classes, taught to speak about scenes.

It is trained from scratch with the language loss alone, so that like any LVLM it captions and answers but its last
hidden state retrieves nothing. `python -m cafe scenes train-base` makes it again from one seed.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from cafe.content import Content, Dialogue, Turn
from cafe.losses import linear_cross_entropy
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.loading import without_video
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import CHATML, Prompts, dialogue_messages
from cafe.packing import PackedBatch, PackingConfig, pack
from cafe.scenes.draw import SIDE, paint
from cafe.scenes.words import (
    CAPTION_PROMPT,
    PARAGRAPH_PROMPT,
    caption,
    caption_by_place,
    in_reading_order,
    name,
    paragraph,
    questions,
)
from cafe.scenes.world import Scene, draw_scene, split_of
from cafe.training.muon import Muon, hidden_weight_names
from cafe.utils.dataloader import make_loader

VOCABULARY = 640
CROP = SIDE // 2  # pixels; a picture is read as a thumbnail and four crops, as anyres has it: each place is a crop
PATCH = 16  # pixels
WIDTH = 160
COLUMNS = 256  # tokens in a row: room for two scenes with all that is asked about them
ONE_THING_UNTIL, BY_PLACE_UNTIL = 0.015, 0.17  # of the steps: the easy lessons come first
DESCRIBED = 0.46  # of the scenes; the others are asked about, which takes longer to learn
PARAGRAPHS = 0.1  # of the descriptions
HARD = ("presence", "color", "place")  # the kinds of question that are learned last


def make_processor(texts: Iterator[str]) -> LlavaOnevisionProcessor:
    """A LLaVA-OneVision processor whose byte-level BPE tokenizer is trained on the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        model_max_length=1024,
    )
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": CROP, "width": CROP},
        image_grid_pinpoints=[[SIDE, SIDE]],
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return without_video(LlavaOnevisionProcessor)(
        image_processor=image_processor,
        tokenizer=tokenizer,
        num_image_tokens=(CROP // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHATML,
    )


def make_model(processor: LlavaOnevisionProcessor) -> LlavaOnevisionForConditionalGeneration:
    """The untrained model."""
    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        image_size=CROP,
        patch_size=PATCH,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=480,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=WIDTH**-0.5,  # the usual 0.02 is for wide models: here attention would start out blind
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    for path, parameter in model.named_parameters():
        if path.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            nn.init.zeros_(parameter)  # each layer begins by passing on what it is given
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def lessons(scene: Scene, picture: Image.Image, kind: str, rng: Random) -> list[Dialogue]:
    """Dialogues about a scene: a caption (by place, or of any form, or a paragraph), or up to eight questions.

    Each is a dialogue of its own, so that no answer can be copied from what was said before.
    """
    if kind == "by place":
        spoken = [(CAPTION_PROMPT, caption_by_place(in_reading_order(scene.things)))]
    elif kind == "caption" and rng.random() < PARAGRAPHS:
        spoken = [(PARAGRAPH_PROMPT, paragraph(scene, rng))]
    elif kind == "caption":
        spoken = [(CAPTION_PROMPT, caption(scene.things, rng))]
    else:
        # To find the one thing that is named takes longest to learn: what asks for it is asked twice.
        first, second = questions(scene, rng), questions(scene, rng)
        hard = [question for question in (*first, *second) if question.kind in HARD]
        easy = [question for question in first if question.kind not in HARD]
        chosen = dict.fromkeys([*hard, *rng.sample(easy, 2)])
        spoken = [(question.text, question.answer) for question in chosen]
    return [
        Dialogue((Turn("user", Content.of({"image": picture, "text": asked})), Turn("assistant", Content.of(answered))))
        for asked, answered in spoken
    ]


def in_one_color(scene: Scene) -> Scene:
    """The scene with its first two things in one color; as it is, where that would be no training scene.

    Few scenes have that. Without more of them a color is enough to find most things that are asked for, and the model
    never learns to look at their kind as well.
    """
    if len(scene.things) < 2:
        return scene
    first, second, *others = scene.things
    things = (first, replace(second, color=first.color), *others)
    if len({name(thing) for thing in things}) < len(things) or split_of(things) != scene.split:
        return scene
    return replace(scene, things=things)


def corpus(seed: int, count: int) -> Iterator[str]:
    """Texts to train the tokenizer on."""
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
    """What each step reads, by kind of lesson, no scene twice; the same for the same seed, whoever makes it.

    Each picture is there once, with all that is said about it behind it. The first lessons are captions that name each
    place before what stands there: what to look at is told, only how to look is to be learned. After a few with one
    thing, their pictures are full, since each thing is one more to learn from. Then some scenes are described and the
    others are asked about.
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

    def _pack(self, indices: range, kind: str, least: int = 1, most: int = 4) -> PackedBatch:
        scenes = [draw_scene(self.seed, "train", index, most, least) for index in indices]
        if kind == "questions":
            scenes = [in_one_color(scene) for scene in scenes]
        painted = [paint(scene) for scene in scenes]
        rows = [
            [
                self.chat_processor.encode_dialogue(dialogue_messages(dialogue, self.chat_processor.prompts), pictures)
                for dialogue in lessons(scene, picture, kind, Random(f"lesson {scene.name}"))
            ]
            for scene, picture, pictures in zip(scenes, painted, self._read(painted), strict=True)
        ]
        return pack([[]] * len(rows), rows, self.packing)

    def _read(self, painted: list[Image.Image]) -> list[ProcessedImages]:
        """Each picture by itself, in one call: all have one size and so the same tokens."""
        runs = self.chat_processor.process_images(painted[:1]).token_runs
        tensors = self.chat_processor.processor.image_processor(painted, return_tensors="pt")
        return [ProcessedImages(runs, {name: t[i : i + 1] for name, t in tensors.items()}) for i in range(len(painted))]


def make_optimizer(model: nn.Module, learning_rate: float) -> Muon:
    """Muon for the matrices inside the layers, AdamW for the rest."""
    inner = hidden_weight_names(model)
    matrices = [p for path, p in model.named_parameters() if path in inner]
    others = [p for path, p in model.named_parameters() if path not in inner]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": 2 * learning_rate, "orthogonal": True},
        {"params": others},
    ]
    return Muon(groups, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)


def _schedule(steps: int) -> Callable[[int], float]:
    """A short rise, then a half cosine down to a fiftieth."""
    return lambda step: min((step + 1) / 50, 0.02 + 0.49 * (1 + math.cos(math.pi * min(1, step / steps))))


def train_base(
    directory: Path,
    seed: int = 0,
    steps: int = 1900,
    batch: int = 46,
    learning_rate: float = 1e-3,
    workers: int = 1,
    report: Callable[[str], None] = print,
) -> None:
    """Trains the base model and writes it as a Hugging Face checkpoint in half precision."""
    directory.mkdir(parents=True, exist_ok=True)  # before the work, for which there may be no place
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = make_processor(corpus(seed, 3000))
    chat_processor = ChatProcessor(processor, Prompts())
    model = make_model(processor).to(device)
    report(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters, {len(processor.tokenizer)} tokens"
    )
    optimizer = make_optimizer(model, learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(steps))
    stream = iter(make_loader(Lessons(chat_processor, seed, steps, batch), range(steps), workers))
    history: dict[str, list[float]] = {}
    started = time.monotonic()
    progress = tqdm(range(steps), desc="base", unit="step", mininterval=5)
    for step in progress:
        packs = next(stream)
        model.zero_grad()
        for kind, lesson in packs.items():
            _, hidden = forward_packed(model, lesson)
            loss = linear_cross_entropy(hidden, lesson.labels.to(device), model.lm_head.weight) / len(lesson.labels)
            (loss / len(packs)).backward()
            history.setdefault(kind, []).append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 24:
            progress.set_postfix({kind: f"{fmean(losses[-25:]):.4f}" for kind, losses in history.items()})
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
