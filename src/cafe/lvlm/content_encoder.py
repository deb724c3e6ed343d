"""Encode contents and dialogues into branches, with the same images loaded once for all of them."""

from collections.abc import Hashable, Sequence
from typing import Any

from cafe.content import Content, Dialogue, ImageRef, Turn, prompt_content
from cafe.errors import CafeError
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import dialogue_messages, embedding_messages
from cafe.packing import Branch


class ContentEncoder:
    """Encode the contents of one batch or example.

    Branches share image tokens only if they hold the same tensors, so an encoder keeps the images that it has loaded
    and gives the same ones to all contents that name them. Use one for as long as they may stay in memory.

    Args:
        chat_processor: renders, tokenizes and processes images.
        max_tokens: the longest sequence; longer ones are truncated where that leaves their images and prompt frame.
    """

    def __init__(self, chat_processor: ChatProcessor, max_tokens: int | None = None) -> None:
        self.chat_processor, self.max_tokens = chat_processor, max_tokens
        # With the references: the key of an image in memory is valid as long as the image exists.
        self._loaded: dict[tuple[Hashable, ...], tuple[ProcessedImages, Sequence[ImageRef]]] = {}

    def load_images(self, refs: Sequence[ImageRef]) -> ProcessedImages:
        """Decode and process the images of one content, or look them up.

        Raises:
            RecordError: an image cannot be read.
        """
        key = tuple(ref.key for ref in refs)
        if key not in self._loaded:
            self._loaded[key] = self.chat_processor.load_images(refs), refs
        processed, _ = self._loaded[key]
        return processed

    def encode_embedding(self, content: Content) -> Branch:
        """Encode the token sequence whose last token is the content's readout."""
        messages = embedding_messages(content, self.chat_processor.prompts)
        return self.chat_processor.encode_embedding(messages, self.load_images(content.images), self.max_tokens)

    def encode_dialogue(self, dialogue: Dialogue) -> Branch:
        """Encode the token sequence of a whole dialogue, with the images of all its turns."""
        refs = [ref for turn in dialogue.turns for ref in turn.content.images]
        messages = dialogue_messages(dialogue, self.chat_processor.prompts)
        return self.chat_processor.encode_dialogue(messages, self.load_images(refs), self.max_tokens)

    def encode_prompt(self, content: Content) -> Branch:
        """Encode the token sequence of a user's turn, up to where the model answers."""
        messages = dialogue_messages(Dialogue((Turn("user", content),)), self.chat_processor.prompts)
        return self.chat_processor.encode_prompt(messages, self.load_images(content.images))

    def encode_answers(self, content: Content, answers: Sequence[str], with_end: bool = True) -> list[Branch]:
        """Encode each answer to a user's turn as a dialogue.

        Args:
            content: the user's turn.
            answers: the answers.
            with_end: whether an answer ends; if not, it may go on, and its branch has no token that ends it.
        """
        if not with_end:
            prompt = self.encode_prompt(content)
            return [prompt.begin_answer(self.chat_processor.tokenize_beginning(answer)) for answer in answers]
        question = Turn("user", content)
        dialogues = [Dialogue((question, Turn("assistant", Content.of(answer)))) for answer in answers]
        return [self.encode_dialogue(dialogue) for dialogue in dialogues]

    def encode_described(self, image: Any, prompt: str) -> tuple[Branch, Branch]:
        """Encode the embedding of an image, or of several, and a prompt about it, both of which begin with the image.

        Raises:
            CafeError: there is no image.
        """
        content = prompt_content(image, prompt)
        if not content.images:
            raise CafeError("There is no image to describe.")
        return self.encode_embedding(Content(tuple(content.images))), self.encode_prompt(content)
