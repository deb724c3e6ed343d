"""Contrastive batches of token sequences in an order that the seed fixes."""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from random import Random

import torch
from torch.utils.data import Dataset

from cafe.content import Example
from cafe.data.batch import NO_LIMIT, Batch, MicroBatch, MicroBatchSize, blank_branch, split_micro_batches
from cafe.data.encoding import EncodedExample, encode_example
from cafe.data.mixture import PROPORTIONAL, EpochOrder, Mixture, epoch_order
from cafe.data.records import OpenedSource
from cafe.errors import CafeError
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import DEFAULT_PACKING, Branch, PackedBatch, PackingConfig, count_unique_tokens, pack

NUM_CHECKED_RECORDS = 100  # records, for what is trained


class ContrastiveBatchDataset(Dataset[Batch]):
    """Contrastive batch number n of a run, the same for the same seed whichever worker makes it.

    Args:
        sources: the opened sources.
        chat_processor: renders and tokenizes.
        batch_size: pairs of a batch in each process.
        seed: of the order and of every choice within records.
        max_tokens: the longest sequence.
        contrast, language: whether to make the branches of each loss.
        hard_negatives: whether to use the records' hard negatives.
        packing: how branches become packs.
        micro_batch_size: how much goes through the model at once.
        rank, world_size: which of several processes this is; each takes its own part of every batch.
        mixture: how the sources make one stream.
        blanks: show a blank picture, to which nothing comes, in each micro-batch that has none: where the model is
            sharded over processes, each of them must run the vision tower as often as any.
    """

    def __init__(
        self,
        sources: Sequence[OpenedSource],
        chat_processor: ChatProcessor,
        batch_size: int,
        seed: int,
        max_tokens: int | None = None,
        *,
        contrast: bool = True,
        language: bool = True,
        hard_negatives: bool = True,
        packing: PackingConfig = DEFAULT_PACKING,
        micro_batch_size: MicroBatchSize = NO_LIMIT,
        rank: int = 0,
        world_size: int = 1,
        mixture: Mixture = PROPORTIONAL,
        blanks: bool = False,
    ) -> None:
        self.sources, self.chat_processor, self.batch_size, self.seed = list(sources), chat_processor, batch_size, seed
        self.max_tokens, self.contrast, self.language, self.hard_negatives = (
            max_tokens,
            contrast,
            language,
            hard_negatives,
        )
        self.packing, self.micro_batch_size = packing, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.blank = blank_branch(chat_processor) if blanks else None
        self.mixture = mixture
        self._order = (0, self._draw_order(0))
        self.per_epoch = len(self._order[1].records) // (batch_size * world_size)
        self._check_first_records()

    def __len__(self) -> int:
        """Batches in one epoch; the indices go on beyond it."""
        return self.per_epoch

    def _check_first_records(self) -> None:
        """Makes sure that the first records hold something of what is trained."""
        idle = 0
        for place in range(min(NUM_CHECKED_RECORDS, len(self.order(0).records))):
            with suppress(CafeError):  # bad ones are told of as they come
                example = self._example_at(0, place)
                if example.pair or example.dialogue:
                    return
                idle += 1
        if idle:
            parts = [name for name, trained in (("pair", self.contrast), ("dialogue", self.language)) if trained]
            raise CafeError(f"None of the first {idle} records holds a {' or a '.join(parts)}, to be trained on.")

    def _example_at(self, epoch: int, place: int) -> Example:
        """The record at a place of an epoch's order, with what is trained of it; that may be nothing."""
        order = self.order(epoch)
        records = self.sources[int(order.sources[place])]
        example = records.example(int(order.records[place]), Random(f"{self.seed} {epoch} {place}"))
        pair = example.pair if self.contrast else None
        if pair and not self.hard_negatives:
            pair = replace(pair, negatives=(), negative_scores=())
        return Example(pair, example.dialogue if self.language else None, example.origin)

    def with_micro_batch_size(self, size: MicroBatchSize) -> "ContrastiveBatchDataset":
        """The same batches in micro-batches of another size."""
        other = copy.copy(self)
        other.micro_batch_size = size
        return other

    def largest_examples(self, count: int) -> list[EncodedExample]:
        """The first `count` examples of this process, those with most tokens first; bad ones are left out."""
        found = []
        start = self.rank * self.batch_size
        for place in range(start, start + min(count, self.batch_size)):
            try:
                example = self._example_at(0, place)
                if example.pair or example.dialogue:
                    found.append(encode_example(example, self.chat_processor, self.max_tokens))
            except CafeError:
                continue
        return sorted(found, key=lambda branches: -count_unique_tokens(branches.all))

    def collate(self, examples: list[EncodedExample]) -> Batch:
        """A batch of some examples."""
        return self._collate(examples, [], [""] * len(examples))

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch."""
        if self._order[0] != epoch:
            self._order = (epoch, self._draw_order(epoch))
        return self._order[1]

    def _draw_order(self, epoch: int) -> EpochOrder:
        return epoch_order(
            [records.chunks for records in self.sources],
            [records.source.shuffle_window for records in self.sources],
            [records.source.weight for records in self.sources],
            self.mixture,
            self.batch_size * self.world_size,
            Random(f"order {self.seed} {epoch}"),
        )

    def __getitem__(self, number: int) -> Batch:
        epoch, within = divmod(number, self.per_epoch)
        start = (within * self.world_size + self.rank) * self.batch_size
        done: list[EncodedExample] = []
        bad: list[str] = []
        names: list[str] = []
        for place in range(start, start + self.batch_size):
            try:
                example = self._example_at(epoch, place)
                if not (example.pair or example.dialogue):
                    continue
                done.append(encode_example(example, self.chat_processor, self.max_tokens))
            except CafeError as error:
                bad.append(str(error))
            else:
                names.append(example.origin)
        return self._collate(done, bad, names)

    def _collate(self, done: list[EncodedExample], bad: list[str], names: list[str]) -> Batch:
        pairs = sum(branches.query is not None for branches in done)
        embedded: list[list[Branch]] = []
        slots: list[list[int]] = []
        owners: list[int] = []
        scores: list[float] = []
        negative_ids: list[int] = []
        pair = 0
        for branches in done:
            embedded.append([])
            slots.append([])
            if branches.query and branches.target:
                embedded[-1] += [branches.query, branches.target, *branches.negatives]
                hard = 2 * pairs + len(owners)
                slots[-1] += [pair, pairs + pair, *range(hard, hard + len(branches.negatives))]
                owners += [pair] * len(branches.negatives)
                scores += branches.negative_match_prob
                negative_ids += branches.negative_ids
                pair += 1
        spoken = [[branches.dialogue] if branches.dialogue else [] for branches in done]
        cuts = split_micro_batches(embedded, spoken, self.micro_batch_size)
        micro_batches = []
        for part in cuts:
            joint = self._pack(embedded[part], spoken[part])
            one = part == cuts[0] or not (any(embedded[part]) and any(spoken[part]))
            embed = joint if one else self._pack(embedded[part], [[]] * len(spoken[part]))
            places = [slot for example in slots[part] for slot in example]
            micro_batches.append(MicroBatch(joint, embed, torch.tensor(places, dtype=torch.long)))
        return Batch(
            micro_batches,
            target_ids=torch.tensor([branches.target_id for branches in done if branches.query], dtype=torch.long),
            negative_owner=torch.tensor(owners, dtype=torch.long),
            negative_match_prob=torch.tensor(scores, dtype=torch.float32),
            negative_ids=torch.tensor(negative_ids, dtype=torch.long),
            num_supervised=sum(len(micro_batch.joint.labels) for micro_batch in micro_batches),
            bad_records=bad,
            record_names=names,
        )

    def _pack(self, embedded: list[list[Branch]], spoken: list[list[Branch]]) -> PackedBatch:
        shows = any(branch.image_inputs for group in (*embedded, *spoken) for branch in group)
        if self.blank and not shows:
            embedded, spoken = [*embedded, []], [*spoken, [self.blank]]
        return pack(embedded, spoken, self.packing)

    def blank_micro_batch(self) -> MicroBatch | None:
        """A micro-batch of a blank picture alone, where there are blanks."""
        if self.blank is None:
            return None
        empty = self._pack([], [])
        return MicroBatch(empty, empty, torch.empty(0, dtype=torch.long))
