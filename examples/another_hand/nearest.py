"""Find the nearest training drawing of each drawing in an image, without learning features.

Drawings are compared by their edges (histograms of oriented gradients) and a thumbnail of their colors. Scenes are cut
into drawings by their ground, as if the cells were known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from skimage.feature import hog

from another_hand.scenes import CELL

FEATURE_SIDE = 64  # pixels
COLOR_WEIGHT = 0.5  # of the colors' cosine, beside that of the edges
TOLERANCE = 4  # levels; what differs less from the ground is ground

Picture = UInt8[np.ndarray, "height width 3"]
Similarities = Float[np.ndarray, "drawings concepts"]


@dataclass(frozen=True)
class NearestDrawing:
    """Hold the training hands' drawings.

    Attributes:
        concepts: their names, each once.
        vectors: the drawings' features, those of one concept together.
        starts: the number of each concept's first drawing.
        groups: by concept, the name of its group.
    """

    concepts: tuple[str, ...]
    vectors: Float[np.ndarray, "drawings features"]
    starts: Int[np.ndarray, " concepts"]
    groups: Mapping[str, str]

    @classmethod
    def of(cls, drawings: Mapping[str, Sequence[np.ndarray]], groups: Mapping[str, str]) -> "NearestDrawing":
        """Compute the features of some RGBA drawings of each concept."""
        counts = [len(drawn) for drawn in drawings.values()]
        vectors = [features(on_white(drawing)) for drawing in chain.from_iterable(drawings.values())]
        return cls(tuple(drawings), np.stack(vectors), np.cumsum([0, *counts[:-1]]), groups)

    def compare(self, pictures: Sequence[Picture]) -> Similarities:
        """Compute the similarity of pictures to each concept: to its most similar drawing; -1.5 to 1.5."""
        similarities = np.stack([features(picture) for picture in pictures]) @ self.vectors.T
        return np.maximum.reduceat(similarities, self.starts, axis=1)


def features(picture: Picture) -> Float[np.ndarray, " features"]:
    """Describe a picture by its edges and colors; the scalar product of two is a weighted sum of two cosines."""
    resized = Image.fromarray(picture).resize((FEATURE_SIDE, FEATURE_SIDE), Image.Resampling.BILINEAR)
    edges = hog(np.asarray(resized) / 255, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=-1)
    colors = np.asarray(resized.resize((8, 8), Image.Resampling.BOX)) / 255
    # Without the mean, the white that surrounds every drawing does not make all of them alike.
    return np.concatenate([_unit(edges), COLOR_WEIGHT**0.5 * _unit((colors - colors.mean()).ravel())])


def _unit(vector: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Scale a vector to length 1; leave one without a direction as it is."""
    length = np.linalg.norm(vector)
    return vector / length if length else vector


def on_white(drawing: UInt8[np.ndarray, "side side 4"]) -> Picture:
    """Lay an RGBA drawing on a white ground."""
    image = Image.new("RGB", (drawing.shape[1], drawing.shape[0]), "white")
    layer = Image.fromarray(drawing)
    image.paste(layer, (0, 0), layer)
    return np.asarray(image)


def cut(picture: Picture) -> list[Picture]:
    """Cut out the drawing of each filled cell, in reading order, as large as a cell on a white ground."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    colors, counts = np.unique(border, axis=0, return_counts=True)
    ground = colors[counts.argmax()].astype(int)
    drawn = (np.abs(picture - ground) > TOLERANCE).any(axis=-1)
    cells = []
    for top in range(0, picture.shape[0], CELL):
        for left in range(0, picture.shape[1], CELL):
            cell = slice(top, top + CELL), slice(left, left + CELL)
            if drawn[cell].any():
                cells.append(_center(picture[cell], drawn[cell]))
    return cells


def _center(cell: Picture, drawn: Bool[np.ndarray, "height width"]) -> Picture:
    """Enlarge what is drawn until its longer side fills a cell, as all training drawings do."""
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    image = Image.fromarray(np.where(drawn[..., None], cell, 255).astype(np.uint8)[box])
    scale = CELL / max(image.size)
    image = image.resize([max(1, round(scale * side)) for side in image.size], Image.Resampling.BILINEAR)
    square = Image.new("RGB", (CELL, CELL), "white")
    square.paste(image, ((CELL - image.width) // 2, (CELL - image.height) // 2))
    return np.asarray(square)
