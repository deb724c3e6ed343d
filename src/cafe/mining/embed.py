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
from cafe.errors import CafeError
from cafe.lvlm.forward import forward_packed
from cafe.mining.config import MiningConfig
from cafe.model import Cafe
from cafe.packing import Branch, PackedBatch, pack
from cafe.utils.dataloader import make_loader


class Examples:
    """Any record of some sources, the same whenever it is asked for."""

    def __init__(self, sources: Sequence[OpenedSource], seed: int) -> None:
        self.sources, self.seed = sources, seed

    def __getitem__(self, place: tuple[int, int]) -> Example:
        which, index = place
        return self.sources[which].example(index, Random(f"mine {self.seed} {which} {index}"))


@dataclass(frozen=True)
class EmbeddedPairs:
    """The pairs of some sources as unit vectors, in order.

    Attributes:
        places: (source, record) of each pair.
        query_ids, target_ids: equal numbers for equal contents.
        bad: why records are left out, by place.
    """

    places: list[tuple[int, int]]
    queries: Float32[np.ndarray, "pairs dim"]
    targets: Float32[np.ndarray, "pairs dim"]
    query_ids: Int64[np.ndarray, " pairs"]
    target_ids: Int64[np.ndarray, " pairs"]
    bad: dict[tuple[int, int], str]


@dataclass(frozen=True)
class _EncodedShard:
    """Some records' pairs, laid out for the model: the queries and targets in turn."""

    pack: PackedBatch | None
    places: list[tuple[int, int]]
    ids: list[tuple[int, int]]
    bad: dict[tuple[int, int], str]


class _Pairs(Dataset[_EncodedShard]):
    """The pairs of records number `start` and after."""

    def __init__(
        self, examples: Examples, places: list[tuple[int, int]], model: Cafe, size: int, max_tokens: int | None
    ) -> None:
        self.examples, self.places, self.size, self.max_tokens = examples, places, size, max_tokens
        self.chat_processor, self.packing = model.chat_processor, model.packing

    def __getitem__(self, start: int) -> _EncodedShard:
        groups: list[list[Branch]] = []
        places, ids, bad = [], [], {}
        for place in self.places[start : start + self.size]:
            try:
                example = self.examples[place]
                if not example.pair:
                    continue
                pair = replace(example.pair, negatives=(), negative_scores=())
                branches = encode_example(Example(pair, None, example.origin), self.chat_processor, self.max_tokens)
            except CafeError as error:
                bad[place] = str(error)
                continue
            if branches.query and branches.target:
                groups.append([branches.query, branches.target])
                places.append(place)
                ids.append((content_hash(pair.query), content_hash(pair.target)))
        laid = pack(groups, [[]] * len(groups), self.packing) if groups else None
        return _EncodedShard(laid, places, ids, bad)


@torch.inference_mode()
def embed_pairs(
    model: Cafe, examples: Examples, places: list[tuple[int, int]], mining: MiningConfig, max_tokens: int | None = None
) -> EmbeddedPairs:
    """Embeds the query and the target of every record that has them."""
    data = _Pairs(examples, places, model, mining.batch_size, max_tokens)
    starts = range(0, len(places), mining.batch_size)
    stream = make_loader(data, starts, mining.workers)
    kept: list[tuple[int, int]] = []
    vectors, ids, bad = [], [], {}
    for part in tqdm(stream, desc="embed", unit="batch", total=len(starts)):
        bad.update(part.bad)
        if part.pack is not None:
            hidden, _ = forward_packed(model.lvlm, part.pack)
            vectors.append(F.normalize(hidden.float(), dim=-1).cpu().numpy())
            kept += part.places
            ids += part.ids
    dim = model.lvlm.config.get_text_config().hidden_size
    both = np.concatenate([np.empty((0, dim), np.float32), *vectors])
    numbers = np.array(ids, np.int64).reshape(-1, 2)
    return EmbeddedPairs(kept, both[::2], both[1::2], numbers[:, 0], numbers[:, 1], bad)
