"""Contrastive batches, and how they are cut into micro-batches."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from jaxtyping import Float32, Int64
from PIL import Image
from torch import Tensor

from cafe.content import Content, Dialogue, Turn
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import dialogue_messages
from cafe.packing import Branch, PackedBatch, count_crops, count_unique_tokens


@dataclass(frozen=True)
class MicroBatch:
    """Some examples of a contrastive batch, laid out for the model.

    Attributes:
        joint: all their branches.
        embedding_only: the embedded branches alone, for the gradient cache's first phase; `joint` itself where they are all, and
            in the first micro-batch, which is read once.
        embedding_slots: the place of each readout among the batch's embeddings.
    """

    joint: PackedBatch
    embedding_only: PackedBatch
    embedding_slots: Int64[Tensor, " readouts"]

    def pin_memory(self) -> "MicroBatch":
        """See `PackedBatch`."""
        joint = self.joint.pin_memory()
        embed = joint if self.embedding_only is self.joint else self.embedding_only.pin_memory()
        return MicroBatch(joint, embed, self.embedding_slots.pin_memory())


@dataclass(frozen=True)
class Batch:
    """One contrastive batch. Its embeddings are those of all queries, then of all targets, then of all hard negatives.

    Attributes:
        micro_batches: what goes through the model at once.
        target_ids: equal numbers for pairs with equal targets.
        negative_owner: the pair that each hard negative belongs to.
        negative_match_prob: how likely each hard negative matches its pair's query after all.
        negative_ids: as `target_ids`, for the hard negatives.
        num_supervised: the number of tokens that the language loss is taken on.
        bad_records: the messages of records left out.
        record_names: the file and record of each example.
    """

    micro_batches: list[MicroBatch]
    target_ids: Int64[Tensor, " pairs"]
    negative_owner: Int64[Tensor, " negatives"]
    negative_match_prob: Float32[Tensor, " negatives"]
    negative_ids: Int64[Tensor, " negatives"]
    num_supervised: int
    bad_records: list[str]
    record_names: list[str]

    def pin_memory(self) -> "Batch":
        """See `PackedBatch`; PyTorch's loader calls it, in a thread of its own."""
        micro_batches = [micro_batch.pin_memory() for micro_batch in self.micro_batches]
        names = ("target_ids", "negative_owner", "negative_match_prob", "negative_ids")
        tensors = {name: getattr(self, name).pin_memory() for name in names}
        return replace(self, micro_batches=micro_batches, **tensors)


@dataclass(frozen=True)
class MicroBatchSize:
    """How much goes through the model at once; None for no limit.

    Attributes:
        tokens: what branches share counts once, padding not at all.
        crops: pictures, or the parts into which they are cut, for the vision tower.
    """

    tokens: int | None = None
    crops: int | None = None

    def within(self, other: "MicroBatchSize") -> "MicroBatchSize":
        """No more than either of two."""
        limits = zip(astuple(self), astuple(other), strict=True)
        return MicroBatchSize(*(min(filter(None, both), default=None) for both in limits))


NO_LIMIT = MicroBatchSize()


def split_micro_batches(
    embedded: Sequence[list[Branch]], spoken: Sequence[list[Branch]], size: MicroBatchSize
) -> list[slice]:
    """Cuts examples, in their order, into micro-batches. An example that is too large makes one by itself."""
    cuts, start, tokens, crops = [], 0, 0, 0
    for index, branches in enumerate(map(list.__add__, embedded, spoken)):
        own_tokens, own_crops = count_unique_tokens(branches), count_crops(branches)
        full = (size.tokens and tokens + own_tokens > size.tokens) or (size.crops and crops + own_crops > size.crops)
        if full and index > start:
            cuts.append(slice(start, index))
            start, tokens, crops = index, 0, 0
        tokens, crops = tokens + own_tokens, crops + own_crops
    return [*cuts, slice(start, len(embedded))] if embedded else []


def blank_branch(chat_processor: ChatProcessor, width: int = 64, height: int = 64) -> Branch:
    """A prompt with a blank picture of so many pixels."""
    picture = Image.new("RGB", (width, height))
    messages = dialogue_messages(Dialogue((Turn("user", Content.of(picture)),)), chat_processor.prompts)
    return chat_processor.encode_prompt(messages, chat_processor.process_images([picture]))
