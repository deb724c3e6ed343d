"""A model as the cost formulas see it: parameters by part, and the shapes of its two transformers."""

from dataclasses import dataclass
from typing import Any, get_args

from torch import nn
from transformers import PreTrainedModel

from cafe.errors import CafeError
from cafe.lvlm.architectures import has_known_tower_sizes, is_mixture_of_experts
from cafe.lvlm.families import PartName, model_part
from cafe.training.fsdp import iter_layers

# Bytes per token that a layer saves for its backward pass, as multiples of the residual stream's width, of the width of
# all query heads and of the feed-forward width, by (gated, under autocast). Under autocast the residual stream and
# what the norms make of it stay in float32.
SAVED_BYTES = {
    (True, False): (24, 16, 16),
    (True, True): (26, 8, 8),
    (False, False): (16, 16, 8),
    (False, True): (16, 8, 4),
}


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """Describe the layers of one transformer.

    Attributes:
        layers: the number of layers.
        width: the width of the residual stream.
        heads: the width of all query heads together.
        queries: the number of query heads.
        intermediate_size: the width of the feed-forward part.
        gated: a gated feed-forward part and RMS norms, as in Llama; else two matrices and layer norms.
        window: the number of tokens that see each other in all layers but `num_full_attention_layers` of them; None
            where all tokens see each other everywhere.
        num_full_attention_layers: the number of layers without a window, if there is one.
    """

    layers: int
    width: int
    heads: int
    queries: int
    intermediate_size: int
    gated: bool
    window: int | None = None
    num_full_attention_layers: int = 0

    def attended_tokens(self, length: int) -> int:
        """Count the tokens that one token of an unmasked sequence attends to, summed over layers."""
        if not self.window:
            return self.layers * length
        full_layers = self.num_full_attention_layers
        windowed_layers = self.layers - full_layers
        return full_layers * length + windowed_layers * min(self.window, length)

    def attention_flops(self, pairs: float) -> float:
        """Count the FLOPs of a forward pass of attention for some (query, key) pairs: query @ key, and weight @ value.

        Args:
            pairs: the number of pairs, summed over layers.
        """
        return 4.0 * pairs * self.heads

    def saved_activation_bytes(self, half: bool, scored: int = 0) -> float:
        """Estimate the bytes per token that a layer saves for the backward pass.

        `tests/planning/test_plan.py` holds them to what autograd saves.

        Args:
            half: the model runs under autocast.
            scored: the length of a sequence whose attention scores are saved, as eager attention does.
        """
        bytes_per_score = 6 if half else 4  # the softmax's output, and under autocast a copy of it in 16 bits
        scores = bytes_per_score * self.queries * self.attended_tokens(scored) / self.layers
        # In the order of `SAVED_BYTES`.
        widths = self.width, self.heads, self.intermediate_size
        return scores + sum(size * width for size, width in zip(SAVED_BYTES[self.gated, half], widths, strict=True))


@dataclass(frozen=True)
class ParameterCounts:
    """Count the parameters of one part.

    Attributes:
        parameters: all of them.
        trained: those that are trained.
        matrices: those in matrices that every token or patch is multiplied with.
        trained_matrices: those of `matrices` that are trained.
    """

    parameters: int = 0
    trained: int = 0
    matrices: int = 0
    trained_matrices: int = 0


@dataclass(frozen=True)
class ModelSizes:
    """Describe a model by the numbers that the formulas need.

    Attributes:
        parts: parameters by part; the head and the embeddings are the language model's.
        patch_embedding_weights: weights of the patch embedding.
        head, head_trained: weights of the language-model head, and those of them that are trained.
        vocabulary: the number of tokens.
        largest, layer, layer_parameters: parameters of the largest tensor, of the largest layer, and of all layers.
        patches_per_token: patches that become one row for the projector, which is then a part of the tower.
        cached_features_per_patch: numbers per patch that the model reads of the tower's output.
        tower, language: the layers of each.
    """

    parts: dict[PartName, ParameterCounts]
    patch_embedding_weights: int
    head: int
    head_trained: int
    vocabulary: int
    largest: int
    layer: int
    layer_parameters: int
    patches_per_token: int
    cached_features_per_patch: float
    tower: TransformerShape
    language: TransformerShape

    @property
    def parameters(self) -> int:
        """Count all parameters."""
        return sum(part.parameters for part in self.parts.values())

    @property
    def trained(self) -> int:
        """Count the trained parameters."""
        return sum(part.trained for part in self.parts.values())

    @property
    def vision_is_cached(self) -> bool:
        """Tell whether the tower's output for an image is kept through a step, which only a frozen tower allows."""
        if self.parts["vision_tower"].trained:
            return False
        merged = self.patches_per_token > 1  # then the projector runs inside the tower
        return not (merged and self.parts["projector"].trained)


