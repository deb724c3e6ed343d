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
        factor = getattr(image_processor, "rescale_factor", None)
        mean = tuple(getattr(image_processor, "image_mean", None) or ())
        std = tuple(getattr(image_processor, "image_std", None) or ())
        return cls(factor, mean, std) if factor and len(mean) == len(std) == 3 else None

    def quantize_exact(self, values: Float32[Tensor, "..."] | UInt8[Tensor, "..."]) -> UInt8[Tensor, "..."] | None:
        """Return the bytes that values were made of, or the values if they are bytes; None if they were not."""
        if values.dtype == torch.uint8:
            return values
        if not values.is_floating_point() or not values.numel() or not _has_colors(values):
            return None
        # Solve (byte * factor - mean) / std = value for the byte, and see if it gives the value back.
        mean, std = self._broadcast(values)
        raw = torch.addcmul(mean / self.factor, values, std / self.factor).round_().clamp_(0, 255).to(torch.uint8)
        return raw if self.reproduces(values, raw) else None

    def reproduces(self, values: Float32[Tensor, "..."], raw: Tensor) -> bool:
        """Tell whether bytes normalize to these values."""
        if raw.dtype != torch.uint8 or raw.shape != values.shape or not _has_colors(raw):
            return False
        return bool(self.normalize(raw).sub_(values).abs_().max() <= TOLERANCE)

    def normalize(self, raw: UInt8[Tensor, "..."]) -> Float32[Tensor, "..."]:
        """Compute the pixel values of bytes."""
        mean, std = self._broadcast(raw)
        return raw.float().mul_(self.factor).sub_(mean).div_(std)

    def _broadcast(self, pixels: Tensor) -> list[Tensor]:
        """Return mean and standard deviation in a shape that broadcasts with images, or with rows of patches."""
        repeat, shape = 1, [3, 1, 1]
        if pixels.dim() == 2:  # each row holds all values of one color, then those of the next
            repeat, shape = pixels.shape[1] // 3, [-1]
        return [
            torch.tensor(moment, device=pixels.device).repeat_interleave(repeat).view(shape)
            for moment in (self.mean, self.std)
        ]


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
            for dim, size in enumerate(shape):
                part.narrow(dim, size, part.shape[dim] - size).zero_()
        return values


def pack_uint8(
    images: Sequence[dict[str, Tensor]], normalization: Normalization
) -> tuple[list[dict[str, Tensor]], PackedPixels | None]:
    """Return image inputs with `pixel_values` as bytes, and what decodes them.

    If some values cannot be made of bytes, all stay values, or become values, and there is nothing to decode.
    """
    quantized = [normalization.quantize_exact(inputs["pixel_values"]) for inputs in images if "pixel_values" in inputs]
    raw = [pixels for pixels in quantized if pixels is not None]
    if not raw or len(raw) < len(images):
        return [_with_values(inputs, normalization) for inputs in images], None
    packed = [{**inputs, "pixel_values": pixels} for inputs, pixels in zip(images, raw, strict=True)]
    return packed, PackedPixels(normalization, tuple(pixels.shape for pixels in raw))


def _with_values(inputs: dict[str, Tensor], normalization: Normalization) -> dict[str, Tensor]:
    if "pixel_values" not in inputs or inputs["pixel_values"].dtype != torch.uint8:
        return inputs
    return {**inputs, "pixel_values": normalization.normalize(inputs["pixel_values"])}


def _has_colors(values: Tensor) -> bool:
    """Tell whether the colors stand where `_broadcast` expects them."""
    if values.dim() > 2:
        return values.shape[-3] == 3
    return values.dim() == 2 and values.shape[1] % 3 == 0
