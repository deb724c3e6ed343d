"""Models of every family, contents and records for them, and what plain transformers makes of these."""

from dataclasses import dataclass
from random import Random

import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cafe.content import Content, Dialogue, Example, Pair, Turn
from cafe.data.encoding import encode_example
from cafe.data.source import Source
from cafe.model import Cafe
from cafe.packing import Branch
from cafe.training.recipe import ObjectiveConfig

PREFIX_LMS = ["paligemma", "paligemma2"]
# Sliding windows, linear attention, or both ways.
READ_ONE_BY_ONE = {"gemma3", "gemma4", "paligemma", "paligemma2", "qwen3_5", "aya_vision"}


def make(family: str) -> Cafe:
    try:
        return families.FAMILIES[family]()
    except ImportError as error:
        pytest.skip(str(error))


def noise_image(seed: int, width: int = 48, height: int = 32) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST)


SMALL, WIDE, TALL = noise_image(1), noise_image(2, 64, 32), noise_image(3, 32, 64)
CONTENTS = {
    "text": "a red circle left of it",
    "image": [SMALL],
    "image and text": [WIDE, "what is left of it?"],
    "several images": [SMALL, TALL],
    "interleaved": ["first ", WIDE, " and then ", SMALL, ": which one?"],
}


def chat(*said: str | Content) -> Dialogue:
    roles = ("user", "assistant")
    return Dialogue(tuple(Turn(roles[index % 2], Content.of(words)) for index, words in enumerate(said)))


@dataclass
class Listed:
    """Records in memory."""

    examples: list[Example]
    source = Source(path="")

    @property
    def chunks(self) -> list[int]:
        return [len(self.examples)]

    def example(self, index: int, rng: Random) -> Example:
        return self.examples[index]


def examples() -> list[Example]:
    """Examples of every kind: with hard negatives, without dialogue, without target, with several turns."""
    small, wide, both = Content.of(SMALL), Content.of([WIDE, "the left one"]), Content.of([TALL, " or ", SMALL])
    asked = Content((*small.parts, "What is it?"))
    return [
        Example(
            Pair(small, Content.of("a red circle"), (Content.of("a blue circle"), Content.of([TALL, "it"]))),
            chat(asked, "a circle", "What color?", "red"),
            "one",
        ),
        Example(Pair(Content.of("two squares"), both), None, "two"),
        Example(None, chat(wide, "a square"), "three"),
        Example(Pair(wide, Content.of("a square"), (small,)), chat("Say something.", "something"), "four"),
    ]


def plain_read(model: Cafe, branch: Branch) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden state of a branch and its logits, by plain calls."""
    ids = branch.input_ids[None]
    inputs = {
        name: value.double() if value.is_floating_point() else value for name, value in branch.image_inputs.items()
    }
    for name in model.chat_processor.token_type_fns:
        marked = ids == model.lvlm.config.image_token_id
        inputs[name] = (branch.loss_mask[None].cummax(1)[0] if model.chat_processor.prefix_lm else marked).int()
    hidden = model.lvlm.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).last_hidden_state[0]
    return hidden, model.lvlm(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]


def plain_losses(model: Cafe, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses, written from the paper."""
    encoded = [encode_example(example, model.chat_processor) for example in examples()]
    pairs = [one for one in encoded if one.query]
    embed = lambda rows: F.normalize(torch.stack([plain_read(model, row)[0][-1] for row in rows]), dim=-1)  # noqa: E731
    queries, targets = embed([one.query for one in pairs]), embed([one.target for one in pairs])
    hard = embed([row for one in pairs for row in one.negatives])
    matches = torch.arange(len(pairs))
    to_target = F.cross_entropy(queries @ torch.cat([targets, hard]).T / objective.temperature, matches)
    contrastive = (to_target + F.cross_entropy(targets @ queries.T / objective.temperature, matches)) / 2
    said, labels = [], []
    for row in [one.dialogue for one in encoded if one.dialogue]:
        said.append(plain_read(model, row)[1][:-1][row.loss_mask[1:]])
        labels.append(row.input_ids[1:][row.loss_mask[1:]])
    return F.cross_entropy(torch.cat(said), torch.cat(labels)), contrastive


def gradient(model: Cafe) -> torch.Tensor:
    parameters = model.lvlm.parameters()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).double()
