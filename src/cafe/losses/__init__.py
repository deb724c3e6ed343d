"""The losses, as pure tensor functions: no model, no file, no rank."""

from cafe.losses.contrastive import ContrastiveConfig, in_batch_accuracy, info_nce
from cafe.losses.language_modeling import linear_cross_entropy

__all__ = ["ContrastiveConfig", "in_batch_accuracy", "info_nce", "linear_cross_entropy"]
