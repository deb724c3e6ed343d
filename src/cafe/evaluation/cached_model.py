"""The model under evaluation as suites see it: batched, split among processes, with its outputs cached.

Inputs are processed in chunks with fixed boundaries. One process computes a whole chunk, and a chunk is cached whole or
not at all; a damaged one is computed again. An interrupted evaluation therefore resumes where it stopped and ends with
the same numbers, bit for bit, as an uninterrupted one, and several processes give the same results as one.
"""

import hashlib
import io
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from jaxtyping import Float, Float32
from PIL import Image
from tqdm import tqdm

from cafe.content import Content, ImageRef
from cafe.utils.atomic import atomic_write_bytes

logger = logging.getLogger(__name__)

CHUNK_SIZE = 256  # inputs per chunk, if no batch size is given
BATCHES_PER_CHUNK = 4  # if one is


class CachedModel:
    """Wrap a model under evaluation.

    Args:
        model: a `Cafe`, or anything with its `embed` and `generate_batch`; `score`, `with_prompts` and the cache also
            need its methods of these names.
        cache_dir: a folder for the model's outputs, as they are computed; what the same weights, prompts and batch size
            have written there is not computed again. Without it, embeddings are cached in memory.
        batch_size: number of inputs per forward pass; the model's own choice if None.
        distributed: split the work among the processes of torch.distributed, all of which must make the same calls.
        progress: show a progress bar for each call.
        judges: the judges of free descriptions, as `judges.py` names them.
        max_new_tokens: the maximum number of tokens in an answer where a suite's own is larger.
    """

    def __init__(
        self,
        model: Any,
        cache_dir: Path | None = None,
        batch_size: int | None = None,
        distributed: bool = False,
        progress: bool = False,
        judges: Sequence[str] = (),
        max_new_tokens: int | None = None,
    ) -> None:
        self.model: Any = model
        self.judges = tuple(judges)
        self._max_new_tokens = max_new_tokens
        self.suite = ""  # shown in the progress bar
        # Without a batch size, none is passed on, and the model uses its own.
        self._batch_size = batch_size
        self._options: dict[str, int] = {}
        self._chunk_size = CHUNK_SIZE
        if batch_size:
            self._options["batch_size"] = batch_size
            self._chunk_size = BATCHES_PER_CHUNK * batch_size
        self._distributed = distributed
        self._rank, self._world_size = 0, 1
        if distributed and dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._progress = progress
        self._memory: dict[str, np.ndarray] = {}
        self.cache_dir = cache_dir
        self.fingerprint = ""
        if cache_dir:
            self.fingerprint = model.fingerprint()
            cache_dir.mkdir(parents=True, exist_ok=True)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and log lines."""
        return self._rank == 0

    def embed(self, contents: Sequence[Any]) -> Float32[np.ndarray, "contents dim"]:
        """Embed anything that `Content.of` takes as unit vectors."""
        chunks = self._map_chunks("embed", contents, partial(self.model.embed, **self._options))
        if not chunks:  # which `concatenate` refuses
            return np.zeros((0, 0), np.float32)
        return np.concatenate(chunks)

    def generate(self, prompts: Sequence[Content], max_new_tokens: int) -> list[str]:
        """Generate the most likely answer to each content, taken as the user's turn."""
        max_new_tokens = min(max_new_tokens, self._max_new_tokens or max_new_tokens)
        compute = partial(self.model.generate_batch, max_new_tokens=max_new_tokens, **self._options)
        # The limit is in the cache's key: with another one, answers may be cut elsewhere.
        chunks = self._map_chunks(f"answer {max_new_tokens}", prompts, compute)
        return list(chain.from_iterable(chunks))

    def score(
        self, contents: Sequence[Any], answers: Sequence[Sequence[str]], with_end: bool = True
    ) -> list[Float[np.ndarray, " answers"]]:
        """Compute the log-likelihood, in nats, of each of several answers to each content; see `Cafe.score_batch`."""
        pairs = list(zip(contents, map(tuple, answers), strict=True))
        # The option is in the cache's key, by the kind, and is passed on only where it is not the default.
        kind, options = ("score", {}) if with_end else ("score beginnings", {"with_end": False})
        chunks = self._map_chunks(kind, pairs, partial(self._score_chunk, options))
        return list(map(np.array, chain.from_iterable(chunks)))

    def _score_chunk(self, options: dict[str, bool], chunk: list[tuple[Any, tuple[str, ...]]]) -> list[list[float]]:
        """Score the answers to each content of a chunk, as lists, which JSON can hold."""
        contents, answers = zip(*chunk, strict=True)
        scores = self.model.score_batch(contents, answers, **self._options, **options)
        return [of_content.tolist() for of_content in scores]

    def with_model(self, model: Any) -> "CachedModel":
        """Return another model, evaluated in the same way."""
        options = (self._batch_size, self._distributed, self._progress, self.judges, self._max_new_tokens)
        other = CachedModel(model, self.cache_dir, *options)
        other.suite = self.suite
        return other

    def with_prompts(self, **changes: Any) -> "CachedModel":
        """Return the same weights with other prompts."""
        return self.with_model(self.model.with_prompts(**changes))

    def _map_chunks(self, kind: str, items: Sequence[Any], compute: Callable[[list[Any]], Any]) -> list[Any]:
        """Compute every chunk and return all of them in order, on every process.

        Args:
            kind: the call, for the cache's key and the progress bar; "embed" if the outputs are arrays.
            items: the inputs.
            compute: returns the output of a chunk.
        """
        size = self._chunk_size
        chunks = [list(items[start : start + size]) for start in range(0, len(items), size)]
        # Chunks are dealt in turn, so that all processes have work until the end.
        own = range(self._rank, len(chunks), self._world_size)
        outputs: dict[int, Any] = {}
        with self._progress_bar(kind, sum(len(chunks[index]) for index in own)) as bar:
            for index in own:
                outputs[index] = self._cached(kind, chunks[index], compute)
                bar.update(len(chunks[index]))
        # Every process gets all outputs, so that suites need not know that there are several.
        if self._world_size > 1:
            outputs = self._all_gather(outputs)
        return [outputs[index] for index in range(len(chunks))]

    def _progress_bar(self, kind: str, total: int) -> "tqdm[Any]":
        """Make the progress bar of a call, which only the main process shows."""
        return tqdm(
            total=total,
            desc=f"{self.suite} {kind.split()[0]}".strip(),
            unit="item",
            disable=not (self._progress and self.is_main_process),
            leave=False,
        )

    def _all_gather(self, outputs: dict[int, Any]) -> dict[int, Any]:
        """Collect the chunks' outputs of all processes, by the chunk's number."""
        by_rank: list[Any] = [None] * self._world_size
        dist.all_gather_object(by_rank, outputs)
        merged: dict[int, Any] = {}
        for own in by_rank:
            merged |= own
        return merged

    def _cached(self, kind: str, chunk: list[Any], compute: Callable[[list[Any]], Any]) -> Any:
        """Return a chunk's output from the cache, computing it if it is not there."""
        # The key holds everything the output depends on: weights and prompts, the call, the batch size, the inputs.
        parts = [self.fingerprint, kind, str(self._options), *map(_describe, chunk)]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
        if self.cache_dir is None:
            return self._cached_in_memory(kind, key, chunk, compute)
        suffix = "npy" if kind == "embed" else "json"
        path = self.cache_dir / f"{key}.{suffix}"
        output = _load(kind, path, len(chunk)) if path.is_file() else None
        if output is None:
            encoded = _serialize(kind, compute(chunk))
            atomic_write_bytes(path, encoded)
            # Even what was just computed is read back, so that a resumed evaluation cannot differ.
            output = _deserialize(kind, encoded)
        return output

    def _cached_in_memory(self, kind: str, key: str, chunk: list[Any], compute: Callable[[list[Any]], Any]) -> Any:
        """Return a chunk's embeddings from memory; compute anything else."""
        # Several suites ask for the same embeddings, but not for the same answers or scores.
        if kind != "embed":
            return compute(chunk)
        if key not in self._memory:
            self._memory[key] = compute(chunk)
        return self._memory[key]


