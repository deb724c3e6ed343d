"""What an image looks like, in a few bytes that hardly change when it is resized, compressed or slightly retouched."""

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

SIDE = 8
NUM_BYTES = 3 * SIDE * SIDE


def appearance_of(image: Image.Image) -> bytes:
    """Reduce an image to the mean colors of 8 x 8 tiles.

    The bits of a perceptual hash would take less space, but say little about images with an even background: most of
    them only tell that nothing changes from one tile to the next.
    """
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()


def appearance_distance(
    first: UInt8[np.ndarray, "pairs bytes"], second: UInt8[np.ndarray, "pairs bytes"]
) -> Float64[np.ndarray, " pairs"]:
    """Return the root mean square of the differences in color, from 0 to 255, pair by pair."""
    difference = first.astype(np.int16) - second
    distance: Float64[np.ndarray, " pairs"] = np.sqrt((difference.astype(np.float32) ** 2).mean(axis=1, dtype=float))
    return distance
