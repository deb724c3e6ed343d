"""Train the base: a small LLaVA-OneVision from scratch, with the language-modeling loss alone.

Two stages, as real LVLMs are made: the vision tower comes trained (`tower.py`) and frozen; then the language model
learns to name what it sees, to choose, to find and to describe.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import LlavaOnevisionForConditionalGeneration

from another_hand.concepts import Concept, read_others
from another_hand.scenes import CELL, Drawings, Scene, compose, draw_concepts, paint, single
from another_hand.tower import Batches, Teacher, train_teacher, train_tower
from another_hand.words import (
    COUNT,
    DESCRIBE,
    GROUP,
    NAME,
    NUMBERS,
    Exchange,
    absent,
    choice,
    description,
    place,
    presence,
)
from another_hand.world import VARIANTS, World, corpus, draw_variants, make_world
from cafe.content import Content, Dialogue, Turn
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts, dialogue_messages
from cafe.model import Cafe
from cafe.packing import Branch, PackedBatch, PackingConfig, pack
from cafe.scenes.tiny_llava import (
    TinyLlavaConfig,
    make_model,
    make_optimizer,
    make_processor,
    make_scheduler,
    train_step,
)
from cafe.utils.atomic import atomic_write_bytes, atomic_write_text
from cafe.utils.dataloader import make_loader

PROMPTS = Prompts(chat_template="chatml")
# A scene is encoded as a thumbnail and its four cells, as in anyres; a single drawing fills one cell.
MODEL = TinyLlavaConfig(
    vocabulary=1200,
    crop=CELL,
    grid_pinpoints=((CELL, CELL), (2 * CELL, 2 * CELL)),
    vision_layers=4,
    text_layers=4,
)
RECORD = "training.json"  # is written last
STATE = "base.pt"  # in the folder of stages: what an interrupted training resumes from
SAVE_EVERY = 100  # steps
PLACEHOLDER = "image.png"  # stands for an image that is processed apart
FOLLOWING = 0.25  # of the images that questions are about: they follow the description
TOLD = 0.4  # of the images; the others get questions
CHOICES = 4  # names to choose from


@dataclass(frozen=True)
class BaseConfig:
    """Configure the base and its training. The values were chosen on the development hand."""

    model: TinyLlavaConfig = MODEL
    teacher_steps: int = 1500
    tower_steps: int = 1500
    teacher_batch: int = 256
    tower_batch: int = 192
    align_steps: int = 300
    tower_variants: int = 12  # augmented variants of each drawing that the tower learns from
    variants: int = VARIANTS  # and of each that the lessons show
    steps: int = 2000
    batch: int = 40
    singles_until: float = 0.25  # of the steps: at first all images are single drawings, and later some
    singles: float = 0.25  # of the later images
    # Numbers of concepts that questions are about, until these shares of the steps. Whether what is named is there is
    # not learned over all of them at once: the loss stays where always saying one of two words has it.
    few_at_first: tuple[tuple[int, float], ...] = ((12, 0.08), (36, 0.16))
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    # Mean noise on what the tower sees, in its standard deviations: a drawing by another hand is never as clear as one
    # that the tower learned from, and a model that trusts a single feature errs there.
    noise: float = 0.5
    seed: int = 0


def tell(scene: Scene) -> Exchange:
    """Ask for the names of what a scene shows, or for the name of a single drawing."""
    if scene.single:
        return NAME, scene.concepts[0]
    return DESCRIBE, description(scene)


def ask(scene: Scene, world: World, rng: Random) -> list[list[Exchange]]:
    """Make dialogues of questions about a scene, one question each.

    As many questions about presence are to be answered yes as no, and what is absent is drawn as what is present is:
    otherwise the model learns which concepts are frequent, and not to look. Some follow the scene's description, in
    which the name only has to be found.
    """
    shown = rng.sample(scene.concepts, len(scene.concepts))
    absents: list[str] = []
    while len(absents) < max(len(shown), CHOICES - 1):
        concept = absent(scene, world.subgroups, world.concepts, rng)
        if concept not in absents:
            absents.append(concept)
    before = [tell(scene)] if rng.random() < FOLLOWING else []
    dialogues = []
    for present_one, absent_one in zip(shown, absents, strict=False):
        dialogues += [[*before, (presence(present_one), "yes")], [*before, (presence(absent_one), "no")]]
    dialogues.append([choice(shown[0], absents[: CHOICES - 1], rng)])
    if scene.single:
        return [*dialogues, [(GROUP, world.groups[shown[0]])]]
    dialogues.append([place(scene, rng)])
    if rng.random() < 0.25:
        dialogues.append([(COUNT, NUMBERS[len(shown)])])
    return dialogues


class Lessons(Dataset[dict[str, PackedBatch]]):
    """Make the packed batches of each step from one seed: what is shown is told, and what is asked is answered.

    Each exchange is a dialogue of its own, so that no answer can be copied from an earlier one; all exchanges about an
    image share it.
    """

    def __init__(self, chat_processor: ChatProcessor, world: World, config: BaseConfig) -> None:
        self.chat_processor, self.world, self.config = chat_processor, world, config
        self.packing = PackingConfig(max_row_tokens=320)
        self.few_at_first = [(world.few(count, config.seed), until) for count, until in config.few_at_first]

    def __getitem__(self, step: int) -> dict[str, PackedBatch]:
        kinds: dict[str, list[list[Branch]]] = {"told": [], "asked": []}
        first, progress = step * self.config.batch, step / self.config.steps
        # One thing at a time: what is asked about a single drawing needs no search.
        singles = 1.0 if progress < self.config.singles_until else self.config.singles
        asked_about = next((few for few, until in self.few_at_first if progress < until), self.world)
        for number in range(first, first + self.config.batch):
            rng = Random(f"lesson {self.config.seed} {number}")
            kind = "told" if rng.random() < TOLD else "asked"
            world = self.world if kind == "told" else asked_about
            scene = draw_scene(world, rng, f"base-{number}", singles)
            processed = self.chat_processor.process_images([paint(scene, world.drawings)])
            dialogues = [[tell(scene)]] if kind == "told" else ask(scene, world, rng)
            kinds[kind].append([self._encode(exchanges, processed) for exchanges in dialogues])
        # A small batch may have one kind alone.
        return {kind: pack([[]] * len(made), made, self.packing) for kind, made in kinds.items() if made}

    def _encode(self, exchanges: Sequence[Exchange], processed: Any) -> Branch:
        """Encode a dialogue about an image that is processed already."""
        (first, _), *_ = exchanges
        contents = [{"image": PLACEHOLDER, "text": first}, *(prompt for prompt, _ in exchanges[1:])]
        turns = []
        for content, (_, answer) in zip(contents, exchanges, strict=True):
            turns += [Turn("user", Content.of(content)), Turn("assistant", Content.of(answer))]
        messages = dialogue_messages(Dialogue(tuple(turns)), self.chat_processor.prompts)
        return self.chat_processor.encode_dialogue(messages, processed)


def draw_scene(world: World, rng: Random, name: str, singles: float) -> Scene:
    """Draw a training scene: a single drawing for a part of them, otherwise one to four."""
    if rng.random() < singles:
        concept = rng.choice(world.concepts)
        return single(name, rng, concept, rng.choice(world.hands[concept]), world.variants + 1)
    concepts = draw_concepts(rng, world.concepts, world.partners, rng.randint(1, 4))
    return compose(name, rng, concepts, world.hands, world.variants + 1)


def make_base(directory: Path, packages: Path, concepts: Sequence[Concept], config: BaseConfig) -> None:
    """Make the base from nothing, in stages that are not repeated once they are done.

    Args:
        directory: gets the checkpoint; its folder `stages` keeps what an interrupted training resumes from.
        packages: the archives of drawings and words.
        concepts: all of them.
        config: what to make.
    """
    if (directory / RECORD).is_file():
        return
    stages = directory / "stages"
    stages.mkdir(parents=True, exist_ok=True)
    processor = make_processor(corpus(concepts), config.model)
    torch.manual_seed(config.seed)
    model = make_model(processor, config.model)
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    tower = model.model.vision_tower
    if not (stages / "tower.safetensors").is_file():
        make_tower(tower, stages, packages, concepts, config)
    tower.load_state_dict(load_file(stages / "tower.safetensors"))
    world = make_world(packages, concepts, config.variants)
    if not (stages / STATE).is_file():
        align(model, processor.tokenizer, world, config)
    train_base(model, ChatProcessor(processor, PROMPTS), world, config, directory)


def train_further(base: Path, directory: Path, packages: Path, concepts: Sequence[Concept], config: BaseConfig) -> None:
    """Train the base for another fifth of its steps, on new lessons: what has converged hardly changes.

    Args:
        base: its checkpoint.
        directory: gets the checkpoint of what comes of it.
        packages: the archives of drawings and words.
        concepts: all of them.
        config: what the base was made by.
    """
    if (directory / RECORD).is_file():
        return
    (directory / "stages").mkdir(parents=True, exist_ok=True)
    model = Cafe.load(str(base))
    further = replace(
        config,
        steps=max(1, config.steps // 5),
        learning_rate=config.learning_rate / 5,
        singles_until=0.0,
        few_at_first=(),
        seed=config.seed + 1,
    )
    world = make_world(packages, concepts, config.variants)
    train_base(model.lvlm, model.chat_processor, world, further, directory)


def make_tower(tower: nn.Module, stages: Path, packages: Path, concepts: Sequence[Concept], config: BaseConfig) -> None:
    """Train a teacher on all drawings by the training hands but those of unseen concepts, and the tower by it."""
    seen = [concept for concept in concepts if concept.seen]
    shown = [*seen, *read_others(packages, concepts)]
    drawings = draw_variants(packages, shown, config.tower_variants)
    pixels, labels = to_tensors(drawings, [concept.name for concept in shown])
    if (stages / "teacher.safetensors").is_file():
        teacher = Teacher(len(shown)).eval().requires_grad_(False)
        teacher.load_state_dict(load_file(stages / "teacher.safetensors"))
    else:
        batches = Batches(pixels, labels, config.teacher_batch, config.seed)
        teacher = train_teacher(batches, len(shown), config.teacher_steps)
        _save(teacher, stages / "teacher.safetensors")
    torch.manual_seed(config.seed)  # whether the teacher was trained now or before
    train_tower(tower, teacher, Batches(pixels, labels, config.tower_batch, config.seed + 1), config.tower_steps)
    _save(tower, stages / "tower.safetensors")


def to_tensors(
    drawings: Drawings, names: Sequence[str]
) -> tuple[UInt8[Tensor, "drawings variants 4 side side"], Int64[Tensor, " drawings"]]:
    """Stack drawings with their variants, and number each by its name."""
    numbers = {name: number for number, name in enumerate(names)}
    pixels = torch.from_numpy(np.stack(list(drawings.values()))).permute(0, 1, 4, 2, 3)
    return pixels, torch.tensor([numbers[name] for _, name in drawings])


def align(model: LlavaOnevisionForConditionalGeneration, tokenizer: Any, world: World, config: BaseConfig) -> None:
    """Train the projector to turn a drawing into the words of its name, as the language model embeds them.

    What finds a word among words then finds it among the tokens of an image too.
    """
    names = torch.zeros(len(world.concepts), len(tokenizer))
    for number, name in enumerate(world.concepts):
        tokens = tokenizer(f" {name}", add_special_tokens=False).input_ids
        names[number, tokens] = 1 / len(set(tokens))
    pixels, labels = to_tensors(world.drawings, world.concepts)
    batches = Batches(pixels, labels, config.tower_batch, config.seed + 2)
    tower, language_model = model.model.vision_tower, model.model.language_model
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW([*projector.parameters(), *language_model.embed_tokens.parameters()], lr=2e-3)
    scheduler = make_scheduler(optimizer, config.align_steps)
    progress = tqdm(range(config.align_steps), desc="align", unit="step", mininterval=5)
    for _ in progress:
        images, shares = batches.draw_mixed(len(world.concepts))
        with torch.no_grad():
            features = tower(pixel_values=images, output_hidden_states=True).hidden_states[-1]
        words = language_model.norm(projector(features).mean(dim=1))
        loss = F.cross_entropy(model.lm_head(words), shares @ names)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _save(module: nn.Module, path: Path) -> None:
    """Write a module's weights, complete or not at all."""
    atomic_write_bytes(path, save({name: tensor.contiguous() for name, tensor in module.state_dict().items()}))


