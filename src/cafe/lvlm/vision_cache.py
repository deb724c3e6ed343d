"""Run a frozen vision tower on each crop once per step, or once ever if its features are kept.

A crop is identified by a hash of its pixels as the tower is given them, so preprocessing is part of the key; in a
directory, so are the tower's weights. `parse_tower_inputs` knows how towers are given images and lay out their output;
a tower of another kind is called as usual.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from cafe.lvlm.families import contains_projector, feature_layers, packed_patch_size
from cafe.lvlm.vision_files import DAMAGE, load_output, save_output
from cafe.utils.hashing import iter_tensor_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TowerInputs:
    """Describe the crops, or whole images, that a tower is given.

    Attributes:
        hashes: a hash of each crop.
        input_rows: rows of the pixel tensor that each crop has.
        output_rows: rows of the tower's output that each crop has, or that number divided by some factor for all.
        dim: the dimension along which the tower's output is laid out.
    """

    hashes: list[int]
    input_rows: list[int]
    output_rows: list[int]
    dim: int = 0


def parse_tower_inputs(
    pixels: Tensor, kwargs: Mapping[str, Any], patch_size: int | None, seed: int = 0
) -> TowerInputs | None:
    """Find the crops in the arguments of a tower; None if their form is unknown.

    Args:
        pixels: crops as (crops, channels, height, width), each encoded on its own; or the patches of all images, with
            `grid_thw` (Qwen); or the padded patches of each image, with their positions (Gemma 4).
        kwargs: the tower's other arguments.
        patch_size: for a tower that crops images to their size and lays their patches end to end (Pixtral); else None.
        seed: of the hashes.
    """
    # Qwen: the patches of all images are rows, and each image has its grid of them.
    if "grid_thw" in kwargs:
        grids = kwargs["grid_thw"]
        hashes = hash_patched_images(pixels, grids, seed)
        num_patches = grids.prod(1).tolist()
        return TowerInputs(hashes.tolist(), num_patches, num_patches)

    # Gemma 4: an image is a row of patches, padded; the positions of the padding are negative.
    one_each = [1] * len(pixels)
    if "pixel_position_ids" in kwargs:
        positions = kwargs["pixel_position_ids"]
        hashes = hash_rows(torch.stack([hash_rows(pixels, seed), hash_rows(positions, seed)], dim=1), seed)
        num_patches = (positions >= 0).all(dim=2).sum(1).tolist()
        return TowerInputs(hashes.tolist(), one_each, num_patches)

    # All others: crops of one size, as (crops, channels, height, width).
    if pixels.ndim != 4:
        return None
    if patch_size is None:
        return TowerInputs(hash_rows(pixels, seed).tolist(), one_each, one_each)
    return _parse_packed_images(pixels, kwargs, patch_size, seed)


def _parse_packed_images(pixels: Tensor, kwargs: Mapping[str, Any], patch_size: int, seed: int) -> TowerInputs:
    """Find the images in the arguments of a tower that cuts off their padding."""
    sizes = [list(pixels.shape[2:])] * len(pixels)
    if "image_sizes" in kwargs:
        sizes = kwargs["image_sizes"].tolist()
    numbers: list[list[int]] = []
    num_patches: list[int] = []
    for image, (height, width) in zip(pixels, sizes, strict=True):
        # The same numbers in another shape are another image, so the size is part of the hash.
        numbers.append([height, width, int(hash_rows(image[None, :, :height, :width], seed))])
        num_patches.append((height // patch_size) * (width // patch_size))
    hashes = hash_rows(torch.tensor(numbers, device=pixels.device), seed)
    return TowerInputs(hashes.tolist(), [1] * len(pixels), num_patches, dim=1)


class VisionCache:
    """Keep what a frozen vision tower made of each crop.

    Args:
        tower: the tower.
        config: the model's configuration, which says what the model reads of the tower's output.
        directory: where features are kept for later steps and runs; None keeps them for one step.
        max_bytes: of features that are kept in memory for later steps, without a directory; those that were not read
            for the longest time are dropped first.
        seed: of the hashes, a secret one where strangers send images: they could make two with the same hash.
    """

    def __init__(
        self,
        tower: nn.Module,
        config: PreTrainedConfig,
        directory: Path | None = None,
        max_bytes: int = 0,
        seed: int = 0,
    ) -> None:
        self.tower = tower
        self.max_bytes, self.seed = max_bytes, seed
        self.layers = feature_layers(config)
        self.patch_size = packed_patch_size(tower)
        # Other weights, or other layers read, are other features.
        self.directory = None
        if directory:
            layers = map(str, self.layers or [])
            self.directory = directory / "_".join([weights_digest(tower), *layers])
        self.cached: dict[int, Any] = {}  # those read last come last
        self._num_bytes = 0  # of features that are kept in memory for later steps

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Have the tower encode no crop twice while the context is entered.

        The tower's `forward` is replaced meanwhile, for all threads: a step enters this where nothing else runs the
        model, and leaves it as it was.
        """
        forward = self.tower.forward
        self.tower.forward = lambda *args, **kwargs: self._cached_forward(forward, args, kwargs)
        try:
            yield
        finally:
            self.tower.forward = forward
            self._trim()

    @torch.no_grad()
    def _cached_forward(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the tower's output, running it on the crops alone that are not cached."""
        pixels: Tensor = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        crops = parse_tower_inputs(pixels, kwargs, self.patch_size, self.seed)
        if crops is None:
            return forward(*args, **kwargs)
        missing = self._find_missing(crops, pixels.device)
        if missing:
            all_missing = len(missing) == len(crops.hashes)
            chosen_args, chosen_kwargs = args, kwargs
            if not all_missing:
                chosen_args, chosen_kwargs = _select_crops(crops, list(missing.values()), len(pixels), args, kwargs)
            output = forward(*chosen_args, **chosen_kwargs)
            self._drop_unread_outputs(output)
            self._store(output, crops, missing)
            if all_missing:
                return output  # the cache holds views of it, so a step of one micro-batch keeps nothing twice
        self.cached.update({key: self.cached.pop(key) for key in dict.fromkeys(crops.hashes)})
        outputs = [self.cached[key] for key in crops.hashes]
        # What this tower made fits together; files may be of another version of the package.
        if self.directory is None or _fit_together(outputs, crops.dim):
            return _concatenate(outputs, crops.dim)
        return self._encode_again(forward, args, kwargs, crops)

    def _encode_again(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], crops: TowerInputs
    ) -> Any:
        """Encode all crops, because their features in the directory are not of one shape."""
        logger.warning("Cached features in %s are of other shapes and are made again.", self.directory)
        output = forward(*args, **kwargs)
        self._drop_unread_outputs(output)
        # Each occurrence of a crop has rows of its own in the output.
        stops = list(accumulate(crops.output_rows))
        for key, start, stop in zip(crops.hashes, [0, *stops], stops, strict=False):
            self.cached[key] = _slice_output(output, start, stop, stops[-1], crops.dim)
            self._save(key)
        return output

    def _find_missing(self, crops: TowerInputs, device: torch.device) -> dict[int, int]:
        """Return the hash of each crop that has to be encoded, with the index of its last occurrence."""
        missing: dict[int, int] = {}
        for index, (key, num_rows) in enumerate(zip(crops.hashes, crops.output_rows, strict=True)):
            is_cached = key in self.cached or self._load(key, device, num_rows, crops.dim)
            if not is_cached:
                missing[key] = index
        return missing

    def _store(self, output: Any, crops: TowerInputs, missing: Mapping[int, int]) -> None:
        """Cache the part of the output that belongs to each encoded crop."""
        # The tower was given the missing crops alone, in the order of `missing`; their rows follow each other.
        stops = list(accumulate(crops.output_rows[index] for index in missing.values()))
        starts = [0, *stops[:-1]]
        for key, start, stop in zip(missing, starts, stops, strict=True):
            features = _slice_output(output, start, stop, stops[-1], crops.dim)
            if self.max_bytes:
                # A view would keep the features of all crops in memory for as long as one of them is kept.
                features = tree_map_only(Tensor, torch.clone, features)
                self._num_bytes += _count_bytes(features)
            self.cached[key] = features
            self._save(key)

    def _trim(self) -> None:
        """Drop features until the others fit into the memory for them."""
        if not self.max_bytes:
            self.cached.clear()
        while self._num_bytes > self.max_bytes:
            oldest = next(iter(self.cached))
            self._num_bytes -= _count_bytes(self.cached.pop(oldest))

    def _drop_unread_outputs(self, output: ModelOutput) -> None:
        """Drop what the model does not read: older versions of transformers return the hidden states of all layers."""
        if contains_projector(self.tower):
            output["last_hidden_state"] = None
        if self.layers is None or not output.get("hidden_states"):
            return
        states = output["hidden_states"]
        kept: list[Tensor | None] = [None] * len(states)
        for layer in self.layers:
            kept[layer] = states[layer]  # negative layers count from the end in both
        output["hidden_states"] = tuple(kept)
        # A model that reads hidden states does not read the output behind the final norm.
        if self.layers:
            output["last_hidden_state"] = None

    def _load(self, key: int, device: torch.device, num_rows: int, dim: int) -> bool:
        """Load a crop's features from the directory, and tell whether they were there."""
        file = self._file(key)
        if file is None or not file.is_file():
            return False
        try:
            self.cached[key] = load_output(file, self.tower, device, num_rows, dim)
        except DAMAGE as error:
            logger.warning("The cached features in %s are damaged and are made again: %s.", file, error)
            return False
        return True

    def _save(self, key: int) -> None:
        """Save a crop's features to the directory, if there is one."""
        file, output = self._file(key), self.cached[key]
        if file is None or not isinstance(output, ModelOutput):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{uuid4().hex}.partial")  # another process may be writing the same crop
        save_output(output, partial)
        partial.replace(file)  # not synced to disk, which a step would wait for: a file that is cut is made again

    def _file(self, key: int) -> Path | None:
        """Return the file of a crop; None without a directory."""
        if self.directory is None:
            return None
        unsigned = key % 2**64  # a hash may be negative
        return self.directory / f"{unsigned:016x}.safetensors"


