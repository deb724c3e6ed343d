"""Train the vision tower: a small convolutional network learns to tell drawings apart, and the tower learns from it.

A vision transformer that learns from two thousand drawings learns these drawings. Convolutions see the same thing
wherever it stands, and learn what another hand keeps of it. So the tower is trained to have at each patch the features
that a convolutional teacher has there (as in arXiv 2207.10026), and to name drawings and mixtures of them as the
teacher does (arXiv 2012.12877). The teacher is thrown away.
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from another_hand.scenes import CELL
from cafe.scenes.tiny_llava import make_optimizer, make_scheduler

CHANNELS = 32  # of the teacher's first layers
GRID = CELL // 8  # the teacher's last layers see a grid of this many places each way
MIXED = 0.8  # of the images that are drawn for training are a mixture of two
TEMPERATURE = 2.0  # of the teacher's probabilities
Images = Float[Tensor, "batch 3 side side"]


class Teacher(nn.Module):
    """Classify drawings with three pairs of convolutions."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.num_classes = classes
        widths = [3, CHANNELS, 2 * CHANNELS, 4 * CHANNELS]
        layers = []
        for width, wider in pairwise(widths):
            layers += [_convolution(width, wider, stride=2), _convolution(wider, wider, stride=1)]
        self.body = nn.Sequential(*layers)
        self.top = nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * widths[-1], classes)
        )

    def forward(self, images: Images) -> Float[Tensor, "batch classes"]:
        """Return the logits of the classes."""
        return self.top(self.body(images))


def _convolution(width: int, wider: int, stride: int) -> nn.Sequential:
    """Make a convolution with its normalization and activation."""
    convolution = nn.Conv2d(width, wider, kernel_size=3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(wider), nn.GELU())


class Batches:
    """Draw batches of variants of drawings on pastel grounds, moved by up to four pixels, from one seed.

    Args:
        drawings: the variants of each drawing.
        labels: the class of each drawing.
        size: the number of images in a batch.
        seed: decides everything that is drawn.
    """

    def __init__(
        self,
        drawings: UInt8[Tensor, "drawings variants 4 side side"],
        labels: Int64[Tensor, " drawings"],
        size: int,
        seed: int,
    ) -> None:
        self.drawings, self.labels, self.size = drawings, labels, size
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Images, Int64[Tensor, " batch"]]:
        """Draw images, with values from -1 to 1, and their classes."""
        which = self._integers(len(self.drawings))
        chosen = self.drawings[which, self._integers(self.drawings.shape[1])].float() / 255
        grounds = 1 - 0.22 * self._uniform(self.size, 3, 1, 1)
        images = chosen[:, :3] * chosen[:, 3:] + grounds * (1 - chosen[:, 3:])
        down, right = torch.randint(-4, 5, (2,), generator=self.generator).tolist()
        images = images.roll((down, right), dims=(2, 3))
        if self._uniform(1) < 0.5:
            images = images.flip(3)
        return 2 * images - 1, self.labels[which]

    def draw_mixed(self, classes: int) -> tuple[Images, Float[Tensor, "batch classes"]]:
        """Draw images of which most are a mixture of two, in any proportion, and the share of each class in them.

        This is mixup (arXiv 1710.09412).
        """
        images, labels = self.draw()
        shares = F.one_hot(labels, classes).float()
        weight = torch.where(self._uniform(self.size) < MIXED, self._uniform(self.size), torch.ones(1))
        other = torch.randperm(self.size, generator=self.generator)
        mixed = torch.lerp(images[other], images, weight[:, None, None, None])
        return mixed, torch.lerp(shares[other], shares, weight[:, None])

    def _integers(self, high: int) -> Int64[Tensor, " batch"]:
        """Draw whole numbers below `high`."""
        return torch.randint(high, (self.size,), generator=self.generator)

    def _uniform(self, *shape: int) -> Tensor:
        """Draw numbers from 0 to 1."""
        return torch.rand(*shape, generator=self.generator)


def train_teacher(batches: Batches, classes: int, steps: int, learning_rate: float = 3e-3) -> Teacher:
    """Train the teacher to classify drawings and mixtures of them."""
    teacher = Teacher(classes)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=learning_rate, weight_decay=0.05)
    scheduler = make_scheduler(optimizer, steps)
    progress = tqdm(range(steps), desc="teacher", unit="step", mininterval=5)
    for _ in progress:
        images, shares = batches.draw_mixed(classes)
        loss = F.cross_entropy(teacher(images), shares, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return teacher.eval().requires_grad_(False)


def train_tower(tower: nn.Module, teacher: Teacher, batches: Batches, steps: int, learning_rate: float = 6e-3) -> None:
    """Train the tower to have the teacher's features at each patch, and to name drawings as it does."""
    classes = teacher.num_classes
    images, _ = batches.draw_mixed(classes)
    features = teacher.body(images)
    mean, scale = features.mean(dim=(0, 2, 3), keepdim=True), features.std(dim=(0, 2, 3), keepdim=True) + 1e-3
    embedding = _patch_embedding(tower)
    whiten(embedding, torch.cat([batches.draw_mixed(classes)[0] for _ in range(12)]))
    # A patch of the tower has several places of the teacher's grid.
    width, patch = embedding.out_channels, embedding.kernel_size[0]
    places = GRID * patch // CELL
    to_features = nn.Linear(width, features.shape[1] * places**2)
    to_names = nn.Linear(width, classes)
    optimizer = make_optimizer([tower, to_features, to_names], learning_rate)
    scheduler = make_scheduler(optimizer, steps)
    progress = tqdm(range(steps), desc="tower", unit="step", mininterval=5)
    for _ in progress:
        images, _ = batches.draw_mixed(classes)
        features = teacher.body(images)
        wanted = F.log_softmax(teacher.top(features) / TEMPERATURE, dim=1)
        tokens = tower(pixel_values=images).last_hidden_state
        seen = F.fold(to_features(tokens).transpose(1, 2), GRID, kernel_size=places, stride=places)
        named = F.log_softmax(to_names(tokens.mean(dim=1)) / TEMPERATURE, dim=1)
        loss = F.mse_loss(seen, (features - mean) / scale)
        loss = loss + F.kl_div(named, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def _patch_embedding(tower: nn.Module) -> nn.Conv2d:
    """Find the tower's only convolution."""
    (convolution,) = [module for module in tower.modules() if isinstance(module, nn.Conv2d)]
    return convolution


def whiten(embedding: nn.Conv2d, images: Images) -> None:
    """Let the patch embedding start with the principal components of patches, all of the same variance.

    Neighboring pixels are alike, so that random weights see mostly the mean color of a patch; these see shapes.
    """
    patch = embedding.kernel_size[0]
    patches = F.unfold(images, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    patches = patches - patches.mean(dim=0)
    variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    # From the largest; there may be fewer than the embedding is wide.
    variances, components = variances.flip(0)[: embedding.out_channels], components.flip(1)[:, : embedding.out_channels]
    scales = (variances + 1e-3 * variances[0]).rsqrt() / 2
    with torch.no_grad():
        embedding.weight.view(embedding.out_channels, -1)[: len(scales)] = (components * scales).T
        if embedding.bias is not None:
            nn.init.zeros_(embedding.bias)
