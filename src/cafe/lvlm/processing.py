"""Tokenizer + image processor + chat template in, model inputs out.

A chat is rendered to text by its template, cut at the image placeholders and where the assistant begins and ends to
speak, and each piece is tokenized by itself. So a prompt has the same tokens in training and in use, which tokens are
supervised is known exactly, and a picture is processed once for all branches that show it.

Processors that declare a video processor are loaded without it: transformers cannot construct it without torchvision,
and with it wants settings for videos that a checkpoint may not have. The files written are the family's standard ones.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, BatchFeature, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from cafe.content import ImageRef
from cafe.errors import CafeError, RecordError
from cafe.images.decoding import decode_image
from cafe.images.resizing import use_torch_resize
from cafe.lvlm.prompts import CHATML, PREFIX_LM, Message, Prompts
from cafe.packing import Branch, TokenTypeFn, collate_vision, image_token_type_ids, prefix_lm_token_type_ids


class _VideoDropped(ProcessorMixin):
    """What a processor class without video hands its parts to."""

    def __init__(self, *args: Any, video_processor: None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same processor class with its video part left out, under the same name, so that it saves the same files."""

    class WithoutVideo(processor_class, _VideoDropped):
        apply_chat_template = ProcessorMixin.apply_chat_template  # SmolVLM's own asks its video processor

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in processor_class.get_attributes() if "video" not in name]

        @classmethod
        def from_args_and_dict(cls, args: list[Any], *rest: Any, **kwargs: Any) -> ProcessorMixin:
            parts = dict(zip(cls.get_attributes(), args, strict=True))
            places = [parts.get(name) for name in processor_class.get_attributes()]  # some classes insist on all
            return super().from_args_and_dict(places, *rest, **kwargs)

    WithoutVideo.__name__ = processor_class.__name__
    return WithoutVideo


def load_processor(path: str, family: str = "") -> ProcessorMixin:
    """The processor of a local directory or Hub id.

    Args:
        path: where it is.
        family: the model's type, where no model is beside it.

    Raises:
        CafeError: the model's family has no processor.
    """
    family = family or AutoConfig.from_pretrained(path).model_type
    if family not in PROCESSOR_MAPPING_NAMES:
        raise CafeError(f"{path} is a {family} model, for which transformers knows no processor of images and text.")
    return without_video(processor_class_from_name(PROCESSOR_MAPPING_NAMES[family])).from_pretrained(path)


Key = TypeVar("Key")
Value = TypeVar("Value")
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # the names of inputs that mark tokens in some families
MAX_MEMOIZED = 4096  # texts whose tokens are kept, and chats whose prompts are
_LARGE_SIDE = 1024  # pixels of a side; a family that sees them all may see more of a larger picture
_EMPTY_ANSWER: Message = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
_SENTINEL = (
    "\ue000words\ue000"  # stands for the assistant's words where the template is asked what it writes around them
)
_ASSISTANT_PROBE: Message = {"role": "assistant", "content": [{"type": "text", "text": _SENTINEL}]}
_USER_PROBE: Message = {"role": "user", "content": [{"type": "text", "text": _SENTINEL}]}


@dataclass(frozen=True)
class ProcessedImages:
    """The processed images of one content: the token run that stands for each, and the model's inputs for all."""

    token_runs: list[list[int]]
    inputs: dict[str, Tensor]


def memoize(before: dict[Key, Value], key: Key, make: Callable[[], Value]) -> Value:
    """What was made of a key before, or else now: frames and instructions are the same in every prompt."""
    if key not in before:
        if len(before) >= MAX_MEMOIZED:
            before.clear()
        before[key] = make()
    return before[key]


