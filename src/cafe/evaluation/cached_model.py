"""The model under evaluation as suites see it: batched, shared among processes, with what it gave kept.

Contents go through the model in chunks, always cut at the same places. A chunk is computed whole by one process and is
kept whole or not at all. So an evaluation that was killed goes on where it was, and ends with the same numbers, bit for
bit, as one never killed; several processes give what one gives.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from jaxtyping import Float, Float32
from PIL import Image
from tqdm import tqdm

from cafe.content import Content

CHUNK = 256  # contents computed between two keepings, where no batch size is given
BATCHES = 4  # of one chunk, where one is given


class CachedModel:
    """A model under evaluation.

    Args:
        model: a `Cafe`, or anything with its `embed` and `generate_batch`; suites that score, set prompts or keep need
            those methods too.
        cache_dir: a folder for what the model gives, as it comes; what is there already, from the same weights, prompts
            and batch size, is not computed again. Without it, embeddings are kept in memory.
        batch_size: contents at once; the model's own choice unless given.
        distributed: share the work among the processes of torch.distributed. All must then call alike.
        progress: show rate and time left of each call.
        judges: who judges free descriptions, as `judges.py` names them.
    """

    def __init__(
        self,
        model: Any,
        cache_dir: Path | None = None,
        batch_size: int | None = None,
        distributed: bool = False,
        progress: bool = False,
        judges: Sequence[str] = (),
    ) -> None:
        self.model: Any = model
        self.judges = tuple(judges)
        self.cache_dir = cache_dir
        self.fingerprint: str = model.fingerprint() if cache_dir else ""
        self.suite = ""  # shown beside the progress
        self._batch: dict[str, int] = {"batch_size": batch_size} if batch_size else {}
        self._size = BATCHES * batch_size if batch_size else CHUNK
        self._together = distributed
        shared = distributed and dist.is_initialized()
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        self._progress = progress and self._rank == 0
        self._memory: dict[str, np.ndarray] = {}
        if cache_dir:
            cache_dir.mkdir(parents=True, exist_ok=True)

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self._rank == 0

    def embed(self, contents: Sequence[Any]) -> Float32[np.ndarray, "contents dim"]:
        """Unit vectors of whatever `Content.of` takes."""
        chunks = self._each("embed", contents, lambda chunk: self.model.embed(chunk, **self._batch))
        return np.concatenate(chunks) if chunks else np.zeros((0, 0), np.float32)

    def generate(self, prompts: Sequence[Content], max_new_tokens: int) -> list[str]:
        """The likeliest answer to each content taken as a user's turn."""

        def compute(chunk: list[Content]) -> list[str]:
            answers: list[str] = self.model.generate_batch(chunk, max_new_tokens=max_new_tokens, **self._batch)
            return answers

        return [said for chunk in self._each(f"answer {max_new_tokens}", prompts, compute) for said in chunk]

    def score(self, contents: Sequence[Any], answers: Sequence[Sequence[str]]) -> list[Float[np.ndarray, " answers"]]:
        """The log-likelihood, in nats, of each of some answers to each content."""

        def compute(chunk: list[tuple[Any, tuple[str, ...]]]) -> list[list[float]]:
            asked, said = zip(*chunk, strict=True)
            return [scores.tolist() for scores in self.model.score_batch(asked, said, **self._batch)]

        pairs = [(content, tuple(said)) for content, said in zip(contents, answers, strict=True)]
        return [np.array(scores) for chunk in self._each("score", pairs, compute) for scores in chunk]

    def with_model(self, model: Any) -> "CachedModel":
        """Another model, evaluated in the same way."""
        other = CachedModel(
            model, self.cache_dir, self._batch.get("batch_size"), self._together, self._progress, self.judges
        )
        other.suite = self.suite
        return other

    def with_prompts(self, **changes: Any) -> "CachedModel":
        """The same weights with other prompts."""
        return self.with_model(self.model.with_prompts(**changes))

    def _each(self, kind: str, items: Sequence[Any], compute: Callable[[list[Any]], Any]) -> list[Any]:
        """What `compute` makes of each chunk, all chunks in order, on every process."""
        chunks = [list(items[start : start + self._size]) for start in range(0, len(items), self._size)]
        mine = range(self._rank, len(chunks), self._world)
        done: dict[int, Any] = {}
        bar = tqdm(
            total=sum(len(chunks[number]) for number in mine),
            desc=f"{self.suite} {kind.split()[0]}".strip(),
            unit="item",
            disable=not self._progress,
            leave=False,
        )
        with bar:
            for number in mine:
                done[number] = self._kept(kind, chunks[number], compute)
                bar.update(len(chunks[number]))
        if self._world > 1:
            parts: list[Any] = [None] * self._world
            dist.all_gather_object(parts, done)
            done = {number: value for part in parts for number, value in part.items()}
        return [done[number] for number in range(len(chunks))]

    def _kept(self, kind: str, chunk: list[Any], compute: Callable[[list[Any]], Any]) -> Any:
        described = [self.fingerprint, kind, str(self._batch), *map(_describe, chunk)]
        key = hashlib.sha256("\0".join(described).encode()).hexdigest()[:32]
        if self.cache_dir is None:
            if kind != "embed":
                return compute(chunk)
            if key not in self._memory:
                self._memory[key] = compute(chunk)
            return self._memory[key]
        path = self.cache_dir / f"{key}.{'npy' if kind == 'embed' else 'json'}"
        if not path.is_file():
            value = compute(chunk)
            buffer = io.BytesIO()
            if kind == "embed":
                np.save(buffer, value)
            else:
                buffer.write(json.dumps(value).encode())
            partial = path.with_suffix(".partial")
            partial.write_bytes(buffer.getvalue())
            os.replace(partial, path)
        return np.load(path) if kind == "embed" else json.loads(path.read_text())


def _describe(item: Any) -> str:
    """What a content is, in words that differ where the content does: a file is known by path, size and time."""
    if isinstance(item, tuple):
        return repr([_describe(part) for part in item])
    parts = []
    for part in Content.of(item).parts:
        source = part if isinstance(part, str) else part.source
        if isinstance(source, Path):
            stat = source.stat() if source.exists() else None
            source = f"{source.resolve()} {stat and (stat.st_size, stat.st_mtime_ns)}"
        elif isinstance(source, bytes):
            source = hashlib.sha256(source).hexdigest()
        elif isinstance(source, Image.Image):
            source = f"{source.size} {hashlib.sha256(source.tobytes()).hexdigest()}"
        parts.append((type(part).__name__, source))
    return repr(parts)
