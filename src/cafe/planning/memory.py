"""Memory of one GPU at the peak of a step, from the sizes of the model and what the step reads.

`benchmarks/planned_memory.py` holds it to runs. A step that is logged is counted, which keeps the gradients of both
losses apart.
"""

from dataclasses import dataclass

from cafe.losses.contrastive import CHUNK_NUMEL
from cafe.losses.language_modeling import HEAD_CHUNK_NUMEL
from cafe.planning.sizes import ModelSizes, TransformerShape
from cafe.planning.workload import StepWorkload
from cafe.training.precision import AUTOCAST_DTYPES
from cafe.training.recipe import Recipe
from cafe.utils.distributed import BUCKET_NUMEL

NF4 = 4.127 / 8  # bytes per weight with its scales, which are quantized themselves (QLoRA, arXiv 2305.14314, section 3)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Count the bytes in use at one moment of a step, beside weights and optimizer state.

    Attributes:
        gradients: of weights.
        activations: saved for the backward pass.
        vision_cache: what a frozen tower made of the step's images.
        working_memory: there for this moment alone.
    """

    gradients: float
    activations: float
    vision_cache: float
    working_memory: float

    @property
    def total(self) -> float:
        """Sum the bytes."""
        return self.gradients + self.activations + self.vision_cache + self.working_memory


def optimizer_state_bytes(sizes: ModelSizes, name: str) -> float:
    """Count the bytes of an optimizer's state: two float32 moments per trained weight for AdamW, fewer for others."""
    if name == "adafactor":
        return 0.0  # one number per row and per column
    if name == "muon":  # a single moment for the matrices inside the layers
        return 8.0 * sizes.trained - 4.0 * sum(part.trained_matrices for part in sizes.parts.values())
    bytes_per_weight = 2.0 if name.endswith("_8bit") else 8.0
    return bytes_per_weight * sizes.trained


def estimate_memory(sizes: ModelSizes, load: StepWorkload, recipe: Recipe, gpus: int = 1) -> dict[str, float]:
    """Estimate the bytes of one GPU at the peak of a step, by what they are for.

    The peak is at one of four moments: the losses are computed, the last layer is followed backward, both losses'
    gradients are there, or gradients are summed over processes.
    """
    gradients = 4 * sizes.trained * _share_per_gpu(recipe, gpus)
    activations = saved_activation_bytes(sizes, load, recipe)
    cache = vision_cache_bytes(sizes, load, recipe)
    earlier = 2 * gradients if load.micro_batches > 1 else 0.0  # of micro-batches before, each loss's own

    contrast = contrastive_bytes(sizes, load)
    # In the order of the docstring.
    moments = (
        Moment(
            gradients=earlier,
            activations=activations,
            vision_cache=cache,
            working_memory=language_loss_bytes(sizes, load, recipe) + contrast,
        ),
        Moment(
            gradients=max(earlier, gradients),
            activations=activations,
            vision_cache=cache,
            working_memory=backward_layer_bytes(sizes, load, recipe) + contrast,
        ),
        Moment(gradients=2 * gradients, activations=0.0, vision_cache=cache, working_memory=contrast),
        Moment(
            gradients=gradients,
            activations=0.0,
            vision_cache=0.0,
            working_memory=reduce_bytes(sizes, recipe, gpus) + contrast,
        ),
    )
    peak = max(moments, key=lambda moment: moment.total)
    return {
        **resident_bytes(sizes, recipe, gpus),
        "gradients": peak.gradients,
        "activations": peak.activations,
        "vision cache": peak.vision_cache,
        "working memory": peak.working_memory,
    }


def resident_bytes(sizes: ModelSizes, recipe: Recipe, gpus: int) -> dict[str, float]:
    """Count what is there through the whole run: 4 bytes per trained weight, frozen weights in their dtype, moments."""
    share, dtype = _share_per_gpu(recipe, gpus), recipe.model.frozen_weights_dtype
    bytes_per_frozen_weight = 4.0 if dtype == "fp32" else 2.0
    frozen = bytes_per_frozen_weight * (sizes.parameters - sizes.trained)
    # In 4 bits are the frozen matrices of the language model alone; the rest of what is frozen is in 16.
    if dtype == "4bit":
        language = sizes.parts["language_model"]
        frozen -= (2.0 - NF4) * (language.matrices - language.trained_matrices)
    resident = {
        "weights": (4 * sizes.trained + frozen) * share,
        "optimizer state": optimizer_state_bytes(sizes, recipe.optimizer.name) * share,
    }
    # Under FSDP, what is outside the layers is gathered whole, with its gradients; of the layers, two at a time are.
    if share < 1:
        outside_layers = sizes.parameters - sizes.layer_parameters
        bytes_per_weight = 2 if _uses_autocast(recipe) else 4
        resident["gathered weights"] = 8 * outside_layers + 2 * sizes.layer * bytes_per_weight
    return resident