class ChatProcessor:
    """Turns chats and pictures into token sequences, and sequences into batches.

    Args:
        processor: the family's processor.
        prompts: how content becomes a prompt; its `chat_template` decides which template renders.
    """

    def __init__(self, processor: ProcessorMixin, prompts: Prompts) -> None:
        self.processor = processor
        self.prompts = prompts
        self.tokenizer = processor.tokenizer
        use_torch_resize(getattr(processor, "image_processor", None))
        self._known_tokens: dict[str, list[int]] = {}
        self._known_prompts: dict[tuple[str, bool], str] = {}
        tokens = [getattr(processor, name, None) for name in ("image_token", "boi_token")]
        placeholders: list[str] = [*filter(None, tokens), "<image>"]
        if prompts.chat_template == "chatml":
            self.processor.chat_template = self.tokenizer.chat_template = CHATML.replace("<image>", placeholders[0])
        name = type(processor).__name__
        self.prefix_lm = name in PREFIX_LM
        self._template = None if processor.chat_template else PREFIX_LM.get(name)
        picture: list[Message] = [{"role": "user", "content": [{"type": "image"}]}]
        load_images = self._render(picture, False) if processor.chat_template or self._template else ""
        self.placeholder = next((token for token in placeholders if token in load_images), "")  # stands for a picture
        if not self.placeholder:
            raise CafeError(
                f"This {name} has no chat template that shows pictures: set prompts.chat_template to chatml."
            )
        special = sorted({*self.tokenizer.all_special_tokens, self.placeholder, *self._added()}, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(token) for token in special))
        self._assistant_prefix, self._assistant_suffix = self._assistant_frame()
        # A part of a picture may be another token than the placeholder (Gemma 3, Aya): it is the most frequent mark.
        probe, marks = self._process([Image.new("RGB", (64, 64))]), self.tokenizer.added_tokens_decoder
        [(self.image_token_id, _)] = Counter(t for t in probe["input_ids"][0].tolist() if t in marks).most_common(1)
        marking = [name for name in TOKEN_TYPES if name in probe and probe[name].any()]
        self.token_type_fns: dict[str, TokenTypeFn] = {name: image_token_type_ids for name in marking[:1]}
        if self.prefix_lm:
            self.token_type_fns = {"token_type_ids": prefix_lm_token_type_ids}

    def _added(self) -> list[str]:
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def save(self, directory: Path) -> None:
        """Writes the family's standard processor files."""
        self.processor.save_pretrained(directory)

    def process_images(self, images: Sequence[Image.Image]) -> ProcessedImages:
        """Processes the images of one content together, as the family does for one prompt."""
        if not images:
            return ProcessedImages([], {})
        batch, between = self._process(images), self.tokenizer.eos_token_id
        runs: list[list[int]] = [[]]
        for token in batch.pop("input_ids")[0].tolist():
            if token == between:
                runs.append([])
            else:
                runs[-1].append(token)
        if self.prefix_lm:  # behind the last picture its processor begins and ends a text
            runs = [[token for token in run if token == self.image_token_id] for run in runs]
        per_token = ("attention_mask", "labels", *TOKEN_TYPES)
        return ProcessedImages(runs, {name: value for name, value in batch.items() if name not in per_token})

    def load_images(self, refs: Sequence[ImageRef]) -> ProcessedImages:
        """Decodes and processes the images of one content."""
        return self.process_images(self.decode_images(refs))

    def decode_images(self, refs: Sequence[ImageRef]) -> list[Image.Image]:
        """Opens images, large JPEGs no larger than the family's processor can tell."""
        return [decode_image(ref, enough=self.min_decode_side) for ref in refs]

    @cached_property
    def min_decode_side(self) -> int | None:
        """How many pixels a decoded side needs: twice as many as the model sees of a large square; None for all."""
        vision = self.process_images([Image.new("RGB", (_LARGE_SIDE, _LARGE_SIDE))]).inputs
        seen = vision["pixel_values"].numel() // 3
        return 2 * math.ceil(math.sqrt(seen)) if seen < _LARGE_SIDE**2 else None

    def _process(self, images: Sequence[Image.Image]) -> BatchFeature:
        """What the family makes of a prompt that shows images alone.

        Raises:
            RecordError: it takes no such picture.
        """
        # A special token between the placeholders keeps the runs apart whatever the family writes into them.
        text = self.tokenizer.eos_token.join([self.placeholder] * len(images))
        try:
            # Nested because some families (LLaVA-OneVision) treat several images of one prompt otherwise.
            return self.processor(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False)
        except ValueError as error:  # Qwen's: one side is more than 200 times as long as the other
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            name = type(self.processor).__name__
            raise RecordError(f"The {name} takes no picture of {sizes} pixels: {error}.") from error

    def encode_embedding(
        self, messages: list[Message], pictures: ProcessedImages, max_tokens: int | None = None
    ) -> Branch:
        """The branch whose last token is the readout.

        Where it is too long, tokens are cut from the end of the content, never from the instruction and the prompt
        frame behind it and never from an image.
        """
        text = self._embedding_text(messages)
        pieces = self._split(text, iter(pictures.token_runs))
        if max_tokens and sum(map(len, pieces)) > max_tokens:
            instruction = messages[-1]["content"][-1]["text"] if self.prompts.mode == "compress" else ""
            frame = self._embedding_text([*messages[:-1], _USER_PROBE]).rpartition(_SENTINEL)[2]
            content = text.removesuffix(instruction + frame)
            pieces, tail = self._split(content, iter(pictures.token_runs)), self._tokens(instruction + frame)
            kept = len(pieces[-1]) - (sum(map(len, pieces)) + len(tail) - max_tokens)
            pieces = [*pieces[:-1], pieces[-1][: max(kept, 0)], tail]
            if kept < 0 or content == text:
                raise RecordError(
                    f"An embedding prompt of {sum(map(len, pieces))} tokens cannot be cut to {max_tokens}."
                )
        return self._join([(piece, False) for piece in pieces], pictures)

    def _embedding_text(self, messages: list[Message]) -> str:
        """The prompt whose last token is the readout."""
        if self.prompts.assistant_frame == "closed":
            return self._render([*messages, _EMPTY_ANSWER], False).rstrip()
        return self._render(messages, True)

    def encode_dialogue(
        self, messages: list[Message], pictures: ProcessedImages, max_tokens: int | None = None
    ) -> Branch:
        """A whole dialogue; what the assistant says is supervised, together with the token that ends its turn."""
        runs = iter(pictures.token_runs)
        pieces: list[tuple[list[int], bool]] = []
        said = [_ASSISTANT_PROBE if message["role"] == "assistant" else message for message in messages]
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(said[:index], True).rpartition(_SENTINEL)[2]
                words = "".join(part["text"] for part in self._escape_special_tokens([message])[0]["content"])
                pieces += [
                    (piece, False)
                    for piece in self._split(prompt.removeprefix(self._assistant_suffix if pieces else ""), runs)
                ]
                pieces.append((self._tokens(self._assistant_prefix + words + self._assistant_suffix), True))
        encoded = self._join(pieces, pictures)
        if max_tokens and len(encoded.input_ids) > max_tokens:
            if encoded.image_mask[max_tokens:].any():
                end = int(encoded.image_mask.nonzero()[-1]) + 1
                raise RecordError(f"The last image of a dialogue ends at token {end}, and {max_tokens} are read.")
            encoded = encoded.truncate(max_tokens)
        return encoded

    def encode_prompt(self, messages: list[Message], pictures: ProcessedImages) -> Branch:
        """A dialogue up to where the assistant begins to speak."""
        text = self._render(messages, True)
        return self._join([(piece, False) for piece in self._split(text, iter(pictures.token_runs))], pictures)

    def collate(self, rows: Sequence[Branch], left: bool = False) -> dict[str, Tensor]:
        """Model inputs of several sequences: input_ids and attention_mask (rows, tokens), and the vision tensors.

        Rows are padded on the right, or on the left for generation.
        """

        def padded(of_rows: list[Tensor], value: int = 0) -> Tensor:
            side = "left" if left else "right"
            return pad_sequence(of_rows, batch_first=True, padding_value=value, padding_side=side)

        return {
            "input_ids": padded([row.input_ids for row in rows], self.tokenizer.pad_token_id or 0),
            "attention_mask": padded([torch.ones_like(row.input_ids) for row in rows]),
            **{name: padded([types(row) for row in rows]) for name, types in self.token_type_fns.items()},
            **collate_vision([row.image_inputs for row in rows]),
        }

    def _assistant_frame(self) -> tuple[str, str]:
        """What the template writes right before the assistant's words, behind the prompt, and right after them.

        Where it does not end the assistant's turn, the end-of-sequence token does.
        """
        asked: list[Message] = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        prompt = self._render(asked, True)
        until, _, end = self._render([*asked, _ASSISTANT_PROBE], False).partition(_SENTINEL)
        before = until.removeprefix(prompt) if until.startswith(prompt) else ""
        return before, end.rstrip() or self.tokenizer.eos_token

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        def make() -> str:
            return self.processor.apply_chat_template(
                self._escape_special_tokens(messages),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )

        return memoize(self._known_prompts, (repr(messages), add_generation_prompt), make)

    def _escape_special_tokens(self, messages: list[Message]) -> list[Message]:
        """The messages with special tokens in their text broken up, so that a user's words stay words."""
        return [
            {
                "role": message["role"],
                "content": [
                    {**part, "text": self._special.sub(lambda found: found[0][0] + " " + found[0][1:], part["text"])}
                    if part["type"] == "text"
                    else part
                    for part in message["content"]
                ],
            }
            for message in messages
        ]

    def _tokens(self, text: str) -> list[int]:
        def make() -> list[int]:
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON can say half of a character, as of an emoji cut in two
                raise RecordError(f"A text holds half of a character, {text[error.start]!a}.") from None
            return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

        return memoize(self._known_tokens, text, make)

    def _split(self, text: str, runs: Iterator[list[int]]) -> list[list[int]]:
        """The token pieces of a rendered text: words and image runs in turn, beginning and ending with words."""
        first, *others = text.split(self.placeholder)
        pieces = [self._tokens(first)]
        for words in others:
            pieces += [next(runs), self._tokens(words)]
        return pieces

    def _join(self, pieces: Sequence[tuple[list[int], bool]], pictures: ProcessedImages) -> Branch:
        ids = torch.tensor([token for piece, _ in pieces for token in piece])
        supervised = torch.tensor([flag for piece, flag in pieces for _ in piece])
        return Branch(ids, supervised, ids == self.image_token_id, pictures.inputs)
