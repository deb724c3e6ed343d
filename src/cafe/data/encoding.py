"""Encode examples: decode their images, render their prompts, and tokenize these into branches."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from cafe.content import Content, Example, ImageRef
from cafe.errors import RecordError
from cafe.lvlm.content_encoder import ContentEncoder
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import Branch
from cafe.utils.text import escape_controls


@dataclass(frozen=True)
class EncodedExample:
    """Hold the token sequences of one example.

    Attributes:
        query, target: the pair's branches; None without a pair.
        negatives: the branches of its hard negatives.
        negative_match_prob: for each hard negative, the probability that it matches the query after all.
        query_id, target_id, negative_ids: hashes of these contents, to find duplicates by.
        dialogue: the branch that the language loss is taken on; None without a dialogue.
        origin: the file and record.
    """

    query: Branch | None
    target: Branch | None
    negatives: list[Branch]
    negative_match_prob: Sequence[float]
    query_id: int
    target_id: int
    negative_ids: list[int]
    dialogue: Branch | None
    origin: str = ""

    @property
    def embedding_branches(self) -> list[Branch]:
        """Return the branches that are embedded: query, target and hard negatives."""
        if self.query is None or self.target is None:
            return []
        return [self.query, self.target, *self.negatives]

    @property
    def lm_branches(self) -> list[Branch]:
        """Return the branches that the language loss is taken on: the dialogue, if any."""
        if self.dialogue is None:
            return []
        return [self.dialogue]

    @property
    def all(self) -> list[Branch]:
        """Return all branches."""
        return [*self.embedding_branches, *self.lm_branches]

    @property
    def is_truncated(self) -> bool:
        """Return whether any branch was cut to the longest sequence."""
        return any(branch.is_truncated for branch in self.all)


def encode_example(example: Example, chat_processor: ChatProcessor, max_tokens: int | None = None) -> EncodedExample:
    """Encode an example. Each image is decoded and processed once for all branches that show it.

    Args:
        example: what to encode.
        chat_processor: renders, tokenizes and processes images.
        max_tokens: the longest sequence; longer ones are truncated where that leaves their images and prompt frame.

    Raises:
        RecordError: an image is missing or damaged, or the tokens do not fit into `max_tokens`; names the record.
    """
    try:
        return _encode(example, chat_processor, max_tokens)
    except RecordError as error:
        raise RecordError(escape_controls(f"{example.origin}: {error}")) from None


def _encode(example: Example, chat_processor: ChatProcessor, max_tokens: int | None) -> EncodedExample:
    """Encode an example; errors do not name it yet."""
    encoder = ContentEncoder(chat_processor, max_tokens)
    # Nothing yet: each part of the example fills in its own fields.
    encoded = EncodedExample(None, None, [], [], 0, 0, [], None, example.origin)
    if pair := example.pair:
        encoded = replace(
            encoded,
            query=encoder.encode_embedding(pair.query),
            target=encoder.encode_embedding(pair.target),
            negatives=list(map(encoder.encode_embedding, pair.negatives)),
            # Without soft targets, no negative matches.
            negative_match_prob=pair.negative_scores or [0.0] * len(pair.negatives),
            query_id=content_hash(pair.query),
            target_id=content_hash(pair.target),
            negative_ids=list(map(content_hash, pair.negatives)),
        )
    if example.dialogue:
        encoded = replace(encoded, dialogue=encoder.encode_dialogue(example.dialogue))
    return encoded


def content_hash(content: Content) -> int:
    """Hash a content to a number that is the same in every process; equal contents have equal numbers."""
    digest = hashlib.blake2b(digest_size=7)  # 56 bits, so that it fits into a signed 64-bit tensor
    for part in content.parts:
        # The end of each part is marked, so that moving text from one to the next makes another hash.
        digest.update(str(part).encode(errors="surrogatepass") + b"\0")
        # A path is in its name already; images in memory are told apart by what they hold.
        match part:
            case ImageRef(source=bytes() as data):
                digest.update(data)
            case ImageRef(source=Image.Image() as image):
                digest.update(f"{image.size}".encode() + image.tobytes())
    return int.from_bytes(digest.digest())