def saved_activation_bytes(sizes: ModelSizes, load: StepWorkload, recipe: Recipe) -> float:
    """Count what the forward pass of the largest micro-batch saves for the backward pass."""
    half, checkpointed = _uses_autocast(recipe), recipe.model.gradient_checkpointing
    tokens, patches = _micro_batch_rows(sizes, load)

    def per_row(shape: TransformerShape, layer_bytes: float) -> float:
        """Count per token or patch: each layer's input or all it saves, and what is before and behind the layers."""
        if checkpointed:
            layer_bytes = 4 * shape.width
        return shape.layers * layer_bytes + 16 * shape.width

    token_bytes, patch_bytes = _layer_bytes(sizes, load, recipe)
    saved = tokens * per_row(sizes.language, token_bytes) + patches * per_row(sizes.tower, patch_bytes)
    # A dense attention mask has a number for each pair of tokens in a row.
    if load.has_dense_mask:
        saved += tokens * load.columns * (2 if half else 4)
    if half and not checkpointed:
        saved += _autocast_copy_bytes(sizes, recipe)
    return saved


def _autocast_copy_bytes(sizes: ModelSizes, recipe: Recipe) -> float:
    """Count autocast's copies of the matrices in 16 bits: of those that are not in 16 bits already."""
    parts = sizes.parts.values()
    if recipe.model.frozen_weights_dtype == "fp32":
        return 2 * sum(part.matrices for part in parts)
    return 2 * sum(part.trained_matrices for part in parts)


def vision_cache_bytes(sizes: ModelSizes, load: StepWorkload, recipe: Recipe) -> float:
    """Count what a frozen tower made of all images of the step, which is kept through it."""
    if not sizes.vision_is_cached:
        return 0.0
    # A projector inside the tower (patches are merged) has its output in autocast's 16 bits.
    projector_output = _uses_autocast(recipe) and sizes.patches_per_token > 1
    sixteen_bits = recipe.model.frozen_weights_dtype != "fp32" or projector_output
    return load.crops * load.patches * sizes.cached_features_per_patch * (2 if sixteen_bits else 4)


def language_loss_bytes(sizes: ModelSizes, load: StepWorkload, recipe: Recipe) -> float:
    """Count the logits of one chunk, the head's gradient and, under autocast, its copy in 16 bits."""
    half = _uses_autocast(recipe)
    # Three tensors in float32 have the shape of the logits, and under autocast one in 16 bits.
    logits = min(HEAD_CHUNK_NUMEL, load.largest * load.labels * sizes.vocabulary)
    return (14 if half else 12) * logits + 8 * sizes.head_trained + 2 * half * sizes.head


def backward_layer_bytes(sizes: ModelSizes, load: StepWorkload, recipe: Recipe) -> float:
    """Count what the backward pass of one layer takes: its gradients, and its activations where it is recomputed."""
    tokens, patches = _micro_batch_rows(sizes, load)
    token_bytes, patch_bytes = _layer_bytes(sizes, load, recipe)
    layer = max(tokens * token_bytes, patches * patch_bytes)
    # The gradients take half of what the activations do, as measured; recomputed activations are there beside them.
    factor = 1.5 if recipe.model.gradient_checkpointing else 0.5
    return layer * factor


def contrastive_bytes(sizes: ModelSizes, load: StepWorkload) -> float:
    """Count one chunk of the similarity matrix, and the embeddings of all processes with their gradients."""
    pairs, width = load.vectors / 2, sizes.language.width
    return 12 * min(CHUNK_NUMEL, pairs * min(pairs, width)) + 16 * load.vectors * width


def reduce_bytes(sizes: ModelSizes, recipe: Recipe, gpus: int) -> float:
    """Count the bucket in which whole gradients are summed over processes."""
    # FSDP sums gradients itself, without these buckets.
    if gpus == 1 or recipe.model.shard:
        return 0.0
    # A gradient larger than a bucket has one of its own.
    return 4 * max(BUCKET_NUMEL, sizes.largest)


def _share_per_gpu(recipe: Recipe, gpus: int) -> float:
    """Return the fraction of weights, gradients and optimizer state that is on one GPU."""
    return 1 / gpus if recipe.model.shard else 1.0


def _uses_autocast(recipe: Recipe) -> bool:
    """Tell whether the model runs in 16 bits under autocast."""
    return recipe.model.precision in AUTOCAST_DTYPES


def _micro_batch_rows(sizes: ModelSizes, load: StepWorkload) -> tuple[float, float]:
    """Count the tokens of the largest micro-batch, padding included, and its patches that have a backward pass."""
    has_backward = sizes.parts["vision_tower"].trained > 0
    return load.largest * load.padded_tokens, has_backward * load.largest * load.crops * load.patches


def _layer_bytes(sizes: ModelSizes, load: StepWorkload, recipe: Recipe) -> tuple[float, float]:
    """Count the bytes that a layer saves per token of the language model, and per patch of the tower."""
    half, eager = _uses_autocast(recipe), recipe.model.attention == "eager"
    # Other kinds of attention save no scores: the length is then multiplied by 0.
    return (
        sizes.language.saved_activation_bytes(half, eager * load.columns),
        sizes.tower.saved_activation_bytes(half, eager * load.patches),
    )