def train_base(
    model: LlavaOnevisionForConditionalGeneration,
    chat_processor: ChatProcessor,
    world: World,
    config: BaseConfig,
    directory: Path,
    workers: int = 1,
) -> None:
    """Train the language model on lessons, and write the checkpoint; an interrupted training resumes."""
    # The tower keeps what its teacher taught it: what it would learn here is this hand or that.
    model.model.vision_tower.requires_grad_(False)
    optimizer = make_optimizer([model], config.learning_rate, config.weight_decay)
    scheduler = make_scheduler(optimizer, config.steps)
    noisy = model.model.multi_modal_projector.register_forward_pre_hook(partial(_add_noise, config.noise))
    trained = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    state = directory / "stages" / STATE
    first, losses = _resume(state, trained)
    lessons = Lessons(chat_processor, world, config)
    stream: Iterator[dict[str, PackedBatch]] = iter(make_loader(lessons, range(first, config.steps), workers))
    progress = tqdm(range(first, config.steps), "base", config.steps, initial=first, unit="step", mininterval=5)
    for step in progress:
        torch.manual_seed(config.seed * config.steps + step)  # of the noise, which a resumed training repeats
        # Each kind has the same weight: an answer of one word is not lost among descriptions.
        for kind, loss in train_step(model, next(stream), optimizer, scheduler).items():
            losses.setdefault(kind, []).append(loss)
        progress.set_postfix({kind: f"{np.mean(values[-25:]):.4f}" for kind, values in losses.items()}, refresh=False)
        if (step + 1) % SAVE_EVERY == 0:
            _save_state(state, step + 1, losses, trained)
    noisy.remove()
    model.requires_grad_(True)
    model.save_pretrained(directory)
    chat_processor.save(directory)
    record = {**asdict(config), "loss": {kind: float(np.mean(values[-25:])) for kind, values in losses.items()}}
    atomic_write_text(directory / RECORD, json.dumps(record, indent=2) + "\n")


def _add_noise(noise: float, projector: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Add noise to the features that the projector gets: of each crop its own amount, up to twice the mean."""
    features, *others = inputs
    scale = features.detach().std(dim=tuple(range(features.dim() - 1)), keepdim=True)
    amount = 2 * noise * torch.rand(len(features), *[1] * (features.dim() - 1), device=features.device)
    return (features + amount * scale * torch.randn_like(features), *others)


def _save_state(path: Path, step: int, losses: dict[str, list[float]], trained: dict[str, Any]) -> None:
    """Write what the training resumes from, complete or not at all."""
    states = {name: part.state_dict() for name, part in trained.items()}
    buffer = io.BytesIO()
    torch.save({"step": step, "losses": losses, **states}, buffer)
    atomic_write_bytes(path, buffer.getvalue())


def _resume(path: Path, trained: dict[str, Any]) -> tuple[int, dict[str, list[float]]]:
    """Load the state of an interrupted training, if there is one; return its next step and the losses so far."""
    if not path.is_file():
        return 0, {}
    state = torch.load(path, weights_only=True)
    for name, part in trained.items():
        part.load_state_dict(state[name])
    return state["step"], state["losses"]
