"""FLOPs of a step, from the sizes of the model and what the step reads.

A product of a row with a matrix of n weights takes 2n FLOPs forward, 2n for the gradient of the row and 2n for that of
the matrix. Attention is counted for the (query, key) pairs that are seen, and padding is not counted. Nothing is
counted twice, except the passes that gradient checkpointing and the gradient cache add. Without these two, the sum is
the work of a step for MFU. Tests hold it to PyTorch's own count.
"""

from dataclasses import dataclass

from cafe.packing import PackWork
from cafe.planning.sizes import ModelSizes, ParameterCounts, TransformerShape
from cafe.planning.workload import StepWorkload

# Times its forward FLOPs: each of its two products has two gradients. Kernels compute the scores again in the backward
# pass to save memory, which would make it 2.5.
ATTENTION_BACKWARD = 2.0


@dataclass(frozen=True, kw_only=True)
class _PartPasses:
    """Count the passes over one part of the model.

    Attributes:
        counts: its parameters.
        rows: tokens or patches that it reads.
        attention: FLOPs of attention in one forward pass over them.
        reread_rows, reread_attention: the same of what the gradient cache reads once more, forward alone.
        trained_up_to_here: parameters trained before this part or in it; without any, it has no backward pass.
        recomputed: its layers, if gradient checkpointing computes them once more in the backward pass.
    """

    counts: ParameterCounts
    rows: float
    attention: float = 0.0
    reread_rows: float
    reread_attention: float = 0.0
    trained_up_to_here: int
    recomputed: TransformerShape | None = None

    @property
    def flops(self) -> float:
        """Count the FLOPs of all passes."""
        forward = 2 * self.rows * self.counts.matrices + self.attention
        reread = 2 * self.reread_rows * self.counts.matrices + self.reread_attention
        if not self.trained_up_to_here:
            return forward + reread
        # Every matrix passes the gradient on to its rows; only a trained one has a gradient of its own.
        both = self.counts.matrices + self.counts.trained_matrices
        backward = 2 * self.rows * both + ATTENTION_BACKWARD * self.attention
        if self.recomputed:
            # A layer's last product is not computed again: nothing saves its result.
            last_product = self.recomputed.layers * self.recomputed.intermediate_size * self.recomputed.width
            backward += forward - 2 * self.rows * last_product
        return forward + reread + backward


def estimate_flops(sizes: ModelSizes, load: StepWorkload, checkpointed: bool = False) -> dict[str, float]:
    """Estimate the FLOPs of one step of one GPU, by part.

    Args:
        sizes: of the model.
        load: what the step reads.
        checkpointed: layers are computed once more in the backward pass.
    """
    return {
        "vision tower": _vision_tower(sizes, load, checkpointed),
        "projector": _projector(sizes, load),
        "language model": _language_model(sizes, load, checkpointed),
        "head": 2 * load.labels * (2 * sizes.head + sizes.head_trained),
    }


def _tower_rereads(sizes: ModelSizes, load: StepWorkload) -> float:
    """Return the crops that the tower reads once more: none if its output is kept."""
    return 0.0 if sizes.vision_is_cached else load.reread_crops


def _vision_tower(sizes: ModelSizes, load: StepWorkload, checkpointed: bool) -> float:
    """Count the FLOPs of the vision tower."""
    tower = sizes.parts["vision_tower"]
    patches, reread_patches = load.crops * load.patches, _tower_rereads(sizes, load) * load.patches
    keys = sizes.tower.attended_tokens(load.patches)  # of each patch
    layers = _PartPasses(
        counts=tower,
        rows=patches,
        attention=sizes.tower.attention_flops(patches * keys),
        reread_rows=reread_patches,
        reread_attention=sizes.tower.attention_flops(reread_patches * keys),
        trained_up_to_here=tower.trained,
        recomputed=sizes.tower if checkpointed else None,
    )
    # The patch embedding has a gradient of its weights and none of the pixels.
    stem_patches = patches * (1 + (tower.trained > 0)) + reread_patches
    return layers.flops + 2 * stem_patches * sizes.patch_embedding_weights


def _projector(sizes: ModelSizes, load: StepWorkload) -> float:
    """Count the FLOPs of the projector."""
    projector = sizes.parts["projector"]
    # A projector inside the tower merges patches, and its output is kept with the tower's.
    inside_tower = sizes.patches_per_token > 1
    reread_crops = _tower_rereads(sizes, load) if inside_tower else load.reread_crops
    rows_per_crop = load.patches / sizes.patches_per_token
    passes = _PartPasses(
        counts=projector,
        rows=load.crops * rows_per_crop,
        reread_rows=reread_crops * rows_per_crop,
        trained_up_to_here=sizes.parts["vision_tower"].trained + projector.trained,
    )
    return passes.flops


def _language_model(sizes: ModelSizes, load: StepWorkload, checkpointed: bool) -> float:
    """Count the FLOPs of the language model's layers."""
    passes = _PartPasses(
        counts=sizes.parts["language_model"],
        rows=_matrix_rows(sizes, load.text, checkpointed),
        attention=_text_attention(sizes, load.text, checkpointed),
        reread_rows=_matrix_rows(sizes, load.reread_text, checkpointed),
        reread_attention=_text_attention(sizes, load.reread_text, checkpointed),
        trained_up_to_here=sizes.trained,
        recomputed=sizes.language if checkpointed else None,
    )
    return passes.flops


def _matrix_rows(sizes: ModelSizes, work: PackWork, checkpointed: bool) -> float:
    """Count the tokens that pass all matrices of the language model, as an average over its weights."""
    # The last layer runs its output projection and its three feed-forward matrices on the tokens that are read alone,
    # unless it is recomputed.
    if checkpointed:
        return work.tokens
    shape, matrices = sizes.language, sizes.parts["language_model"].matrices
    trimmed = shape.width * (shape.heads + 3 * shape.intermediate_size)
    return work.tokens - trimmed / matrices * (work.tokens - work.read)


def _text_attention(sizes: ModelSizes, work: PackWork, checkpointed: bool) -> float:
    """Count the FLOPs of a forward pass of the language model's attention."""
    # The last layer's queries are needed for the tokens that are read alone, with the same exception.
    last_layer = work.seen if checkpointed else work.read_seen
    pairs = (sizes.language.layers - 1) * work.seen + last_layer
    return sizes.language.attention_flops(pairs)
