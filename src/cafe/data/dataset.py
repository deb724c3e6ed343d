"""Contrastive batches of a run, in an order that the seed fixes.

A bad record is left out of its batch; its error goes along with the batch, to be written to the quarantine file.
"""

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import compress
from random import Random

import numpy as np
import torch
from torch.utils.data import Dataset

from cafe.content import Example
from cafe.data.batch import NO_LIMIT, Batch, MicroBatch, MicroBatchSize, blank_branch, collate_examples, pack_with_blank
from cafe.data.encoding import EncodedExample, encode_example
from cafe.data.first_records import NUM_CHECKED_RECORDS, check_first_records
from cafe.data.mixture import PROPORTIONAL, EpochOrder, Mixture, epoch_order
from cafe.data.records import OpenedSource
from cafe.errors import RecordError
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import DEFAULT_PACKING, PackingConfig, count_unique_tokens


class ContrastiveBatchDataset(Dataset[Batch]):
    """Make contrastive batch number n of a run; it is the same for the same seed, whichever worker makes it.

    Args:
        sources: the opened sources.
        chat_processor: renders and tokenizes.
        batch_size: records per batch in each process.
        seed: fixes the order and every choice within records.
        max_tokens: the longest sequence.
        contrast, language: whether to make the branches of each loss.
        hard_negatives: whether to use the records' hard negatives.
        packing: how branches become packs.
        micro_batch_size: the largest micro-batch.
        rank, world_size: this process and the number of them; each takes its own part of every batch.
        mixture: how the sources are mixed.
        add_blank_images: add a blank image to each micro-batch without images, as sharded models need.
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
        add_blank_images: bool = False,
    ) -> None:
        self.sources = list(sources)
        self.chat_processor = chat_processor
        self.batch_size = batch_size
        self.seed = seed
        self.max_tokens = max_tokens
        self.contrast = contrast
        self.language = language
        self.hard_negatives = hard_negatives
        self.packing = packing
        self.micro_batch_size = micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.mixture = mixture
        self.blank = blank_branch(chat_processor) if add_blank_images else None

        self._order = (0, self._draw_order(0))  # of the epoch that was asked for last
        self.per_epoch = len(self.order(0).records) // (batch_size * world_size)
        self._check_first_records()

    def __len__(self) -> int:
        """Return the number of batches in one epoch; the indices continue beyond it."""
        return self.per_epoch

    def __getitem__(self, number: int) -> Batch:
        """Make a batch; `number` counts on from one epoch to the next."""
        # A global batch is a stretch of the epoch's order; each rank takes a stretch of that.
        epoch, within = divmod(number, self.per_epoch)
        start = (within * self.world_size + self.rank) * self.batch_size
        examples: list[EncodedExample] = []
        bad_records: list[str] = []
        for position in range(start, start + self.batch_size):
            try:
                encoded = self._encode_at(epoch, position)
            except RecordError as error:
                bad_records.append(str(error))
                continue
            if encoded is not None:
                examples.append(encoded)
        return collate_examples(examples, self.packing, self.micro_batch_size, self.blank, bad_records)

    def collate(self, examples: list[EncodedExample]) -> Batch:
        """Make a batch of some examples."""
        return collate_examples(examples, self.packing, self.micro_batch_size, self.blank)

    def with_micro_batch_size(self, size: MicroBatchSize) -> "ContrastiveBatchDataset":
        """Return a dataset of the same batches in micro-batches of another size."""
        # A shallow copy: the opened files and the order of the epoch are the same.
        other = copy.copy(self)
        other.micro_batch_size = size
        return other

    def blank_micro_batch(self) -> MicroBatch | None:
        """Return a micro-batch of a blank image alone; None without `add_blank_images`."""
        if self.blank is None:
            return None
        empty = pack_with_blank([], [], self.packing, self.blank)
        return MicroBatch(empty, empty, torch.empty(0, dtype=torch.long))

    def largest_examples(self, count: int) -> list[EncodedExample]:
        """Return the first `count` good examples of this process, those with most tokens first."""
        examples = []
        start = self.rank * self.batch_size
        for position in range(start, start + min(count, self.batch_size)):
            with suppress(RecordError):  # reported when its batch is made
                encoded = self._encode_at(0, position)
                if encoded is not None:
                    examples.append(encoded)
        # The sort is stable, so all ranks and all runs measure the same examples.
        return sorted(examples, key=lambda example: -count_unique_tokens(example.all))

    def order(self, epoch: int) -> EpochOrder:
        """Return the order of an epoch."""
        if self._order[0] != epoch:
            self._order = (epoch, self._draw_order(epoch))
        return self._order[1]

    def _draw_order(self, epoch: int) -> EpochOrder:
        # A generator of its own for each epoch: a resumed run draws the same order without drawing the earlier ones.
        return epoch_order(
            [opened.chunks for opened in self.sources],
            [opened.source.shuffle_window for opened in self.sources],
            [opened.source.weight for opened in self.sources],
            self.mixture,
            self.batch_size * self.world_size,
            Random(f"order {self.seed} {epoch}"),
        )

    def _check_first_records(self) -> None:
        """Make sure that the first records of each source hold what is trained on: see `check_first_records`."""
        drawn_from = self.order(0).sources
        positions = [np.flatnonzero(drawn_from == number)[:NUM_CHECKED_RECORDS] for number in range(len(self.sources))]
        wanted = compress(("pair", "dialogue"), (self.contrast, self.language))
        check_first_records(self.sources, positions, lambda position: self._example_at(0, position), list(wanted))

    def _encode_at(self, epoch: int, position: int) -> EncodedExample | None:
        """Encode the record at a position of an epoch's order; None if nothing of it is trained.

        Raises:
            RecordError: the record is bad.
        """
        example = self._example_at(epoch, position)
        if example.pair is None and example.dialogue is None:
            return None
        return encode_example(example, self.chat_processor, self.max_tokens)

    def _example_at(self, epoch: int, position: int) -> Example:
        """Read the record at a position of an epoch's order, and drop what is not trained.

        Raises:
            RecordError: the record is bad.
        """
        order = self.order(epoch)
        opened = self.sources[int(order.sources[position])]
        # Choices within the record, such as its caption, are fixed by its position alone.
        rng = Random(f"{self.seed} {epoch} {position}")
        example = opened.example(int(order.records[position]), rng)
        if not self.contrast:
            example = replace(example, pair=None)
        if not self.language:
            example = replace(example, dialogue=None)
        if example.pair and not self.hard_negatives:
            example = replace(example, pair=replace(example.pair, negatives=(), negative_scores=()))
        return example
