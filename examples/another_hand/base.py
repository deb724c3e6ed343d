"""Train the base: a small LLaVA-OneVision from scratch, with the language-modeling loss alone.

Two stages, as real LVLMs are made. The vision tower first learns single drawings, under a linear layer over their names
that is thrown away; then tower and language model learn together to name, to choose, to find and to describe.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
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

from another_hand.scenes import CELL, Scene, compose, draw_concepts, paint, single
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
from another_hand.world import World
from cafe.content import Content, Dialogue, Turn
from cafe.losses import linear_cross_entropy
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.loading import without_video
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import CHATML, Prompts, dialogue_messages
from cafe.packing import Branch, PackedBatch, PackingConfig, pack
from cafe.training.muon import Muon, hidden_weight_names
from cafe.utils.dataloader import make_loader

PROMPTS = Prompts(chat_template="chatml")
PATCH = 16  # pixels
VOCABULARY = 1200


@dataclass(frozen=True)
class BaseConfig:
    """Configure the base and its training. The values were chosen on the development hand."""

    width: int = 160
    vision_layers: int = 4
    text_layers: int = 4
    tower_steps: int = 1200
    tower_batch: int = 256
    tower_learning_rate: float = 4e-3
    steps: int = 900
    batch: int = 40
    singles: float = 0.3  # of the images
    learning_rate: float = 1.5e-3
    seed: int = 0


def make_processor(texts: Iterator[str]) -> LlavaOnevisionProcessor:
    """Make a LLaVA-OneVision processor whose byte-level BPE tokenizer is trained on the texts.

    A scene is encoded as a thumbnail and its four cells, as LLaVA's anyres cuts it; a single drawing fills one cell.
    """
    # Byte-level, so that any text can be encoded although the corpus is tiny.
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # The first one pads, the next two frame turns (ChatML), and the last two stand for images and videos.
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
        size={"height": CELL, "width": CELL},
        image_grid_pinpoints=[[CELL, CELL], [2 * CELL, 2 * CELL]],
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return without_video(LlavaOnevisionProcessor)(
        image_processor=image_processor,
        tokenizer=tokenizer,
        num_image_tokens=(CELL // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHATML,
    )


def make_model(processor: LlavaOnevisionProcessor, config: BaseConfig) -> LlavaOnevisionForConditionalGeneration:
    """Make the untrained model."""
    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        image_size=CELL,
        patch_size=PATCH,
        hidden_size=config.width,
        intermediate_size=2 * config.width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=4,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=3 * config.width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=config.width**-0.5,  # the usual 0.02 is for wide models: attention would start out uniform
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )
    # Each layer starts as the identity: what its attention and its MLP add to the residual stream is 0 at first.
    for path, parameter in model.named_parameters():
        if path.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            nn.init.zeros_(parameter)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def whiten(embedding: nn.Conv2d, images: Tensor) -> None:
    """Let the patch embedding start with the principal components of patches, all of the same variance.

    Neighboring pixels are alike, so random weights see mostly the mean color of a patch; these see shapes from the start.
    """
    patches = F.unfold(images, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    patches = patches - patches.mean(dim=0)
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    variances, components = variances.flip(0), components.flip(1)[:, : embedding.out_channels]
    scales = (variances[: embedding.out_channels] + 1e-3 * variances[0]).rsqrt() / 2
    with torch.no_grad():
        embedding.weight.copy_((components * scales).T.view_as(embedding.weight))
        nn.init.zeros_(embedding.bias)


def make_optimizer(modules: Sequence[nn.Module], learning_rate: float) -> Muon:
    """Make the optimizer: Muon for the matrices inside the layers, AdamW for the rest."""
    matrices, others = [], []
    for module in modules:
        inner = hidden_weight_names(module)
        for path, parameter in module.named_parameters():
            (matrices if path in inner else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": 2 * learning_rate, "orthogonal": True},
        {"params": others},
    ]
    return Muon(groups, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)


def schedule(optimizer: Muon, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up over 50 steps, and let the learning rate fall to a fiftieth along half a cosine."""

    def factor(step: int) -> float:
        """Return the lower of the two curves."""
        cosine = 1 + math.cos(math.pi * min(1, step / steps))  # from 2 down to 0
        return min((step + 1) / 50, 0.02 + 0.49 * cosine)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_tower(model: LlavaOnevisionForConditionalGeneration, world: World, config: BaseConfig) -> None:
    """Train the vision tower to tell the single drawings' concepts apart."""
    tower = model.model.vision_tower
    numbers = {concept: number for number, concept in enumerate(world.concepts)}
    keys = list(world.drawings)
    pixels = torch.from_numpy(
        np.stack([world.drawings[key] for key in keys])
    )  # (drawings, variants + 1, side, side, 4)
    labels = torch.tensor([numbers[concept] for _, concept in keys])
    generator = torch.Generator().manual_seed(config.seed)
    head = nn.Linear(config.width, len(world.concepts))

    def draw_batch(size: int) -> tuple[Tensor, Tensor]:
        """Draw variants on pastel grounds, with their labels."""
        which = torch.randint(len(keys), (size,), generator=generator)
        variant = torch.randint(pixels.shape[1], (size,), generator=generator)
        chosen = pixels[which, variant].permute(0, 3, 1, 2).float() / 255
        grounds = 1 - 0.22 * torch.rand(size, 3, 1, 1, generator=generator)
        images = chosen[:, :3] * chosen[:, 3:] + grounds * (1 - chosen[:, 3:])
        return 2 * images - 1, labels[which]

    whiten(tower.get_submodule(_patch_embedding_name(tower)), draw_batch(4000)[0])
    optimizer = make_optimizer([tower, head], config.tower_learning_rate)
    rates = schedule(optimizer, config.tower_steps)
    progress = tqdm(range(config.tower_steps), desc="tower", unit="step", mininterval=5)
    for _ in progress:
        images, right = draw_batch(config.tower_batch)
        features = tower(pixel_values=images).last_hidden_state.mean(dim=1)
        loss = F.cross_entropy(head(features), right, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _patch_embedding_name(tower: nn.Module) -> str:
    """Find the tower's only convolution."""
    (name,) = [name for name, module in tower.named_modules() if isinstance(module, nn.Conv2d)]
    return name


def lessons(scene: Scene, world: World, rng: Random) -> list[Exchange]:
    """Make exchanges about a scene, each a dialogue of its own, so that no answer can be copied from an earlier one.

    As many questions about presence are to be answered yes as no, and what is absent is drawn as what is present is:
    otherwise the model learns which concepts are frequent, and not to look.
    """
    shown = scene.concepts
    one = rng.choice(shown)
    others = []
    for _ in range(3):
        others.append(absent(scene, world.subgroups, [c for c in world.concepts if c not in others], rng))
    exchanges = [choice(one, list(dict.fromkeys(others)), rng)]
    exchanges.append((presence(rng.choice(shown)), "yes"))
    exchanges.append((presence(absent(scene, world.subgroups, world.concepts, rng)), "no"))
    if scene.single:
        return [*exchanges, (NAME, one), (GROUP, world.groups[one])]
    exchanges += [(DESCRIBE, description(scene)), place(scene, rng)]
    if rng.random() < 0.25:
        exchanges.append((COUNT, NUMBERS[len(shown)]))
    return exchanges


class Lessons(Dataset[PackedBatch]):
    """Make the packed batch of each step from one seed: every image once, followed by all dialogues about it."""

    def __init__(self, chat_processor: ChatProcessor, world: World, config: BaseConfig) -> None:
        self.chat_processor, self.world, self.config = chat_processor, world, config
        self.packing = PackingConfig(max_row_tokens=320)

    def __getitem__(self, step: int) -> PackedBatch:
        first = step * self.config.batch
        branches = []
        for number in range(first, first + self.config.batch):
            rng = Random(f"lesson {self.config.seed} {number}")
            scene = draw_scene(self.world, rng, f"base-{number}", self.config.singles)
            processed = self.chat_processor.process_images([paint(scene, self.world.drawings)])
            branches.append([self._encode(exchange, processed) for exchange in lessons(scene, self.world, rng)])
        no_embeddings: list[list[Branch]] = [[]] * len(branches)
        return pack(no_embeddings, branches, self.packing)

    def _encode(self, exchange: Exchange, processed: Any) -> Branch:
        """Encode an exchange about an image that is processed already."""
        prompt, answer = exchange
        image = _PLACEHOLDER
        user = Turn("user", Content.of({"image": image, "text": prompt}))
        dialogue = Dialogue((user, Turn("assistant", Content.of(answer))))
        return self.chat_processor.encode_dialogue(dialogue_messages(dialogue, self.chat_processor.prompts), processed)


_PLACEHOLDER = "image.png"  # stands for an image that is processed apart


def draw_scene(world: World, rng: Random, name: str, singles: float) -> Scene:
    """Draw a training scene: a single drawing for a part of them, otherwise one to four."""
    if rng.random() < singles:
        concept = rng.choice(world.concepts)
        return single(name, rng, concept, rng.choice(world.hands[concept]), world.variants + 1)
    concepts = draw_concepts(rng, world.concepts, world.partners, rng.randint(1, 4))
    return compose(name, rng, concepts, world.hands, world.variants + 1)


def train_base(
    model: LlavaOnevisionForConditionalGeneration,
    chat_processor: ChatProcessor,
    world: World,
    config: BaseConfig,
    directory: Path,
    workers: int = 1,
) -> None:
    """Train the language model and the tower on lessons, and write the checkpoint."""
    optimizer = make_optimizer([model], config.learning_rate)
    rates = schedule(optimizer, config.steps)
    stream: Iterator[PackedBatch] = iter(
        make_loader(Lessons(chat_processor, world, config), range(config.steps), workers)
    )
    losses: list[float] = []
    progress = tqdm(range(config.steps), desc="base", unit="step", mininterval=5)
    for _ in progress:
        batch = next(stream)
        _, hidden = forward_packed(model, batch)
        loss = linear_cross_entropy(hidden, batch.labels, model.lm_head.weight) / len(batch.labels)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{np.mean(losses[-25:]):.4f}", refresh=False)
    model.save_pretrained(directory)
    chat_processor.save(directory)
    record = {**asdict(config), "loss": float(np.mean(losses[-25:]))}
    (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")
