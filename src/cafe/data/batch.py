"""Collate encoded examples into contrastive batches, cut into micro-batches that fit into memory."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated

import torch
from jaxtyping import Float32, Int64
from PIL import Image
from torch import Tensor

from cafe.content import Content, Dialogue, Turn
from cafe.data.encoding import EncodedExample
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import dialogue_messages
from cafe.packing import Branch, PackedBatch, PackingConfig, count_crops, count_unique_tokens, pack
from cafe.utils.ranges import Above


@dataclass(frozen=True)
class MicroBatch:
    """Hold some examples of a contrastive batch, packed for one forward pass.

    Attributes:
        joint: all their branches.
        embedding_only: the embedded branches alone, for the first phase of the gradient cache. It is `joint` itself
            where there are no others, and in the first micro-batch, which goes through the model only once.
        embedding_slots: for each embedded branch, its row among the batch's embeddings.
    """

    joint: PackedBatch
    embedding_only: PackedBatch
    embedding_slots: Int64[Tensor, " readouts"]

    def pin_memory(self) -> "MicroBatch":
        """Copy the tensors to page-locked memory, each once."""
        # One object stays one object, or its tensors would be copied to the GPU twice.
        joint = embedding_only = self.joint.pin_memory()
        if self.embedding_only is not self.joint:
            embedding_only = self.embedding_only.pin_memory()
        return MicroBatch(joint, embedding_only, self.embedding_slots.pin_memory())


@dataclass(frozen=True)
class Batch:
    """Hold one contrastive batch. Its embeddings are all queries, then all targets, then all hard negatives.

    Attributes:
        micro_batches: what goes through the model at once.
        query_ids, target_ids: hashes of the queries and of the targets; equal contents have equal numbers.
        negative_owner: for each hard negative, the index of its pair.
        negative_match_prob: for each hard negative, the probability that it matches its pair's query after all.
        negative_ids: hashes of the hard negatives, comparable with `target_ids`.
        num_supervised: the number of tokens that the language loss is taken on.
        bad_records: why records were skipped, one message each.
        record_names: the file and record of each example.
        num_truncated: the number of examples that were cut to the longest sequence.
    """

    micro_batches: list[MicroBatch]
    query_ids: Int64[Tensor, " pairs"]
    target_ids: Int64[Tensor, " pairs"]
    negative_owner: Int64[Tensor, " negatives"]
    negative_match_prob: Float32[Tensor, " negatives"]
    negative_ids: Int64[Tensor, " negatives"]
    num_supervised: int
    bad_records: list[str]
    record_names: list[str]
    num_truncated: int = 0

    def pin_memory(self) -> "Batch":
        """Copy the tensors to page-locked memory. PyTorch's data loader calls it in a thread of its own."""
        return replace(
            self,
            micro_batches=[micro_batch.pin_memory() for micro_batch in self.micro_batches],
            query_ids=self.query_ids.pin_memory(),
            target_ids=self.target_ids.pin_memory(),
            negative_owner=self.negative_owner.pin_memory(),
            negative_match_prob=self.negative_match_prob.pin_memory(),
            negative_ids=self.negative_ids.pin_memory(),
        )


@dataclass(frozen=True)
class MicroBatchSize:
    """Limit what goes through the model at once; None sets no limit.

    Attributes:
        tokens: tokens, where those that branches share count once and padding does not count.
        crops: images for the vision tower, or the crops into which they are cut.
    """

    tokens: Annotated[int | None, Above(0)] = None
    crops: Annotated[int | None, Above(0)] = None

    def within(self, other: "MicroBatchSize") -> "MicroBatchSize":
        """Return the stricter of two sizes, limit by limit."""
        return MicroBatchSize(_stricter(self.tokens, other.tokens), _stricter(self.crops, other.crops))


def _stricter(first: int | None, second: int | None) -> int | None:
    """Return the lower of two limits, of which None sets no limit."""
    return min(filter(None, (first, second)), default=None)


NO_LIMIT = MicroBatchSize()


def collate_examples(
    examples: Sequence[EncodedExample],
    packing: PackingConfig,
    size: MicroBatchSize = NO_LIMIT,
    blank: Branch | None = None,
    bad_records: Sequence[str] = (),
) -> Batch:
    """Make a contrastive batch of some examples.

    Args:
        examples: the encoded examples.
        packing: how branches become packs.
        size: the largest micro-batch.
        blank: added to each pack without images, see `blank_branch`; None adds nothing.
        bad_records: why other records were skipped.
    """
    micro_batches = _make_micro_batches(examples, packing, size, blank)

    # What the contrastive loss needs to know of each pair and each hard negative, in the order of the embeddings.
    query_ids: list[int] = []
    target_ids: list[int] = []
    owners: list[int] = []
    match_prob: list[float] = []
    negative_ids: list[int] = []
    for example in examples:
        if example.embedding_branches:
            owners += [len(target_ids)] * len(example.negatives)
            match_prob += example.negative_match_prob
            negative_ids += example.negative_ids
            query_ids.append(example.query_id)
            target_ids.append(example.target_id)
    return Batch(
        micro_batches,
        query_ids=torch.tensor(query_ids, dtype=torch.long),
        target_ids=torch.tensor(target_ids, dtype=torch.long),
        negative_owner=torch.tensor(owners, dtype=torch.long),
        negative_match_prob=torch.tensor(match_prob, dtype=torch.float32),
        negative_ids=torch.tensor(negative_ids, dtype=torch.long),
        # Of all micro-batches: the language loss is a mean over the tokens of the batch, not a mean of means.
        num_supervised=sum(len(micro_batch.joint.labels) for micro_batch in micro_batches),
        bad_records=list(bad_records),
        record_names=[example.origin for example in examples],
        num_truncated=sum(example.is_truncated for example in examples),
    )


