"""Tokenizer + image processor + chat template in, model inputs out.

A chat is rendered to text by its template, cut at the image placeholders and where the assistant begins and ends to
speak, and each piece is tokenized by itself. So a prompt has the same tokens in training and in use, which tokens are
supervised is known exactly, and a picture is processed once for all branches that show it.

Without torchvision, transformers cannot construct processors that declare a video processor; `load_processor` then
leaves that one part out. The files written are the family's standard ones either way.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Bool, Int64
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from cafe.errors import CafeError
from cafe.instructions import CHATML, Message, Prompts


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same processor class with its video part left out, under the same name, so that it saves the same files."""

    def get_attributes(cls: type[ProcessorMixin]) -> list[str]:
        return [name for name in processor_class.get_attributes() if "video" not in name]

    return type(processor_class.__name__, (processor_class,), {"get_attributes": classmethod(get_attributes)})


def load_processor(path: str) -> ProcessorMixin:
    """The processor of a local directory or Hub id.

    Raises:
        CafeError: the model's family has no processor.
    """
    if find_spec("torchvision"):
        return AutoProcessor.from_pretrained(path)
    family = AutoConfig.from_pretrained(path).model_type
    if family not in PROCESSOR_MAPPING_NAMES:
        raise CafeError(f"{path} is a {family} model, for which transformers knows no processor of images and text.")
    return without_video(processor_class_from_name(PROCESSOR_MAPPING_NAMES[family])).from_pretrained(path)


_EMPTY_ANSWER: Message = {"role": "assistant", "content": [{"type": "text", "text": ""}]}


@dataclass(frozen=True)
class Encoded:
    """One token sequence and the pictures it shows.

    Attributes:
        input_ids: the tokens, image tokens included.
        supervised: which tokens the language loss is taken on: what the assistant says, and the token that ends it.
        vision: the image processor's tensors by name; empty without images.
    """

    input_ids: Int64[Tensor, "tokens"]
    supervised: Bool[Tensor, "tokens"]
    vision: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """The processed images of one content: the token run that stands for each, and the model's inputs for all."""

    runs: list[list[int]]
    vision: dict[str, Tensor]


