"""A perceptual hash: a number whose bits hardly change when an image is resized, compressed or slightly retouched."""

import numpy as np
from jaxtyping import Int, UInt64
from PIL import Image

_SIDE = 8


def appearance_hash(image: Image.Image) -> int:
    """Compute the difference hash of an image: 64 bits that say where brightness rises from left to right."""
    small = image.convert("L").resize((_SIDE + 1, _SIDE), Image.Resampling.BOX)
    rises = np.diff(np.asarray(small).astype(np.int16), axis=1) > 0
    return int(np.packbits(rises).view(">u8")[0])


def num_differing_bits(first: UInt64[np.ndarray, " n"], second: UInt64[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Count the bits in which hashes differ, pair by pair."""
    return np.bitwise_count(first ^ second).astype(np.int64)
