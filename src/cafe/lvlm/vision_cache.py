"""A frozen vision tower reads each crop once a step; once for ever where a directory keeps what it made of it.

A crop is known by a hash of its pixels as the tower gets them, so preprocessing is part of the key; so are the tower's
weights, in a directory. `parse_tower_inputs` tells how a tower is given pictures and lays out what it makes of them; a tower of a
kind that it does not know reads as ever.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

PACKED_TOWERS = ("pixtral",)  # towers that lay what they make of all pictures in one row


@dataclass(frozen=True)
class TowerInputs:
    """The crops, or whole pictures, that a tower is given.

    Attributes:
        hashes: a hash of each.
        input_rows: of the pixels, that each has.
        output_rows: of what the tower makes of all: as large as these numbers beside each other.
        dim: along which it lays that out.
    """

    hashes: list[int]
    input_rows: list[int]
    output_rows: list[int]
    dim: int = 0


def parse_tower_inputs(pixels: Tensor, named: Mapping[str, Any], patch: int | None) -> TowerInputs | None:
    """What a tower is given, from its arguments; None where that is not known.

    Args:
        pixels: crops as (crops, channels, height, width), each read by itself; or patches of all pictures, whose grids
            are told (Qwen's towers); or of each picture, filled up, with their positions (Gemma 4's).
        named: the other arguments.
        patch: pixels a side of a patch, for a tower that reads parts of crops and lays them end to end (Pixtral's).
    """
    if "grid_thw" in named:
        sizes = named["grid_thw"].prod(1).tolist()
        return TowerInputs(hash_patched_images(pixels, named["grid_thw"]).tolist(), sizes, sizes)
    each = [1] * len(pixels)
    if "pixel_position_ids" in named:
        at = named["pixel_position_ids"]
        keys = hash_rows(torch.stack([hash_rows(pixels), hash_rows(at)], dim=1))
        return TowerInputs(keys.tolist(), each, (at >= 0).all(dim=2).sum(1).tolist())
    if pixels.ndim != 4:
        return None
    if patch is None:
        return TowerInputs(hash_rows(pixels).tolist(), each, each)
    sizes = named["image_sizes"].tolist() if "image_sizes" in named else [list(pixels.shape[2:])] * len(pixels)
    parts = [crop[None, :, :height, :width] for crop, (height, width) in zip(pixels, sizes, strict=True)]
    numbers = [[*size, int(hash_rows(part))] for size, part in zip(sizes, parts, strict=True)]
    keys = hash_rows(torch.tensor(numbers, device=pixels.device))
    return TowerInputs(keys.tolist(), each, [(height // patch) * (width // patch) for height, width in sizes], dim=1)


class VisionCache:
    """What a frozen tower made of each crop.

    Args:
        tower: the tower.
        config: of its model, which says what is read of the tower's output.
        directory: where to keep it for later steps and runs; None for one step only.
    """

    def __init__(self, tower: nn.Module, config: PreTrainedConfig, directory: Path | None = None) -> None:
        self.tower = tower
        self.layers = feature_layers(config)
        own: Any = getattr(tower, "config", None)
        self.patch: int | None = own.patch_size if getattr(own, "model_type", "") in PACKED_TOWERS else None
        self.directory = None
        if directory:
            self.directory = directory / "_".join([weights_digest(tower), *map(str, self.layers or [])])
        self.cached: dict[int, Any] = {}

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Within it, the tower reads no crop twice."""
        read = self.tower.forward
        self.tower.forward = lambda *args, **named: self._forward(read, args, named)
        try:
            yield
        finally:
            self.tower.forward = read
            self.cached.clear()

    @torch.no_grad()
    def _forward(self, read: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """What the tower makes of its arguments, of which it is given the crops that it has not read yet."""
        pixels: Tensor = named["pixel_values"] if "pixel_values" in named else args[0]
        crops = parse_tower_inputs(pixels, named, self.patch)
        if crops is None:
            return read(*args, **named)
        keys = crops.hashes
        unread = {
            key: place
            for place, key in enumerate(keys)
            if key not in self.cached and not self._load(key, pixels.device)
        }
        if unread:

            def choose(value: Any) -> Any:
                """Of what there is for each row of pixels, or each crop, that of the unread crops."""
                if not isinstance(value, Tensor) or len(value) not in (len(pixels), len(keys)):
                    return value
                parts = value.split(crops.input_rows if len(value) == len(pixels) else 1)
                return torch.cat([parts[place] for place in unread.values()])

            if len(unread) < len(keys):
                args, named = tuple(map(choose, args)), {name: choose(value) for name, value in named.items()}
            made = read(*args, **named)
            self._drop_unread_outputs(made)
            stops = list(accumulate(crops.output_rows[place] for place in unread.values()))
            for key, start, stop in zip(unread, [0, *stops], stops, strict=False):
                self.cached[key] = _part(made, start, stop, stops[-1], crops.dim)
                self._save(key)
            if len(unread) == len(keys):
                return made  # what is kept are views of it: a step of one micro-batch holds nothing twice
        again = [self.cached[key] for key in keys]
        return tree_map(lambda *leaves: None if leaves[0] is None else torch.cat(leaves, crops.dim), *again)

    def _drop_unread_outputs(self, made: ModelOutput) -> None:
        """Drops what the model does not read; older versions of transformers return the hidden states of all layers."""
        if hasattr(self.tower, "merger"):  # the projector is in it
            made["last_hidden_state"] = None
        if self.layers is None or not made.get("hidden_states"):
            return
        states = made["hidden_states"]
        chosen = {range(len(states))[layer] for layer in self.layers}
        made["hidden_states"] = tuple(each if index in chosen else None for index, each in enumerate(states))
        if chosen:
            made["last_hidden_state"] = None

    def _load(self, key: int, device: torch.device) -> bool:
        file = self._file(key)
        if file and file.is_file():
            self.cached[key] = torch.load(file, map_location=device, weights_only=False)
            return True
        return False

    def _save(self, key: int) -> None:
        file = self._file(key)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{uuid4().hex}.partial")  # another process may write the same
            torch.save(tree_map_only(Tensor, Tensor.clone, self.cached[key]), partial)
            partial.replace(file)

    def _file(self, key: int) -> Path | None:
        return self.directory / f"{key % 2**64:016x}.pt" if self.directory else None


def feature_layers(config: PreTrainedConfig) -> list[int] | None:
    """The hidden states of its tower that a model reads: none, if it reads the last one behind the final norm.

    None for families of which it is not known.
    """
    if config.model_type not in ("llava", "llava_next", "llava_onevision", "internvl"):
        return None
    layers = config.vision_feature_layer
    if config.model_type == "internvl" and layers == -1:
        return []
    return [layers] if isinstance(layers, int) else list(layers)


def _part(made: Any, start: int, stop: int, total: int, dim: int) -> Any:
    """What the tower made of some of the crops that it read, which it may have merged as much everywhere."""

    def cut(leaf: Tensor) -> Tensor:
        first, last = (place * leaf.shape[dim] // total for place in (start, stop))
        return leaf.narrow(dim, first, last - first)

    return tree_map_only(Tensor, cut, made)


def hash_rows(crops: Float[Tensor, " crops *shape"]) -> Int64[Tensor, " crops"]:
    """A hash of each crop's bits: a sum of products with fixed random numbers, exact in whatever order it is taken."""
    bits = crops.flatten(1).contiguous().view(torch.int16)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, bits.shape[1:], generator=generator).to(crops.device)
    return (bits.long() * factors).sum(1)


def hash_patched_images(
    patches: Float[Tensor, "patches dim"], grids: Int64[Tensor, "pictures 3"]
) -> Int64[Tensor, " pictures"]:
    """The same of pictures whose patches are laid end to end: a picture is its patches and its grid."""
    of_patches = hash_rows(patches).split(grids.prod(1).tolist())
    each = [torch.cat([grid, own])[None] for grid, own in zip(grids, of_patches, strict=True)]
    return torch.cat([hash_rows(numbers) for numbers in each])


def weights_digest(module: nn.Module) -> str:
    """A name for a module's weights."""
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