def _make_micro_batches(
    examples: Sequence[EncodedExample], packing: PackingConfig, size: MicroBatchSize, blank: Branch | None
) -> list[MicroBatch]:
    """Cut examples into micro-batches and pack each of them."""
    embedding = [example.embedding_branches for example in examples]
    language = [example.lm_branches for example in examples]
    slots = _assign_embedding_slots(examples)
    micro_batches: list[MicroBatch] = []
    for part in split_micro_batches(embedding, language, size):
        joint = pack_with_blank(embedding[part], language[part], packing, blank)
        # The gradient cache first embeds every micro-batch without its dialogues, but the first one, which it runs
        # once with everything. A micro-batch of one kind of branch needs no second pack either.
        runs_twice = len(micro_batches) > 0
        embedding_only = joint
        if all((runs_twice, any(embedding[part]), any(language[part]))):
            no_language: list[list[Branch]] = [[]] * len(language[part])
            embedding_only = pack_with_blank(embedding[part], no_language, packing, blank)
        part_slots = torch.tensor(list(chain.from_iterable(slots[part])), dtype=torch.long)
        micro_batches.append(MicroBatch(joint, embedding_only, part_slots))
    return micro_batches


def _assign_embedding_slots(examples: Sequence[EncodedExample]) -> list[list[int]]:
    """Return for each example the rows of its embedded branches: queries come first, then targets, then negatives."""
    num_pairs = sum(bool(example.embedding_branches) for example in examples)
    slots = []
    pair = 0
    first_negative = 2 * num_pairs
    for example in examples:
        if not example.embedding_branches:
            slots.append(list[int]())  # keeps examples and their slots side by side
            continue
        end = first_negative + len(example.negatives)
        slots.append([pair, num_pairs + pair, *range(first_negative, end)])
        pair += 1
        first_negative = end
    return slots


def split_micro_batches(
    embedding: Sequence[list[Branch]], language: Sequence[list[Branch]], size: MicroBatchSize
) -> list[slice]:
    """Cut examples into consecutive micro-batches. An example that is too large by itself gets one of its own.

    Args:
        embedding: for each example, the branches that are embedded.
        language: for each example, the branches that the language loss is taken on.
        size: the largest micro-batch.
    """
    if not embedding:
        return []
    cuts = []
    start, tokens, crops = 0, 0, 0
    for index, branches in enumerate(map(list.__add__, embedding, language)):
        # Examples share nothing with each other, so their sizes add up.
        example_tokens = count_unique_tokens(branches)
        example_crops = count_crops(branches)
        is_full = _exceeds(tokens + example_tokens, size.tokens) or _exceeds(crops + example_crops, size.crops)
        # The first example of a micro-batch is in it however large it is.
        if is_full and index > start:
            cuts.append(slice(start, index))
            start, tokens, crops = index, 0, 0
        tokens += example_tokens
        crops += example_crops
    return [*cuts, slice(start, len(embedding))]


def _exceeds(amount: int, limit: int | None) -> bool:
    """Return whether an amount is above a limit, if there is one."""
    if not limit:
        return False
    return amount > limit


def blank_branch(chat_processor: ChatProcessor, width: int = 64, height: int = 64) -> Branch:
    """Encode a prompt that shows a blank image of this size in pixels.

    It gets no gradient. Where the model is sharded over processes, each of them has to run the vision tower as often as
    any other, or they deadlock.
    """
    image = Image.new("RGB", (width, height))
    dialogue = Dialogue((Turn("user", Content.of(image)),))
    messages = dialogue_messages(dialogue, chat_processor.prompts)
    return chat_processor.encode_prompt(messages, chat_processor.process_images([image]))


def pack_with_blank(
    embedding: list[list[Branch]], language: list[list[Branch]], packing: PackingConfig, blank: Branch | None
) -> PackedBatch:
    """Pack some examples, and a blank image with them if none of them shows an image.

    Args:
        embedding: for each example, the branches that are embedded.
        language: for each example, the branches that the language loss is taken on.
        packing: how branches become packs.
        blank: see `blank_branch`; None adds nothing.
    """
    branches = chain.from_iterable((*embedding, *language))
    has_images = any(branch.image_inputs for branch in branches)
    if blank is not None and not has_images:
        # As a language branch without supervised tokens: it adds no embedding and no loss.
        embedding, language = [*embedding, []], [*language, [blank]]
    return pack(embedding, language, packing)
