"""Pictures as bytes on their way from a loader's worker to the device, which makes the model's values of them there.

A processor's values are float32: four bytes for each byte of a picture. Whatever family made them, they go as bytes
only where every single value comes back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

TOLERANCE = 1e-5  # of a value: a few roundings of float32


@dataclass(frozen=True)
class Normalization:
    """What an image processor makes of a byte: (byte * factor - mean) / std, the last two by colour."""

    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_processor(cls, image_processor: Any) -> "Normalization | None":
        """An image processor's; None where it has another way."""
        factor = getattr(image_processor, "rescale_factor", None)
        mean, std = (tuple(getattr(image_processor, name, None) or ()) for name in ("image_mean", "image_std"))
        return cls(factor, mean, std) if factor and len(mean) == len(std) == 3 else None

    def quantize_exact(self, values: Float32[Tensor, "..."] | UInt8[Tensor, "..."]) -> UInt8[Tensor, "..."] | None:
        """The bytes that values were made of, or that they are already; None if they were not."""
        if values.dtype == torch.uint8:
            return values
        if not values.is_floating_point() or not values.numel() or not _by_color(values):
            return None
        mean, std = self._of(values)
        raw = torch.addcmul(mean / self.factor, values, std / self.factor).round_().clamp_(0, 255).to(torch.uint8)
        return raw if self.reproduces(values, raw) else None

    def reproduces(self, values: Float32[Tensor, "..."], raw: Tensor) -> bool:
        """Whether some bytes become just these values."""
        if raw.dtype != torch.uint8 or raw.shape != values.shape or not _by_color(raw):
            return False
        return bool(self.normalize(raw).sub_(values).abs_().max() <= TOLERANCE)

    def normalize(self, raw: UInt8[Tensor, "..."]) -> Float32[Tensor, "..."]:
        """The model's values."""
        mean, std = self._of(raw)
        return raw.float().mul_(self.factor).sub_(mean).div_(std)

    def _of(self, pixels: Tensor) -> list[Tensor]:
        """Mean and standard deviation in the shape in which they go along with pictures, or with rows of patches."""
        repeat, shape = (pixels.shape[1] // 3, (-1,)) if pixels.dim() == 2 else (1, (3, 1, 1))
        return [
            torch.tensor(each, device=pixels.device).repeat_interleave(repeat).view(shape)
            for each in (self.mean, self.std)
        ]


@dataclass(frozen=True)
class PackedPixels:
    """How the bytes of a pack become values: the normalization, and the shapes of the parts that were joined.

    Parts smaller than the largest are filled up, and the model expects 0 there, which is the value of no byte.
    """

    normalization: Normalization
    shapes: tuple[torch.Size, ...]

    def normalize(self, raw: UInt8[Tensor, "first ..."]) -> Float32[Tensor, "first ..."]:
        """The model's values of all parts."""
        values = self.normalization.normalize(raw)
        for part, shape in zip(values.split([shape[0] for shape in self.shapes]), self.shapes, strict=True):
            for dim, size in enumerate(shape):
                part.narrow(dim, size, part.shape[dim] - size).zero_()
        return values


def pack_uint8(
    pictures: Sequence[dict[str, Tensor]], normalization: Normalization
) -> tuple[list[dict[str, Tensor]], PackedPixels | None]:
    """The vision tensors with `pixel_values` as bytes, and how to come back; as values where one is not of bytes."""
    found = [normalization.quantize_exact(vision["pixel_values"]) for vision in pictures if "pixel_values" in vision]
    raw = [each for each in found if each is not None]
    if not raw or len(raw) < len(pictures):
        return [_with_values(vision, normalization) for vision in pictures], None
    shapes = tuple(each.shape for each in raw)
    return [{**vision, "pixel_values": each} for vision, each in zip(pictures, raw, strict=True)], PackedPixels(
        normalization, shapes
    )


def _with_values(vision: dict[str, Tensor], normalization: Normalization) -> dict[str, Tensor]:
    if "pixel_values" not in vision or vision["pixel_values"].dtype != torch.uint8:
        return vision
    return {**vision, "pixel_values": normalization.normalize(vision["pixel_values"])}


def _by_color(values: Tensor) -> bool:
    return values.shape[-3] == 3 if values.dim() > 2 else values.dim() == 2 and values.shape[1] % 3 == 0
