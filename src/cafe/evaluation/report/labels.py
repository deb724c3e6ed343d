"""Place the labels of a scatter chart beside their points, clear of one another and of what is drawn."""

import numpy as np
from jaxtyping import Float

# How far a label may be from its point, and in which directions.
DISTANCES = (7, 11, 16, 23, 32, 44, 58, 74, 92)
ANGLES = np.linspace(0, 2 * np.pi, 24, endpoint=False)
MARGIN = 3.0  # around a label
CLEARANCE = 6.0  # by how much a label should be nearer to its own point than to any other marker
# What a label costs that hides a marker or a sample of a line, in lengths.
MARKER_COST, LINE_COST = 40.0, 3.0
ROUNDS = 4

Points = Float[np.ndarray, "points 2"]


def place_labels(
    points: Float[np.ndarray, "labels 2"],
    sizes: Float[np.ndarray, "labels 2"],
    markers: Float[np.ndarray, "markers 2"],
    lines: Float[np.ndarray, "samples 2"],
    frame: Float[np.ndarray, "2 2"],
) -> Float[np.ndarray, "labels 2"]:
    """Choose the center of each label, near its point, by coordinate descent on a cost.

    The cost of a center is its distance, what the label hides or could be taken to belong to, and far more for
    reaching out of the frame or over another label or its leader line.

    Args:
        points: the points, in the unit of all lengths here.
        sizes: the width and height of each label.
        markers: all points that are drawn, those with labels too.
        lines: samples of the lines that are drawn.
        frame: the lower left and the upper right corner within which labels lie.
    """
    # Any center on a few rings around the point is possible.
    candidates = [_candidates(point, size) for point, size in zip(points, sizes, strict=True)]
    # What a center costs by itself does not depend on the other labels.
    fixed = [_fixed_cost(*each, size, markers, lines, frame) for each, size in zip(candidates, sizes, strict=True)]
    placed: dict[int, np.ndarray] = {}
    # Each label in turn takes the cheapest center beside the others' present ones, until that hardly changes anything.
    for _ in range(ROUNDS):
        for number, (centers, _) in enumerate(candidates):
            cost = fixed[number].copy()
            for other, center in placed.items():
                if other != number:
                    cost += _conflict(centers, points[number], sizes[number], center, points[other], sizes[other])
            placed[number] = centers[cost.argmin()]
    return np.array([placed[number] for number in range(len(points))]).reshape(-1, 2)


def _candidates(point: Float[np.ndarray, "2"], size: Float[np.ndarray, "2"]) -> tuple[Points, np.ndarray]:
    """List the centers that a label may have, and their distances, nearest first."""
    directions = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
    # The point is as far from the label's edge as the distance says, whatever the label's shape.
    rings = [point + directions * (size / 2 + distance) for distance in DISTANCES]
    return np.concatenate(rings), np.repeat(np.array(DISTANCES, float), len(ANGLES))


def _fixed_cost(
    centers: Points,
    distances: Float[np.ndarray, " points"],
    size: Float[np.ndarray, "2"],
    markers: Float[np.ndarray, "markers 2"],
    lines: Float[np.ndarray, "samples 2"],
    frame: Float[np.ndarray, "2 2"],
) -> Float[np.ndarray, " points"]:
    """Compute what each center costs by its distance, the markers and lines near it and the frame."""
    half = size / 2
    outside = ((centers - half < frame[0]) | (centers + half > frame[1])).any(axis=1)
    # From the edges of the label to each marker: 0 for one that it hides.
    gaps = np.linalg.norm(np.maximum(np.abs(markers - centers[:, None]) - half, 0), axis=2)
    # The label's own marker adds the same to all centers.
    confusion = np.maximum(distances[:, None] + CLEARANCE - gaps, 0).sum(axis=1)
    hidden_markers = (gaps < MARGIN).sum(axis=1)
    hidden_lines = (np.abs(lines - centers[:, None]) < half + MARGIN).all(axis=2).sum(axis=1)
    return distances + confusion + MARKER_COST * hidden_markers + LINE_COST * hidden_lines + 1e6 * outside


def _conflict(
    centers: Points,
    point: Float[np.ndarray, "2"],
    size: Float[np.ndarray, "2"],
    other_center: Float[np.ndarray, "2"],
    other_point: Float[np.ndarray, "2"],
    other_size: Float[np.ndarray, "2"],
) -> Float[np.ndarray, " points"]:
    """Compute what each center of a label costs beside another label: for an overlap, and for leaders under labels."""
    overlaps = (np.abs(centers - other_center) < (size + other_size) / 2 + MARGIN).all(axis=1)
    # Leader lines, as samples: those of the candidates under the other label, and that of the other under each.
    steps = np.linspace(0, 1, 12)[:, None]
    leaders = point + steps * (centers[:, None] - point)
    crossed = (np.abs(leaders - other_center) < other_size / 2 + 1).all(axis=2).any(axis=1)
    other_leader = other_point + steps * (other_center - other_point)
    covers = (np.abs(other_leader - centers[:, None]) < size / 2 + 1).all(axis=2).any(axis=1)
    return 1e4 * overlaps + 200.0 * crossed + 200.0 * covers
