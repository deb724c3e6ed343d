"""Tokenizer, image processor and chat template in; token sequences and model inputs out.

A chat is rendered to text by its template and split at the image placeholders and around the assistant's words; each
piece is tokenized on its own. So a prompt has the same tokens in training and in use, the supervised tokens are known
exactly, and an image is processed once for all branches that show it.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from cafe.content import ImageRef
from cafe.errors import CheckpointError, RecordError, first_line
from cafe.images.normalization import Normalization
from cafe.images.resizing import with_torch_resize
from cafe.lvlm.families import family_of_processor
from cafe.lvlm.images import FamilyImages, FastImages, ProcessedImages, make_fast_images
from cafe.lvlm.prompts import CHATML, Message, Prompts
from cafe.packing import Branch, TokenTypeFn, collate_vision, image_token_type_ids, prefix_lm_token_type_ids

MAX_TEMPLATE_CHARACTERS = 1_000_000  # of a template's own around a chat
MAX_MEMOIZED = 4096  # texts whose tokens are kept, and chats whose prompts are
MAX_MEMOIZED_CHARACTERS = 1000  # of a text or chat; longer ones are rarely seen twice, and would fill a server's memory

# A chat with hashable parts: (role, ((type, text), ...)) of each message.
FrozenChat = tuple[tuple[str, tuple[tuple[str, str], ...]], ...]

# The sentinel stands for a turn's words where the template is asked what it writes around them.
_SENTINEL = "\ue000words\ue000"
_EMPTY_ANSWER: Message = {"role": "assistant", "content": [{"type": "text", "text": ""}]}
_ASSISTANT_PROBE: Message = {"role": "assistant", "content": [{"type": "text", "text": _SENTINEL}]}
_USER_PROBE: Message = {"role": "user", "content": [{"type": "text", "text": _SENTINEL}]}
_IMAGE_PROBE: Message = {"role": "user", "content": [{"type": "image"}]}


class ChatProcessor:
    """Turn chats and images into token sequences, and token sequences into batches.

    Args:
        processor: the family's processor. It is changed: it resizes images by PyTorch, and takes the chat template that
            the prompts want.
        prompts: how content becomes a prompt; its `chat_template` decides which template renders.

    Attributes:
        images: what processes images, see `with_images`.
        prefix_lm: whether the model attends to its prompts in both directions.
        placeholder: the token that stands for an image in a rendered chat.
        image_token_id: the token whose embeddings the model replaces by an image's features.
        token_type_fns: what marks the tokens of a branch, by the name of the model's input.
    """

    def __init__(self, processor: ProcessorMixin, prompts: Prompts) -> None:
        self.processor = processor
        self.prompts = prompts
        self.tokenizer = processor.tokenizer
        if hasattr(processor, "image_processor"):
            processor.image_processor = with_torch_resize(processor.image_processor)
        prefix_lm_template = family_of_processor(processor).prefix_lm_template
        self.prefix_lm = bool(prefix_lm_template)

        # In the template, an image is the processor's own token, or the token it begins with, or "<image>".
        own_tokens = [getattr(processor, name, None) for name in ("image_token", "boi_token")]
        placeholders: list[str] = [*filter(None, own_tokens), "<image>"]
        if prompts.chat_template == "chatml":
            self.processor.chat_template = self.tokenizer.chat_template = CHATML.replace("<image>", placeholders[0])
        self._template = None if processor.chat_template else prefix_lm_template or None

        # Frames and instructions are the same in every prompt.
        self._tokenize_short = lru_cache(MAX_MEMOIZED)(self._tokenize_text)
        self._render_short = lru_cache(MAX_MEMOIZED)(self._render_frozen)

        try:
            self.placeholder = self._find_placeholder(placeholders)
            self._special_tokens = self._compile_special_tokens()
            self._assistant_prefix, self._assistant_suffix = self._probe_assistant_frame()
        except RecordError as error:  # of the template, which no record has been put into yet
            raise CheckpointError(f"{error} Set prompts.chat_template to chatml for another.") from None

        family_images = FamilyImages(processor, self.placeholder, image_tokens_only=self.prefix_lm)
        self.images: FamilyImages | FastImages = family_images
        self.image_token_id = family_images.image_token_id
        self.token_type_fns: dict[str, TokenTypeFn] = {}
        if self.prefix_lm:
            self.token_type_fns["token_type_ids"] = prefix_lm_token_type_ids
        elif family_images.token_types:
            self.token_type_fns[family_images.token_types[0]] = image_token_type_ids

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parts, from which it is built again, because its caches cannot be pickled."""
        return _restore, (self.processor, self.prompts, isinstance(self.images, FastImages))

    def with_images(self, images: FamilyImages | FastImages) -> "ChatProcessor":
        """Return the same chat processor with something else that processes its images."""
        other = copy.copy(self)
        other.images = images
        return other

    def save(self, directory: Path) -> None:
        """Write the family's standard processor files."""
        self.processor.save_pretrained(directory)

    def process_images(self, images: Sequence[Image.Image]) -> ProcessedImages:
        """Process the images of one content together, as the family does for one prompt."""
        return self.images.process(images)

    def load_images(self, refs: Sequence[ImageRef]) -> ProcessedImages:
        """Decode and process the images of one content."""
        return self.images.load(refs)

    def decode_images(self, refs: Sequence[ImageRef]) -> list[Image.Image]:
        """Decode images, large JPEGs at a reduced size that the model cannot tell from the full one."""
        return self.images.decode(refs)

    def encode_embedding(
        self, messages: list[Message], images: ProcessedImages, max_tokens: int | None = None
    ) -> Branch:
        """Encode the branch whose last token is the readout.

        A branch that is too long loses tokens at the end of its content, never of an image, of the instruction, or of
        the prompt frame behind it.

        Raises:
            RecordError: what must stay is longer than `max_tokens`.
        """
        text = self._render_embedding(messages)
        pieces = self._split(text, iter(images.token_runs))
        if not max_tokens or _num_tokens(pieces) <= max_tokens:
            return self._join(_unsupervised(pieces), images)
        pieces = self._truncate_content(messages, text, images, max_tokens)
        return replace(self._join(_unsupervised(pieces), images), is_truncated=True)

    def encode_dialogue(
        self, messages: list[Message], images: ProcessedImages, max_tokens: int | None = None
    ) -> Branch:
        """Encode a whole dialogue; the assistant's words are supervised, with the token that ends each of its turns.

        Raises:
            RecordError: the last image does not end within `max_tokens`.
        """
        branch = self._join(self._split_dialogue(messages, images), images)
        if not max_tokens or len(branch) <= max_tokens:
            return branch
        if branch.image_mask[max_tokens:].any():
            end = int(branch.image_mask.nonzero()[-1]) + 1
            raise RecordError(f"The last image of a dialogue ends at token {end}, past the limit of {max_tokens}.")
        return branch.truncate(max_tokens)

    def encode_prompt(self, messages: list[Message], images: ProcessedImages) -> Branch:
        """Encode a dialogue up to where the assistant begins to answer."""
        text = self._render(messages, True)
        pieces = self._split(text, iter(images.token_runs))
        return self._join(_unsupervised(pieces), images)

    def tokenize_beginning(self, words: str) -> list[int]:
        """Return the tokens that follow a prompt where an answer begins with some words, and may go on behind them."""
        return self._tokenize(self._assistant_prefix + self._escape_special_tokens(words))

    def collate(self, branches: Sequence[Branch], left: bool = False) -> dict[str, Tensor]:
        """Collate branches into model inputs: input_ids and attention_mask (rows, tokens), and the image inputs.

        Rows are padded on the right, or on the left for generation.
        """
        side = "left" if left else "right"

        def pad(rows: list[Tensor], value: int = 0) -> Tensor:
            """Stack rows of different lengths."""
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)

        input_ids = [branch.input_ids for branch in branches]
        inputs = {
            "input_ids": pad(input_ids, self.tokenizer.pad_token_id or 0),
            "attention_mask": pad([torch.ones_like(ids) for ids in input_ids]),
        }
        for name, token_type_fn in self.token_type_fns.items():
            inputs[name] = pad([token_type_fn(branch) for branch in branches])
        return {**inputs, **collate_vision([branch.image_inputs for branch in branches])}

    def _find_placeholder(self, candidates: Sequence[str]) -> str:
        """Find the token that the template writes for an image.

        Raises:
            CheckpointError: there is no template, or it writes none.
        """
        # Without a template transformers refuses to render.
        rendered = ""
        if self.processor.chat_template or self._template:
            rendered = self._render([_IMAGE_PROBE], False)
        for token in candidates:
            if token in rendered:
                return token
        raise CheckpointError(
            f"This {type(self.processor).__name__} has no chat template that shows images: set prompts.chat_template "
            "to chatml."
        )

    def _compile_special_tokens(self) -> re.Pattern[str]:
        """Compile the pattern of the tokens that a user's text must not contain."""
        tokens = {*self.tokenizer.all_special_tokens, self.placeholder}
        # Not all that are marked as special are in `all_special_tokens`.
        for token in self.tokenizer.added_tokens_decoder.values():
            if token.special:
                tokens.add(str(token))
        # Longest first, so that no token is taken for the shorter one it begins with.
        longest_first = sorted(tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))

    def _probe_assistant_frame(self) -> tuple[str, str]:
        """Find what the template writes between the prompt and the assistant's words, and right after them.

        A template that does not end the assistant's turn is given the end-of-sequence token.
        """
        chat: list[Message] = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        prompt = self._render(chat, True)
        before, _, after = self._render([*chat, _ASSISTANT_PROBE], False).partition(_SENTINEL)
        # A template may write more behind the generation prompt when the answer is there, as an empty thought.
        prefix = before.removeprefix(prompt) if before.startswith(prompt) else ""
        suffix = after.rstrip() or self.tokenizer.eos_token
        if not suffix:
            raise CheckpointError(
                "Neither the model's chat template nor its tokenizer, which has no eos_token, says how an answer ends."
            )
        return prefix, suffix

    def _render_embedding(self, messages: list[Message]) -> str:
        """Render the prompt whose last token is the readout."""
        if self.prompts.assistant_frame == "closed":
            return self._render([*messages, _EMPTY_ANSWER], False).rstrip()
        return self._render(messages, True)

    def _truncate_content(
        self, messages: list[Message], text: str, images: ProcessedImages, max_tokens: int
    ) -> list[list[int]]:
        """Return the pieces of an embedding prompt with tokens removed at the end of its content."""
        # The prompt is content, instruction and frame, in this order; the frame is what follows a probe in its place.
        instruction = messages[-1]["content"][-1]["text"] if self.prompts.mode == "compress" else ""
        frame = self._render_embedding([*messages[:-1], _USER_PROBE]).rpartition(_SENTINEL)[2]
        content = text.removesuffix(instruction + frame)

        # Only the words behind the last image can be cut.
        *pieces, last = self._split(content, iter(images.token_runs))
        tail = self._tokenize(instruction + frame)
        kept = max_tokens - _num_tokens(pieces) - len(tail)
        pieces = [*pieces, last[: max(kept, 0)], tail]
        if kept < 0 or content == text:
            raise RecordError(f"An embedding prompt of {_num_tokens(pieces)} tokens cannot be cut to {max_tokens}.")
        return pieces

    def _split_dialogue(self, messages: list[Message], images: ProcessedImages) -> list[tuple[list[int], bool]]:
        """Split a dialogue into token pieces, each with whether it is supervised."""
        runs = iter(images.token_runs)
        pieces: list[tuple[list[int], bool]] = []
        # With sentinels for all answers, the rendered chat shows where each turn begins and ends.
        probes = [_ASSISTANT_PROBE if message["role"] == "assistant" else message for message in messages]
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            # The prompt of this turn, from the end of the assistant's last turn on.
            prompt = self._render(probes[:index], True).rpartition(_SENTINEL)[2]
            if pieces:
                prompt = prompt.removeprefix(self._assistant_suffix)
            pieces += _unsupervised(self._split(prompt, runs))
            # The answer is tokenized as one piece, with the token that ends the turn: the model learns to stop.
            words = "".join(self._escape_special_tokens(part["text"]) for part in message["content"])
            answer = self._assistant_prefix + words + self._assistant_suffix
            pieces.append((self._tokenize(answer), True))
        return pieces

    def _render(self, messages: list[Message], add_generation_prompt: bool) -> str:
        """Render a chat by its template, or look up what a short one was rendered to before."""
        frozen = tuple((message["role"], _freeze(message["content"])) for message in messages)
        # Names of roles and kinds count too, because a chat may have many turns without words.
        num_characters = sum(len(role) + sum(len(kind) + len(text) for kind, text in parts) for role, parts in frozen)
        if num_characters > MAX_MEMOIZED_CHARACTERS:
            return self._render_frozen(frozen, add_generation_prompt)
        return self._render_short(frozen, add_generation_prompt)

    def _render_frozen(self, chat: FrozenChat, add_generation_prompt: bool) -> str:
        """Render a chat by its template."""
        messages = []
        for role, parts in chat:
            messages.append({"role": role, "content": [self._thaw(*part) for part in parts]})
        # A template is a program that comes with the model. It may refuse a chat, as one whose roles do not alternate,
        # and it may be broken; transformers runs it in a sandbox, where it can do no more than that.
        try:
            text = self.processor.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:
            reason = first_line(error).rstrip(".")
            raise RecordError(f"The model's chat template cannot render a chat: {reason:.200}.") from None
        num_written = len(text) - sum(len(part) for _, parts in chat for _, part in parts)
        if num_written > MAX_TEMPLATE_CHARACTERS:
            raise RecordError(f"The model's chat template writes {num_written:,} characters around a chat.")
        return text

    def _thaw(self, kind: str, text: str) -> dict[str, str]:
        """Return a part of a frozen chat as templates take it."""
        if kind != "text":
            return {"type": kind}
        return {"type": kind, "text": self._escape_special_tokens(text)}

    def _escape_special_tokens(self, text: str) -> str:
        """Break up special tokens in a text by a space, so that a user's words stay words."""
        return self._special_tokens.sub(lambda match: match[0][0] + " " + match[0][1:], text)

    def _tokenize(self, text: str) -> list[int]:
        """Tokenize a text, or look up the tokens of a short one."""
        return self._tokenize_text(text) if len(text) > MAX_MEMOIZED_CHARACTERS else self._tokenize_short(text)

    def _tokenize_text(self, text: str) -> list[int]:
        """Tokenize a text as it is, without the special tokens that tokenizers add around texts.

        Raises:
            RecordError: it holds half of a character.
        """
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair, as of an emoji cut in two
            raise RecordError(f"A text holds half of a character, {text[error.start]!a}.") from None
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _split(self, text: str, runs: Iterator[list[int]]) -> list[list[int]]:
        """Split a rendered text into token pieces: words and image runs in turn, words first and last."""
        first, *others = text.split(self.placeholder)
        pieces = [self._tokenize(first)]
        for words in others:
            pieces += [next(runs), self._tokenize(words)]
        return pieces

    def _join(self, pieces: Sequence[tuple[list[int], bool]], images: ProcessedImages) -> Branch:
        """Join token pieces, each supervised or not, into a branch."""
        tokens: list[int] = []
        supervised: list[bool] = []
        for piece, is_supervised in pieces:
            tokens += piece
            supervised += [is_supervised] * len(piece)
        # Special tokens in the text were broken up, so every image token is an image's.
        input_ids = torch.tensor(tokens)
        return Branch(input_ids, torch.tensor(supervised), input_ids == self.image_token_id, images.inputs)


def _restore(processor: ProcessorMixin, prompts: Prompts, fast: bool) -> ChatProcessor:
    """Restore a chat processor from its pickled parts."""
    chat_processor = ChatProcessor(processor, prompts)
    return with_fast_images(chat_processor)[0] if fast else chat_processor


def _freeze(parts: Sequence[dict[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return the parts of a turn in hashable form."""
    return tuple((part["type"], part.get("text", "")) for part in parts)


def _num_tokens(pieces: Sequence[Sequence[int]]) -> int:
    """Count the tokens of all pieces."""
    return sum(map(len, pieces))


def _unsupervised(pieces: Sequence[list[int]]) -> list[tuple[list[int], bool]]:
    """Mark pieces as not supervised."""
    return [(piece, False) for piece in pieces]


def with_fast_images(chat_processor: ChatProcessor) -> tuple[ChatProcessor, Normalization | None]:
    """Return a chat processor for training, which gives images as bytes where it can, and what normalizes these."""
    family = chat_processor.images
    if isinstance(family, FastImages):
        family = family.family
    images, normalization = make_fast_images(family)
    return chat_processor.with_images(images), normalization