class Processing:
    """Turns chats and pictures into token sequences, and sequences into batches.

    Args:
        processor: the family's processor.
        prompts: how content becomes a prompt; its `chat_template` decides which template renders.
    """

    def __init__(self, processor: ProcessorMixin, prompts: Prompts) -> None:
        self.processor = processor
        self.prompts = prompts
        self.tokenizer = processor.tokenizer
        if prompts.chat_template == "chatml":
            self.processor.chat_template = self.tokenizer.chat_template = CHATML
        self.placeholder: str = getattr(processor, "image_token", None) or "<image>"
        special = sorted({*self.tokenizer.all_special_tokens, self.placeholder, *self._added()}, key=len, reverse=True)
        self._special = re.compile("|".join(re.escape(token) for token in special))
        self._end = self._assistant_end()

    def _added(self) -> list[str]:
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def save(self, directory: Path) -> None:
        """Writes the family's standard processor files."""
        self.processor.save_pretrained(directory)

    def pictures(self, images: Sequence[Image.Image]) -> Pictures:
        """Processes the images of one content together, as the family does for one prompt."""
        if not images:
            return Pictures([], {})
        # A special token between the placeholders keeps the runs apart whatever the family writes into them.
        stop = self.tokenizer.eos_token
        text = stop.join([self.placeholder] * len(images))
        # The images are nested because some families (LLaVA-OneVision) treat several images of one prompt otherwise.
        batch = self.processor(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False)
        runs: list[list[int]] = [[]]
        for token in batch.pop("input_ids")[0].tolist():
            if token == self.tokenizer.eos_token_id:
                runs.append([])
            else:
                runs[-1].append(token)
        per_token = ("attention_mask", "token_type_ids", "mm_token_type_ids")
        return Pictures(runs, {name: value for name, value in batch.items() if name not in per_token})

    def encode_embedding(self, messages: list[Message], pictures: Pictures, max_tokens: int | None = None) -> Encoded:
        """The branch whose last token is the readout.

        Where it is too long, tokens are cut from the end of the content, never from the instruction and the prompt
        frame behind it and never from an image.
        """
        if self.prompts.frame == "closed":
            text = self._render([*messages, _EMPTY_ANSWER], False).rstrip()
        else:
            text = self._render(messages, True)
        pieces = self._split(text, iter(pictures.runs))
        if max_tokens and sum(map(len, pieces)) > max_tokens:
            instruction = messages[-1]["content"][-1]["text"]
            content, _, frame = text.rpartition(instruction)
            pieces, tail = self._split(content, iter(pictures.runs)), self._tokens(instruction + frame)
            kept = len(pieces[-1]) - (sum(map(len, pieces)) + len(tail) - max_tokens)
            pieces = [*pieces[:-1], pieces[-1][: max(kept, 0)], tail]
            if kept < 0:
                raise CafeError(f"An embedding prompt of {sum(map(len, pieces))} tokens cannot be cut to {max_tokens}.")
        return _join([(piece, False) for piece in pieces], pictures)

    def encode_dialogue(self, messages: list[Message], pictures: Pictures, max_tokens: int | None = None) -> Encoded:
        """A whole dialogue; what the assistant says is supervised, together with the token that ends its turn."""
        runs, done = iter(pictures.runs), ""
        pieces: list[tuple[list[int], bool]] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(messages[:index], True)
                spoken = "".join(part["text"] for part in self._safe([message])[0]["content"]) + self._end
                pieces += [(piece, False) for piece in self._split(prompt[len(done) :], runs)]
                pieces.append((self._tokens(spoken), True))
                done = prompt + spoken
        encoded = _join(pieces, pictures)
        if max_tokens and len(encoded.input_ids) > max_tokens:
            shown = sum(len(run) for run in pictures.runs)
            if sum(map(len, self._split(self._render(messages[:1], True), iter(pictures.runs)))) + shown > max_tokens:
                raise CafeError(f"The images of a dialogue take {shown} tokens, which do not fit in {max_tokens}.")
            encoded = Encoded(encoded.input_ids[:max_tokens], encoded.supervised[:max_tokens], encoded.vision)
        return encoded

    def encode_prompt(self, messages: list[Message], pictures: Pictures) -> Encoded:
        """A dialogue up to where the assistant begins to speak."""
        text = self._render(messages, True)
        return _join([(piece, False) for piece in self._split(text, iter(pictures.runs))], pictures)

    def collate(self, rows: Sequence[Encoded], left: bool = False) -> dict[str, Tensor]:
        """Model inputs of several sequences: input_ids and attention_mask (rows, tokens), and the vision tensors.

        Rows are padded on the right, or on the left for generation.
        """
        pad = self.tokenizer.pad_token_id or 0
        side = "left" if left else "right"
        ids = pad_sequence([row.input_ids for row in rows], batch_first=True, padding_value=pad, padding_side=side)
        ones = [torch.ones_like(row.input_ids) for row in rows]
        mask = pad_sequence(ones, batch_first=True, padding_side=side)
        return {"input_ids": ids, "attention_mask": mask, **collate_vision([row.vision for row in rows])}

    def _assistant_end(self) -> str:
        """What the template writes right after the assistant's words, without trailing white space."""
        probe = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        said = [*probe, {"role": "assistant", "content": [{"type": "text", "text": "@@"}]}]
        return self._render(said, False).rsplit("@@", 1)[1].rstrip()

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        return self.processor.apply_chat_template(
            self._safe(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _safe(self, messages: list[Message]) -> list[Message]:
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
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def _split(self, text: str, runs: Iterator[list[int]]) -> list[list[int]]:
        """The token pieces of a rendered text: words and image runs in turn, beginning and ending with words."""
        first, *others = text.split(self.placeholder)
        pieces = [self._tokens(first)]
        for words in others:
            pieces += [next(runs), self._tokens(words)]
        return pieces


def _join(pieces: Sequence[tuple[list[int], bool]], pictures: Pictures) -> Encoded:
    ids = torch.tensor([token for piece, _ in pieces for token in piece])
    supervised = torch.tensor([flag for piece, flag in pieces for _ in piece])
    return Encoded(ids, supervised, pictures.vision)


def collate_vision(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Joins the vision tensors of several sequences along their first dimension, padding the others with zeros."""
    names = {name for part in parts for name in part}
    return {name: _cat_padded([part[name] for part in parts if name in part]) for name in sorted(names)}


def _cat_padded(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = [
        torch.nn.functional.pad(
            tensor,
            [
                amount
                for size, full in zip(tensor.shape[:0:-1], shape[::-1], strict=True)
                for amount in (0, full - size)
            ],
        )
        for tensor in tensors
    ]
    return torch.cat(padded)