def _select_crops(
    crops: TowerInputs, chosen: Sequence[int], num_rows: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Select some crops from a tower's arguments.

    Args:
        crops: the crops that the arguments hold.
        chosen: the indices of those to keep.
        num_rows: rows of pixels. A tensor of this length has an entry per row, as the pixels themselves, and one as
            long as there are crops has an entry per crop, as their grids; other arguments are kept as they are.
        args, kwargs: the arguments.
    """

    def select(value: Any) -> Any:
        """Keep the rows or entries of the chosen crops."""
        if not isinstance(value, Tensor):
            return value
        if len(value) == num_rows:
            parts = value.split(crops.input_rows)
        elif len(value) == len(crops.hashes):
            parts = value.split(1)
        else:
            return value
        return torch.cat([parts[index] for index in chosen])

    return tuple(map(select, args)), {name: select(value) for name, value in kwargs.items()}


def _count_bytes(output: Any) -> int:
    """Count the bytes of the tensors of an output."""
    return sum(leaf.nbytes for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))


def _slice_output(output: Any, start: int, stop: int, total: int, dim: int) -> Any:
    """Slice the output by rows of `total`, of which each tensor may have merged the same number into one."""

    def slice_tensor(tensor: Tensor) -> Tensor:
        """Return a view of the rows, which are `total / size` times fewer in a tensor of merged rows."""
        size = tensor.shape[dim]
        first, last = start * size // total, stop * size // total
        return tensor.narrow(dim, first, last - first)

    return tree_map_only(Tensor, slice_tensor, output)


def _fit_together(outputs: Sequence[Any], dim: int) -> bool:
    """Return whether outputs have the same fields, and tensors of the same shape but for their rows along `dim`."""
    leaves, structures = zip(*map(tree_flatten, outputs), strict=True)
    if any(structure != structures[0] for structure in structures):
        return False
    return all(len({_shape_beside(tensor, dim) for tensor in tensors}) == 1 for tensors in zip(*leaves, strict=True))


def _shape_beside(tensor: Tensor | None, dim: int) -> tuple[int, ...] | None:
    """Return a tensor's shape without one dimension."""
    return None if tensor is None else (*tensor.shape[:dim], *tensor.shape[dim + 1 :])


def _concatenate(outputs: Sequence[Any], dim: int) -> Any:
    """Concatenate the outputs of several crops, tensor by tensor."""

    def concatenate_tensors(*tensors: Any) -> Tensor | None:
        """Concatenate the same tensor of all outputs; what one of them dropped, all did."""
        if tensors[0] is None:
            return None
        return torch.cat(tensors, dim)

    return tree_map(concatenate_tensors, *outputs)


def hash_rows(crops: Float[Tensor, " crops *shape"], seed: int = 0) -> Int64[Tensor, " crops"]:
    """Hash the bits of each crop: a sum of products with fixed random numbers, exact in any order of summation."""
    # Integers wrap around on overflow, so a sum is the same in any order and on any device.
    bits = crops.flatten(1).contiguous().view(torch.int16)
    return (bits.long() * _hash_factors(bits.shape[1], seed).to(crops.device)).sum(1)


@lru_cache(maxsize=16)
def _hash_factors(count: int, seed: int) -> Int64[Tensor, " count"]:
    """Draw the numbers by which hashes multiply."""
    # On the CPU: with the same seed, files in a directory are found again by other runs and devices.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (count,), generator=generator)


def hash_patched_images(
    patches: Float[Tensor, "patches dim"], grids: Int64[Tensor, "images 3"], seed: int = 0
) -> Int64[Tensor, " images"]:
    """Hash images whose patches are laid end to end, by their patches and their grid."""
    patch_hashes = hash_rows(patches, seed).split(grids.prod(1).tolist())
    hashes = []
    for grid, hashes_of_image in zip(grids, patch_hashes, strict=True):
        # The same patches in another grid are another image.
        numbers = torch.cat([grid, hashes_of_image])
        hashes.append(hash_rows(numbers[None], seed))
    return torch.cat(hashes)


def weights_digest(module: nn.Module) -> str:
    """Return a name for a module's weights."""
    digest = hashlib.blake2b(digest_size=12)
    for chunk in iter_tensor_bytes(sorted(module.state_dict().items())):
        digest.update(chunk)
    return digest.hexdigest()
