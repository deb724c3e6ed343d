"""The losses, as pure tensor functions."""

from cafe.losses.contrastive import in_batch_accuracy, info_nce, matryoshka
from cafe.losses.language_modeling import linear_cross_entropy

__all__ = ["in_batch_accuracy", "info_nce", "linear_cross_entropy", "matryoshka"]
