"""Make jobs of what requests hold: contents and chats become token sequences with processed images."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cafe.content import Content, ImageRef
from cafe.errors import RecordError
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Message, embedding_messages, system_messages
from cafe.packing import Branch
from cafe.serving.config import RequestLimits
from cafe.serving.jobs import ChatJob, EmbedJob, Piece, Sampling, ScoreJob

NO_LIMIT = 2**31  # tokens
MAX_TOKEN_CHARACTERS = 32  # of a text longer than this a token on average, no tokens are made


class ContextLengthError(RecordError):
    """Report an input of more tokens than are allowed. Requests are answered with status 400."""


@dataclass(frozen=True)
class JobEncoder:
    """Encode contents and chats as jobs. Methods wait for the images, so they are called in threads.

    Attributes:
        chat_processor: renders, tokenizes and processes images; in a server, its images are processed by workers.
        limits: of one request.
        context_length: the most tokens that the model reads and writes together.
    """

    chat_processor: ChatProcessor
    limits: RequestLimits
    context_length: int = NO_LIMIT

    def embedding(self, content: Content) -> EmbedJob:
        """Encode a content that is to be embedded.

        Raises:
            RecordError: an image cannot be read.
            ContextLengthError: it is too long.
        """
        messages = embedding_messages(content, self.chat_processor.prompts)
        images = self._load(messages, content.images)
        branch = self.chat_processor.encode_embedding(messages, images)
        return EmbedJob(**self._inputs(branch, images, content.images))

    def chat(
        self,
        messages: list[Message],
        refs: Sequence[ImageRef],
        sampling: Sampling,
        on_piece: Callable[[Piece], None],
    ) -> ChatJob:
        """Encode a chat that is to be answered.

        Args:
            messages: the turns, as templates take them; the model's own system prompt comes first if there is none.
            refs: the images of all turns, in order.
            sampling: how it is answered; the answer is shorter where the context ends before.
            on_piece: takes the pieces of the answer, see `ChatJob`.

        Raises:
            RecordError: an image cannot be read, or the model's template refuses the turns.
            ContextLengthError: the chat is too long.
        """
        inputs = self._prompt_inputs(messages, refs)
        # A long chat gets a short answer, and not an error, as long as one token fits.
        room = self.context_length - len(inputs["branch"])
        if room < 1:
            raise ContextLengthError(f"The chat fills the {self.context_length:,} tokens that the model reads.")
        sampling = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        return ChatJob(**inputs, sampling=sampling, on_piece=on_piece)

    def score(
        self,
        messages: list[Message],
        refs: Sequence[ImageRef],
        token_ids: tuple[int, ...],
        beginning: tuple[int, ...] = (),
    ) -> ScoreJob:
        """Encode a chat of whose answer the next token is to be scored; see `chat`.

        Args:
            messages, refs: the chat.
            token_ids: the tokens that are compared.
            beginning: the tokens with which each answer begins; by default the first token is scored.

        Raises:
            RecordError, ContextLengthError: see `chat`.
        """
        return ScoreJob(**self._prompt_inputs(messages, refs, beginning), token_ids=token_ids)

    def _prompt_inputs(
        self, messages: list[Message], refs: Sequence[ImageRef], beginning: tuple[int, ...] = ()
    ) -> dict[str, Any]:
        """Encode a chat up to where the assistant answers, or to behind the first tokens of the answer."""
        # As `Cafe.generate` does, so that the same question has the same answer.
        if not any(message["role"] == "system" for message in messages):
            messages = [*system_messages(self.chat_processor.prompts), *messages]
        images = self._load(messages, refs)
        prompt = self.chat_processor.encode_prompt(messages, images)
        return self._inputs(prompt.begin_answer(beginning), images, refs)

    def _load(self, messages: Sequence[Message], refs: Sequence[ImageRef]) -> ProcessedImages:
        """Load images, once it is known that the words are not too many."""
        num_characters = sum(len(part.get("text", "")) for message in messages for part in message["content"])
        if num_characters > MAX_TOKEN_CHARACTERS * self.limits.max_input_tokens:
            raise ContextLengthError(f"The text has {num_characters:,} characters, more than the model reads.")
        return self.chat_processor.load_images(refs)

    def _inputs(self, branch: Branch, images: ProcessedImages, refs: Sequence[ImageRef]) -> dict[str, Any]:
        """Return what all jobs hold.

        Raises:
            ContextLengthError: the branch is too long.
        """
        # Only now are the tokens of images known.
        most = min(self.limits.max_input_tokens, self.context_length)
        if len(branch) > most:
            raise ContextLengthError(f"The input has {len(branch):,} tokens, over the limit of {most:,}.")
        key = image_key(refs)
        prefix_length = end_of_images(branch, images) if key else 0
        return {"branch": branch, "image_key": key, "prefix_length": prefix_length, "timeout": self.limits.timeout}


def end_of_images(branch: Branch, images: ProcessedImages) -> int:
    """Return the number of tokens up to the end of the last image; 0 without images."""
    if not branch.image_mask.any():
        return 0
    # An image may end in tokens of another kind, which some families compute from the image as well.
    last = int(branch.image_mask.nonzero()[-1])
    run = images.token_runs[-1]
    return last + 1 + run[::-1].index(int(branch.input_ids[last]))


def image_key(refs: Sequence[ImageRef]) -> str:
    """Return a digest of the bytes of some images; empty for none, and for images that are no bytes."""
    digests = [ref.digest for ref in refs]
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests and all(digests) else ""