def measure_model(lvlm: PreTrainedModel) -> ModelSizes:
    """Read the sizes of a model, which may be on the meta device; `requires_grad` says which parameters are trained.

    Raises:
        CafeError: it is a mixture of experts, of which a token meets a few, or its vision tower lacks the usual sizes.
    """
    family, text = lvlm.config.model_type, lvlm.config.get_text_config()
    vision: Any = getattr(lvlm.config, "vision_config", None)
    # The formulas assume that every token passes every matrix of plain transformer layers.
    if is_mixture_of_experts(text):
        raise CafeError(f"`cafe plan` cannot estimate mixture-of-experts models such as this {family} model.")
    if not has_known_tower_sizes(vision):
        raise CafeError(
            f"`cafe plan` cannot estimate this {family} model: its vision tower's config lacks the usual size fields."
        )
    head: Any = lvlm.get_output_embeddings()
    layers = [_num_parameters(layer) for layer in iter_layers(lvlm)]
    tower = _tower_shape(vision)
    patches_per_token = getattr(vision, "spatial_merge_size", 1) ** 2
    return ModelSizes(
        _count_parameters(lvlm, head),
        patch_embedding_weights=_patch_embedding_weights(lvlm),
        head=head.weight.numel(),
        head_trained=head.weight.numel() * head.weight.requires_grad,
        vocabulary=len(head.weight),
        largest=max(parameter.numel() for parameter in lvlm.parameters()),
        layer=max(layers),
        layer_parameters=sum(layers),
        patches_per_token=patches_per_token,
        cached_features_per_patch=_cached_features_per_patch(vision, text, tower, patches_per_token),
        tower=tower,
        language=_language_shape(text),
    )


def _num_parameters(module: nn.Module) -> int:
    """Count the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _patch_embedding_weights(lvlm: PreTrainedModel) -> int:
    """Count the weights of the patch embedding, which is the only convolution of these models."""
    convolutions = [module for module in lvlm.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)]
    return sum(module.weight.numel() for module in convolutions)


def _cached_features_per_patch(vision: Any, text: Any, tower: TransformerShape, patches_per_token: int) -> float:
    """Count the numbers per patch that the model reads of the tower's output."""
    if patches_per_token == 1:
        return float(tower.width)
    # A tower that merges patches holds the projector, so its output is as wide as the language model. It may return
    # the features of several layers.
    depths = 1 + len(getattr(vision, "deepstack_visual_indexes", []))
    features: float = text.hidden_size * depths / patches_per_token
    return features


def _count_parameters(lvlm: PreTrainedModel, head: nn.Module) -> dict[PartName, ParameterCounts]:
    """Count the parameters of each part."""
    family = lvlm.config.model_type
    # In the order of the fields of `ParameterCounts`.
    counts: dict[PartName, list[int]] = {name: [0, 0, 0, 0] for name in get_args(PartName)}
    for name, parameter in lvlm.named_parameters():
        part = counts[model_part(name, family)]
        part[0] += parameter.numel()
        part[1] += parameter.numel() * parameter.requires_grad
    for name, module in lvlm.named_modules():
        # The head is not among the matrices: it runs on supervised tokens alone, and is counted apart.
        if not isinstance(module, nn.Linear) or module is head:
            continue
        part = counts[model_part(f"{name}.", family)]
        part[2] += module.weight.numel()
        part[3] += module.weight.numel() * module.weight.requires_grad
    return {name: ParameterCounts(*count) for name, count in counts.items()}


def _tower_shape(vision: Any) -> TransformerShape:
    """Read the shape of a vision tower from its config, whose fields have two names each."""
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    # Towers whose attention has windows have a gated feed-forward part too; all others have neither.
    full_attention_layers = len(getattr(vision, "fullatt_block_indexes", []))
    windowed = full_attention_layers > 0
    window = (vision.window_size // vision.patch_size) ** 2 if windowed else None  # in patches
    return TransformerShape(
        layers=getattr(vision, "depth", None) or vision.num_hidden_layers,
        width=width,
        heads=width,
        queries=getattr(vision, "num_heads", None) or vision.num_attention_heads,
        intermediate_size=getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio),
        gated=windowed,
        window=window,
        num_full_attention_layers=full_attention_layers,
    )


def _language_shape(text: Any) -> TransformerShape:
    """Read the shape of a language model from its config."""
    # Unless a head's width is stated, the heads share that of the residual stream.
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return TransformerShape(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        heads=head_dim * text.num_attention_heads,
        queries=text.num_attention_heads,
        intermediate_size=text.intermediate_size,
        gated=True,
    )
