"""Jobs for an engine, and what becomes of them."""

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from model_samples import SMALL, TALL, WIDE, noise_image
from PIL import Image

from cafe.content import Content, Dialogue, Turn
from cafe.lvlm.prompts import dialogue_messages
from cafe.model import Cafe
from cafe.packing import Branch
from cafe.serving.config import EngineConfig, RequestLimits
from cafe.serving.encoding import JobEncoder
from cafe.serving.engine import Engine
from cafe.serving.image_workers import ImageWorkers
from cafe.serving.jobs import ChatJob, EmbedJob, Piece, Sampling

TIMEOUT = 60.0  # seconds until a test gives up


def png(image: Image.Image) -> bytes:
    """Write an image as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# Of several sizes; contents name them by their bytes, as requests do.
IMAGES = [png(SMALL), png(WIDE), png(TALL), png(noise_image(4, 40, 40))]


def contents(model: Cafe) -> list[Content]:
    """Return contents of any length, with images, several images and text alone, if the model reads text alone."""
    made = [
        Content.of([IMAGES[0], "What is it?"]),
        Content.of([IMAGES[1], "And this? " * 6]),
        Content.of([IMAGES[0], IMAGES[2], "Which one?"]),
        Content.of([IMAGES[0], "Another question about the first."]),
        Content.of(["between ", IMAGES[3], " words"]),
    ]
    if not model.chat_processor.prefix_lm:
        made += [Content.of("a short text"), Content.of("a long text, " * 12)]
    return made


class Jobs:
    """Make jobs for a model, as requests do: the same image is the same tensors in all of them."""

    def __init__(self, model: Cafe, **limits: Any) -> None:
        images = ImageWorkers(model.chat_processor, num_workers=0)
        self.encoder = JobEncoder(model.chat_processor.with_images(images), RequestLimits(**limits))

    def embed(self, *parts: Any) -> EmbedJob:
        """Make a job that embeds a content."""
        return self.encoder.embedding(Content.of(list(parts)))

    def chat(self, *parts: Any, max_tokens: int = 8, **sampling: Any) -> "Chat":
        """Make a job that answers a user's turn."""
        content = Content.of(list(parts))
        messages = dialogue_messages(Dialogue((Turn("user", content),)), self.encoder.chat_processor.prompts)
        pieces: list[Piece] = []
        options = {"sampling": Sampling(max_tokens=max_tokens, **sampling), "on_piece": pieces.append}
        return Chat(self.encoder.chat(messages, content.images, **options), pieces)


class Chat:
    """A chat's job, and the pieces of its answer."""

    def __init__(self, job: ChatJob, pieces: list[Piece]) -> None:
        self.job, self.pieces = job, pieces

    @property
    def text(self) -> str:
        """Return the answer so far."""
        return "".join(piece.text for piece in self.pieces)

    def answer(self) -> str:
        """Wait for the whole answer."""
        reason = self.job.future.result(TIMEOUT)
        assert [piece.finish_reason for piece in self.pieces] == [None] * (len(self.pieces) - 1) + [reason]
        return self.text


@contextmanager
def running(model: Cafe, **config: Any) -> Iterator[Engine]:
    """Run an engine, and stop it at the end."""
    engine = Engine(model, EngineConfig(**config))
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(0.0)


def wait_until(condition: Callable[[], Any]) -> None:
    """Wait until something is so."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def answer_alone(model: Cafe, chat: Chat) -> str:
    """Answer a chat by transformers' `generate`, alone."""
    return model._generate([chat.job.branch], max_new_tokens=chat.job.sampling.max_tokens, do_sample=False)[0]


def poison(model: Cafe, character: str) -> None:
    """Let the model read a character as NaN."""
    [token] = model.chat_processor.tokenizer(character, add_special_tokens=False)["input_ids"]

    def spoil(module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """Replace the embeddings of the token."""
        return output.masked_fill((args[0] == token)[..., None], torch.nan)

    model.lvlm.get_input_embeddings().register_forward_hook(spoil)


def never_ending(model: Cafe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no token end an answer."""
    monkeypatch.setattr(model.lvlm.generation_config, "eos_token_id", None)


def end_thread(*args: Any, **kwargs: Any) -> None:
    """Exit, as nothing in a step should."""
    raise SystemExit


def break_something(*args: Any, **kwargs: Any) -> None:
    """Raise an error that nobody expects."""
    raise KeyError("a bug")


@cache
def text_branch(length: int, token: int = 40) -> Branch:
    """Return a branch of one word, said over and over."""
    none = torch.zeros(length, dtype=torch.bool)
    return Branch(torch.full((length,), token), none, none)
