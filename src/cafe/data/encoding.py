"""Examples -> token sequences: decode an example's images and render its branches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from cafe.content import Content, Example, ImageRef
from cafe.errors import CafeError
from cafe.lvlm.processing import ChatProcessor, ProcessedImages
from cafe.lvlm.prompts import dialogue_messages, embedding_messages
from cafe.packing import Branch


@dataclass(frozen=True)
class EncodedExample:
    """The token sequences of one example."""

    query: Branch | None
    target: Branch | None
    negatives: list[Branch]
    negative_match_prob: Sequence[float]
    target_id: int
    negative_ids: list[int]
    dialogue: Branch | None

    @property
    def all(self) -> list[Branch]:
        """All of them that there are."""
        return [branch for branch in (self.query, self.target, *self.negatives, self.dialogue) if branch]


def encode_example(example: Example, chat_processor: ChatProcessor, max_tokens: int | None = None) -> EncodedExample:
    """Decodes an example's images and renders its branches; an image is decoded and processed once for all of them.

    Raises:
        CafeError: an image is missing or damaged, or its tokens do not fit; the record is named.
    """
    try:
        return _encode_example(example, chat_processor, max_tokens)
    except CafeError as error:
        raise CafeError(f"{example.origin}: {error}") from None


def _encode_example(example: Example, chat_processor: ChatProcessor, max_tokens: int | None) -> EncodedExample:
    done: dict[tuple[int, ...], ProcessedImages] = {}

    def pictures(refs: Sequence[ImageRef]) -> ProcessedImages:
        key = tuple(map(id, refs))
        if key not in done:
            done[key] = chat_processor.load_images(refs)
        return done[key]

    def embedding(content: Content) -> Branch:
        messages = embedding_messages(content, chat_processor.prompts)
        return chat_processor.encode_embedding(messages, pictures(content.images), max_tokens)

    query = target = dialogue = None
    negatives: list[Branch] = []
    scores: Sequence[float] = []
    target_id, negative_ids = 0, []
    if example.pair:
        query, target = embedding(example.pair.query), embedding(example.pair.target)
        negatives = [embedding(negative) for negative in example.pair.negatives]
        scores = example.pair.negative_scores or [0.0] * len(negatives)
        target_id = content_hash(example.pair.target)
        negative_ids = [content_hash(negative) for negative in example.pair.negatives]
    if example.dialogue:
        refs = [ref for turn in example.dialogue.turns for ref in turn.content.images]
        messages = dialogue_messages(example.dialogue, chat_processor.prompts)
        dialogue = chat_processor.encode_dialogue(messages, pictures(refs), max_tokens)
    return EncodedExample(query, target, negatives, scores, target_id, negative_ids, dialogue)


def content_hash(content: Content) -> int:
    """A number that is equal for equal contents, across processes."""
    digest = hashlib.blake2b(digest_size=7)
    for part in content.parts:
        digest.update(str(part).encode() + b"\0")
        source = part.source if isinstance(part, ImageRef) else None
        if isinstance(source, bytes):
            digest.update(source)
        elif isinstance(source, Image.Image):
            digest.update(f"{source.size}".encode() + source.tobytes())
    return int.from_bytes(digest.digest())
