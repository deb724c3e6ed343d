"""FLOPs of a step, from the sizes of the model and what the step reads.

A product of a row with a matrix of n weights takes 2n FLOPs forward, 2n for the gradient of the row and 2n for that of
the matrix. Tests hold the sum to PyTorch's own count.
"""

from dataclasses import dataclass

from cafe.planning.sizes import ModelSizes, ParameterCounts, TransformerShape
from cafe.planning.workload import StepWorkload

ATTENTION_BACKWARD = 2.5  # times its forward FLOPs: five products for two, as the scores are computed again


@dataclass(frozen=True, kw_only=True)
class _PartPasses:
    """Count the passes over one part of the model.

    Attributes:
        counts: its parameters.
        rows: tokens or patches that it reads.
        attention: FLOPs of attention in one forward pass.
        extra_forwards: forward passes beside the first, as the gradient cache makes.
        trained_up_to_here: parameters trained before this part or in it; without any, it has no backward pass.
        recomputed: its layers, if gradient checkpointing computes them once more in the backward pass.
    """

    counts: ParameterCounts
    rows: float
    attention: float
    extra_forwards: float
    trained_up_to_here: int
    recomputed: TransformerShape | None = None

    @property
    def flops(self) -> float:
        """Count the FLOPs of all passes."""
        forward = 2 * self.rows * self.counts.matrices + self.attention
        forwards = forward * (1 + self.extra_forwards)
        if not self.trained_up_to_here:
            return forwards
        # Every matrix passes the gradient on to its rows; only a trained one has a gradient of its own.
        both = self.counts.matrices + self.counts.trained_matrices
        backward = 2 * self.rows * both + ATTENTION_BACKWARD * self.attention
        if self.recomputed:
            # A layer's last product is not computed again: nothing saves its result.
            last_product = self.recomputed.layers * self.recomputed.intermediate_size * self.recomputed.width
            backward += forward - 2 * self.rows * last_product
        return forwards + backward


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


def _read_twice(load: StepWorkload) -> float:
    """Return the share of what is embedded that the gradient cache reads twice: all micro-batches but the first."""
    return 1 - 1 / load.micro_batches


def _crops_read_twice(load: StepWorkload) -> float:
    """Return the share of the step's crops that the gradient cache reads twice."""
    return load.embedded_crops * _read_twice(load)


def _tower_rereads(sizes: ModelSizes, load: StepWorkload) -> float:
    """Return the share of the step's crops that the tower reads twice: none if its output is kept."""
    if sizes.vision_is_cached:
        return 0.0
    return _crops_read_twice(load)


def _vision_tower(sizes: ModelSizes, load: StepWorkload, checkpointed: bool) -> float:
    """Count the FLOPs of the vision tower."""
    tower = sizes.parts["vision_tower"]
    patches, rereads = load.crops * load.patches, _tower_rereads(sizes, load)
    layers = _PartPasses(
        counts=tower,
        rows=patches,
        attention=load.crops * sizes.tower.attention_flops(load.patches),
        extra_forwards=rereads,
        trained_up_to_here=tower.trained,
        recomputed=sizes.tower if checkpointed else None,
    )
    # The patch embedding has a gradient of its weights and none of the pixels.
    stem_passes = 1 + rereads + (tower.trained > 0)
    return layers.flops + 2 * patches * sizes.patch_embedding_weights * stem_passes


def _projector(sizes: ModelSizes, load: StepWorkload) -> float:
    """Count the FLOPs of the projector."""
    projector = sizes.parts["projector"]
    # A projector inside the tower merges patches, and its output is kept with the tower's.
    inside_tower = sizes.patches_per_token > 1
    passes = _PartPasses(
        counts=projector,
        rows=load.crops * load.patches / sizes.patches_per_token,
        attention=0.0,
        extra_forwards=_tower_rereads(sizes, load) if inside_tower else _crops_read_twice(load),
        trained_up_to_here=sizes.parts["vision_tower"].trained + projector.trained,
    )
    return passes.flops


def _language_model(sizes: ModelSizes, load: StepWorkload, checkpointed: bool) -> float:
    """Count the FLOPs of the language model's layers."""
    shape, language = sizes.language, sizes.parts["language_model"]
    rows, attention = load.tokens, load.rows * shape.attention_flops(load.columns)
    # The last layer runs its queries and its feed-forward part on the tokens that are read, unless it is recomputed.
    if not checkpointed:
        unread = load.tokens - load.read
        # As fewer rows: those of the output projection and of the three feed-forward matrices, as a share of all.
        rows -= shape.width * (shape.heads + 3 * shape.intermediate_size) / language.matrices * unread
        # Where more than half of the tokens are read, all queries are computed; see `QuerySubset.pre_hook`.
        if 2 * load.read <= load.tokens:
            attention -= 4.0 * load.columns * unread * shape.heads
    passes = _PartPasses(
        counts=language,
        rows=rows,
        attention=attention,
        extra_forwards=load.embedded * _read_twice(load),
        trained_up_to_here=sizes.trained,
        recomputed=shape if checkpointed else None,
    )
    return passes.flops
