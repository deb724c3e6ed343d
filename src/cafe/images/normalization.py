"""Send images as bytes from a loader worker to the device, and compute the model's pixel values there.

Normalized values are float32, four bytes for each byte of an image. Whichever family made them, they are sent as bytes
only where every single value can be reproduced.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

TOLERANCE = 1e-5  # absolute, between pixel values: a few roundings of float32


@dataclass(frozen=True)
class Normalization:
    """Describe what an image processor makes of a byte: (byte * factor - mean) / std, the last two for each color."""

    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, image_processor: Any) -> "Normalization | None":
        """Read the normalization of an image processor; None if it has another form."""
        factor: Any = getattr(image_processor, "rescale_factor", None)
        mean: Any = getattr(image_processor, "image_mean", None)
        std: Any = getattr(image_processor, "image_std", None)
        # Some processors do not normalize, and others have one mean for all colors.
        if not all((factor, mean, std)):
            return None
        if (len(mean), len(std)) != (3, 3):
            return None
        return cls(factor, tuple(mean), tuple(std))

    def quantize_exact(self, values: Float32[Tensor, "..."] | UInt8[Tensor, "..."]) -> UInt8[Tensor, "..."] | None:
        """Return the bytes that values were made of; None if they were made of none.

        Args:
            values: pixel values; bytes are returned unchanged.
        """
        if values.dtype == torch.uint8:
            return values
        if not values.is_floating_point():
            return None
        if not values.numel():  # the largest difference of none would be an error
            return None
        if not _has_colors(values):
            return None
        # Solve (byte * factor - mean) / std = value for the byte, round it, and see if it gives the value back.
        mean, std = self._broadcast(values)
        solution = torch.addcmul(mean / self.factor, values, std / self.factor)
        raw = solution.round_().clamp_(0, 255).to(torch.uint8)
        if not self.reproduces(values, raw):
            return None
        return raw

    def reproduces(self, values: Float32[Tensor, "..."], raw: Tensor) -> bool:
        """Return whether bytes normalize to these values.

        Args:
            values: pixel values.
            raw: what may be their bytes: of another dtype or shape, or without colors, they are not.
        """
        if (raw.dtype, raw.shape) != (torch.uint8, values.shape):
            return False
        if not _has_colors(raw):
            return False
        differences = self.normalize(raw).sub_(values).abs_()
        return bool(differences.max() <= TOLERANCE)

    def normalize(self, raw: UInt8[Tensor, "..."]) -> Float32[Tensor, "..."]:
        """Compute the pixel values of bytes."""
        mean, std = self._broadcast(raw)
        return raw.float().mul_(self.factor).sub_(mean).div_(std)

    def _broadcast(self, pixels: Tensor) -> list[Tensor]:
        """Return mean and standard deviation in a shape that broadcasts with images, or with rows of patches."""
        repeat, shape = 1, [3, 1, 1]
        # A row of a patch holds all values of one color, then those of the next.
        if pixels.dim() == 2:
            repeat, shape = pixels.shape[1] // 3, [-1]
        mean = torch.tensor(self.mean, device=pixels.device)
        std = torch.tensor(self.std, device=pixels.device)
        return [mean.repeat_interleave(repeat).view(shape), std.repeat_interleave(repeat).view(shape)]


@dataclass(frozen=True)
class PackedPixels:
    """Hold what turns the bytes of a batch into pixel values: the normalization, and the shapes of the joined parts.

    Parts smaller than the largest are padded. The model expects 0 there, which is the value of no byte.
    """

    normalization: Normalization
    shapes: tuple[torch.Size, ...]

    def normalize(self, raw: UInt8[Tensor, "first ..."]) -> Float32[Tensor, "first ..."]:
        """Compute the pixel values of all parts."""
        values = self.normalization.normalize(raw)
        parts = values.split([shape[0] for shape in self.shapes])
        for part, shape in zip(parts, self.shapes, strict=True):
            _zero_beyond(part, shape)  # a view, so `values` changes
        return values


def pack_uint8(
    images: Sequence[dict[str, Tensor]], normalization: Normalization
) -> tuple[list[dict[str, Tensor]], PackedPixels | None]:
    """Return image inputs with `pixel_values` as bytes, and what decodes them.

    If some values cannot be made of bytes, all stay values, or become values, and there is nothing to decode.

    Args:
        images: the image inputs of some contents; `pixel_values` are values, or already bytes.
        normalization: what the image processor makes of a byte.
    """
    if not images:
        return [], None
    packed: list[dict[str, Tensor]] = []
    for inputs in images:
        raw = _quantize_pixels(inputs, normalization)
        if raw is None:
            # One tensor holds the pixels of all contents, so they are bytes together or not at all.
            return [_with_values(inputs, normalization) for inputs in images], None
        packed.append({**inputs, "pixel_values": raw})
    shapes = tuple(inputs["pixel_values"].shape for inputs in packed)
    return packed, PackedPixels(normalization, shapes)


def _quantize_pixels(inputs: dict[str, Tensor], normalization: Normalization) -> UInt8[Tensor, "..."] | None:
    """Return the bytes of a content's pixels; None if it has none or they were not made of bytes."""
    if "pixel_values" not in inputs:
        return None
    return normalization.quantize_exact(inputs["pixel_values"])


def _with_values(inputs: dict[str, Tensor], normalization: Normalization) -> dict[str, Tensor]:
    """Return image inputs with `pixel_values` as values, where they are bytes."""
    if "pixel_values" not in inputs:
        return inputs
    pixels = inputs["pixel_values"]
    if pixels.dtype != torch.uint8:
        return inputs
    return {**inputs, "pixel_values": normalization.normalize(pixels)}


def _zero_beyond(values: Tensor, shape: torch.Size) -> None:
    """Write zeros in place wherever an index lies beyond a shape."""
    # One dimension after the other; what lies beyond in several of them is written several times.
    for dim, size in enumerate(shape):
        values.narrow(dim, size, values.shape[dim] - size).zero_()


def _has_colors(values: Tensor) -> bool:
    """Return whether the colors stand where `_broadcast` expects them.

    Images have them in the third dimension from the end. A row of a patch has the values of three colors of the same
    number.
    """
    if values.dim() > 2:
        return values.shape[-3] == 3
    return values.dim() == 2 and values.shape[1] % 3 == 0
