"""Redraw drawings as another hand might have: bent, turned, in other colors, with outlines.

The test hand draws with black outlines, the others mostly without, and every hand has colors and proportions of its
own. What stays the same is the rough shape. Each augmentation takes away something else to go by.
"""

import math

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

Drawings = UInt8[Tensor, "n 4 side side"]
Planes = Float[Tensor, "n 4 side side"]


def augment(drawings: Drawings, side: int, generator: torch.Generator) -> Drawings:
    """Make a variant of each drawing, `side` pixels wide, on a transparent ground."""
    planes = drawings.float() / 255
    # Colors are weighted by their opacity, or those of invisible pixels would bleed in when pixels are mixed.
    planes = torch.cat([planes[:, :3] * planes[:, 3:], planes[:, 3:]], dim=1)
    planes = _bend(planes, side, generator)
    colors = (planes[:, :3] / planes[:, 3:].clamp(min=1e-3)).clamp(0, 1)
    colors = _recolor(colors, generator)
    redrawn = _outline(torch.cat([colors, planes[:, 3:]], dim=1), generator)
    return (255 * redrawn).round().clamp(0, 255).to(torch.uint8)


def _bend(planes: Planes, side: int, generator: torch.Generator) -> Planes:
    """Turn, scale, shear and mirror drawings, and move their parts a little against each other."""
    n = len(planes)

    def normal(scale: float, *shape: int) -> Tensor:
        """Draw normal numbers for each drawing."""
        return scale * torch.randn(n, *shape, generator=generator)

    angle, shear = normal(0.2), normal(0.12)
    mirrored = torch.rand(n, generator=generator) < 0.3
    size = 0.7 + 0.3 * torch.rand(n, generator=generator)
    stretch_x, stretch_y = normal(0.12).exp() / size, normal(0.12).exp() / size
    cosine, sine = angle.cos(), angle.sin()
    flip = 1 - 2 * mirrored.float()
    # Rotation times shear times scale, from the places of the new drawing to those of the old one.
    row_x = torch.stack([cosine * stretch_x * flip, (shear * cosine - sine) * stretch_y, normal(0.06)], dim=1)
    row_y = torch.stack([sine * stretch_x * flip, (shear * sine + cosine) * stretch_y, normal(0.06)], dim=1)
    grid = F.affine_grid(torch.stack([row_x, row_y], dim=1), [n, 4, side, side], align_corners=False)
    # A smooth field of displacements, drawn on a coarse grid.
    field = F.interpolate(normal(0.07, 2, 4, 4), size=side, mode="bicubic", align_corners=True)
    grid = grid + field.permute(0, 2, 3, 1)
    # Halved first, so that no fine line falls between the points that are read.
    halved = F.interpolate(planes, size=max(side, planes.shape[-1] // 2), mode="area")
    return F.grid_sample(halved, grid, mode="bilinear", align_corners=False)


def _recolor(colors: Float[Tensor, "n 3 side side"], generator: torch.Generator) -> Float[Tensor, "n 3 side side"]:
    """Turn the hues, and change saturation, contrast and brightness; make some gray and some posterised."""
    n = len(colors)

    def uniform(low: float, high: float) -> Tensor:
        """Draw a uniform number for each drawing."""
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=generator)

    def chosen(share: float) -> Tensor:
        """Choose a share of the drawings."""
        return uniform(0, 1) < share

    # Small turns are as another hand would color a thing; any turn takes away the color itself.
    turn = torch.where(chosen(0.25), uniform(-0.5, 0.5), uniform(-0.06, 0.06))
    rotated = torch.einsum("nij,njyx->niyx", _hue_rotations(turn.flatten()), colors)
    gray = rotated.mean(dim=1, keepdim=True)
    saturation = torch.where(chosen(0.1), torch.zeros(1), uniform(0.5, 1.5))
    colors = gray + (rotated - gray) * saturation
    colors = ((colors - 0.5) * uniform(0.6, 1.3) + 0.5 + uniform(-0.15, 0.15)).clamp(0, 1)
    return torch.where(chosen(0.2), (colors * 3).round() / 3, colors)


def _hue_rotations(turns: Float[Tensor, " n"]) -> Float[Tensor, "n 3 3"]:
    """Return the matrices that turn hues around the gray axis, by fractions of the circle."""
    cosine, sine = (2 * math.pi * turns).cos()[:, None, None], (2 * math.pi * turns).sin()[:, None, None]
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    return cosine * torch.eye(3) + (1 - cosine) / 3 + sine * cross


def _outline(planes: Planes, generator: torch.Generator) -> Planes:
    """Draw dark lines on half of the drawings, where opacity or color changes; leave some of these unfilled."""
    n = len(planes)
    colors, alpha = planes[:, :3], planes[:, 3:]
    # How much the values around a pixel differ.
    solid = torch.cat([colors * alpha, alpha], dim=1)
    width = 3
    spread = F.max_pool2d(solid, width, 1, width // 2) + F.max_pool2d(-solid, width, 1, width // 2)
    ink = ((spread.amax(dim=1, keepdim=True) - 0.15) * 2.5).clamp(0, 1)
    outlined = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    unfilled = torch.rand(n, 1, 1, 1, generator=generator) < 0.3
    darkness = 0.25 * torch.rand(n, 1, 1, 1, generator=generator)
    pale = 1 - (1 - colors) * 0.4 * torch.rand(n, 1, 1, 1, generator=generator)
    filled = torch.where(unfilled, pale, colors)
    drawn = torch.cat([filled * (1 - ink) + darkness * ink, torch.maximum(alpha, ink)], dim=1)
    return torch.where(outlined, drawn, planes)