def _load(kind: str, path: Path, count: int) -> Any:
    """Read the output of a chunk; None, with a line in the log, if the file is damaged.

    Args:
        kind: the call.
        path: the file.
        count: number of inputs in the chunk.
    """
    # NumPy raises EOFError for an empty file, and TypeError, KeyError and SyntaxError for a damaged header.
    try:
        output = _deserialize(kind, path.read_bytes())
        is_whole = len(output) == count and _has_kind(kind, output)
    except (ValueError, TypeError, KeyError, EOFError, SyntaxError, RecursionError, MemoryError):
        is_whole = False
    if not is_whole:
        logger.warning("The cached result %s is damaged; computing it again.", path)
        return None
    return output


def _has_kind(kind: str, output: Any) -> bool:
    """Tell whether a chunk's output is what the call gives: rows of numbers, texts, or lists of numbers."""
    if kind == "embed":
        return bool(output.ndim == 2 and np.issubdtype(output.dtype, np.floating))
    if kind.startswith("score"):
        return all(isinstance(score, float) for score in chain.from_iterable(output))
    return isinstance(output, list) and all(isinstance(answer, str) for answer in output)


def _deserialize(kind: str, encoded: bytes) -> Any:
    """Read what `_serialize` wrote."""
    return np.load(io.BytesIO(encoded)) if kind == "embed" else json.loads(encoded)


def _serialize(kind: str, output: Any) -> bytes:
    """Write embeddings as an `npy` file, answers and scores as JSON."""
    if kind != "embed":
        return json.dumps(output).encode()
    buffer = io.BytesIO()
    np.save(buffer, output)
    return buffer.getvalue()


def _describe(item: Any) -> str:
    """Describe an input by a text that differs whenever the input does."""
    if isinstance(item, tuple):
        return repr(list(map(_describe, item)))
    # With its type, so that a text cannot pass for an image.
    parts = [(type(part).__name__, _describe_part(part)) for part in Content.of(item).parts]
    return repr(parts)


def _describe_part(part: str | ImageRef) -> str:
    """Describe a text by itself, a file by its metadata, and an image in memory by its digest."""
    if isinstance(part, str):
        return part
    match part.source:
        case Path() as path:
            return _describe_file(path)
        case bytes() as encoded:
            return hashlib.sha256(encoded).hexdigest()
        case Image.Image() as image:
            return f"{image.size} {hashlib.sha256(image.tobytes()).hexdigest()}"


def _describe_file(path: Path) -> str:
    """Describe a file by path, size and time of change."""
    # Reading every image to hash it would take as long as embedding it.
    if not path.exists():
        return f"{path.resolve()} None"
    stat = path.stat()
    return f"{path.resolve()} {(stat.st_size, stat.st_mtime_ns)}"
