"""Embed the query and the target of every record."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float32, Int64
from torch.utils.data import Dataset
from tqdm import tqdm

from cafe.content import Example
from cafe.data.encoding import content_hash, encode_example
from cafe.data.records import OpenedSource
from cafe.errors import RecordError
from cafe.lvlm.forward import forward_packed
from cafe.mining.config import MiningConfig
from cafe.model import Cafe
from cafe.packing import Branch, PackedBatch, pack
from cafe.utils.dataloader import make_loader

RecordKey = tuple[int, int]  # (source, record within it)


class Examples:
    """Read any record of some sources by its key; it is the same every time."""

    def __init__(self, sources: Sequence[OpenedSource], seed: int) -> None:
        self.sources, self.seed = sources, seed

    def keys(self) -> list[RecordKey]:
        """Return the keys of all records, in order."""
        keys: list[RecordKey] = []
        for source, opened in enumerate(self.sources):
            keys += [(source, record) for record in range(len(opened))]
        return keys

    def __getitem__(self, key: RecordKey) -> Example:
        source, record = key
        # Seeded by the key alone: a record is read several times, and must have the same caption each time.
        return self.sources[source].example(record, Random(f"mine {self.seed} {source} {record}"))


@dataclass(frozen=True)
class EmbeddedPairs:
    """Hold the pairs of some sources as unit vectors, in order.

    Attributes:
        record_keys: the record of each pair.
        queries, targets: the embeddings.
        query_ids, target_ids: hashes of the contents; equal contents have equal numbers.
        bad_records: why records are skipped.
    """

    record_keys: list[RecordKey]
    queries: Float32[np.ndarray, "pairs dim"]
    targets: Float32[np.ndarray, "pairs dim"]
    query_ids: Int64[np.ndarray, " pairs"]
    target_ids: Int64[np.ndarray, " pairs"]
    bad_records: dict[RecordKey, str]


@dataclass(frozen=True)
class _EncodedPairs:
    """Hold some records' pairs, packed for the model: query and target in turn; None if there are none.

    Attributes:
        packed: the model's inputs.
        record_keys: the record of each pair.
        ids: hashes of each query and target.
        bad_records: why records are skipped.
    """

    packed: PackedBatch | None
    record_keys: list[RecordKey]
    ids: list[tuple[int, int]]
    bad_records: dict[RecordKey, str]


class _PairDataset(Dataset[_EncodedPairs]):
    """Encode the pairs of `size` records from number `start` on."""

    def __init__(
        self, examples: Examples, record_keys: list[RecordKey], model: Cafe, size: int, max_tokens: int | None
    ) -> None:
        self.examples, self.record_keys, self.size, self.max_tokens = examples, record_keys, size, max_tokens
        self.chat_processor, self.packing = model.chat_processor, model.packing

    def __getitem__(self, start: int) -> _EncodedPairs:
        groups: list[list[Branch]] = []
        record_keys, ids, bad_records = [], [], {}
        for key in self.record_keys[start : start + self.size]:
            try:
                example = self.examples[key]
                if not example.pair:
                    continue
                # Mined negatives replace those of the record, and the dialogue is not embedded.
                pair = replace(example.pair, negatives=(), negative_scores=())
                encoded = encode_example(Example(pair, None, example.origin), self.chat_processor, self.max_tokens)
            except RecordError as error:
                bad_records[key] = str(error)
                continue
            groups.append(encoded.embedding_branches)
            record_keys.append(key)
            ids.append((content_hash(pair.query), content_hash(pair.target)))
        # Packed here, in a worker, so that the main process only runs the model.
        packed = pack(groups, [[]] * len(groups), self.packing) if groups else None
        return _EncodedPairs(packed, record_keys, ids, bad_records)


@torch.inference_mode()
def embed_pairs(
    model: Cafe,
    examples: Examples,
    record_keys: list[RecordKey],
    config: MiningConfig,
    max_tokens: int | None = None,
) -> EmbeddedPairs:
    """Embed the query and the target of every record that has them.

    Args:
        model: embeds them.
        examples: all records.
        record_keys: the records to embed.
        config: batch size and workers.
        max_tokens: the longest sequence.
    """
    dataset = _PairDataset(examples, record_keys, model, config.batch_size, max_tokens)
    starts = range(0, len(record_keys), config.batch_size)
    stream = make_loader(dataset, starts, config.workers)

    embedded_keys: list[RecordKey] = []
    vectors, ids, bad_records = [], [], {}
    for batch in tqdm(stream, desc="embed", unit="batch", total=len(starts)):
        bad_records.update(batch.bad_records)
        if batch.packed is not None:
            hidden, _ = forward_packed(model.lvlm, batch.packed)
            # In float32 and on the CPU: the search is exact, and the GPU keeps its memory for the model.
            vectors.append(F.normalize(hidden.float(), dim=-1).cpu().numpy())
            embedded_keys += batch.record_keys
            ids += batch.ids

    # Rows hold query and target in turn; the empty array gives the shape where there is no pair at all.
    dim = model.lvlm.config.get_text_config().hidden_size
    rows = np.concatenate([np.empty((0, dim), np.float32), *vectors])
    content_ids = np.array(ids, np.int64).reshape(-1, 2)
    return EmbeddedPairs(embedded_keys, rows[::2], rows[1::2], content_ids[:, 0], content_ids[:, 1], bad_records)
