"""What a run is expected to cost before it starts: parameters, tokens, FLOPs, memory of each GPU, hours.

Everything follows from the sizes of the model and a few words about the data, by formulas that can be read here. Tests
hold the FLOPs to torch's own count and the kept activations to what autograd keeps; `benchmarks/planned_memory.py`
holds the peak memory to a run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from cafe.checkpoint import resolve_checkpoint
from cafe.data.dataset import NO_LIMIT, MicroBatchSize, blank_branch
from cafe.errors import CafeError
from cafe.losses.contrastive import CHUNK_NUMEL
from cafe.losses.language_modeling import HEAD_CHUNK_NUMEL
from cafe.lvlm.architectures import (
    KNOWN_CONFIGS,
    has_known_tower_sizes,
    is_mixture_of_experts,
    load_config,
    meta_model,
)
from cafe.lvlm.families import PartName, model_part, supports_prefix_sharing
from cafe.lvlm.image_cost import ImageCost, published_image_cost
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import Branch, PackingConfig, build_layout, count_crops, count_unique_tokens
from cafe.training.build import build_chat_processor
from cafe.training.fsdp import iter_layers
from cafe.training.optimizer import configure_trainable_parameters
from cafe.training.recipe import AUTOCAST_DTYPES, Recipe
from cafe.utils.distributed import BUCKET_NUMEL

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """A GPU: dense bfloat16 FLOPs a second with float32 accumulation, float16 being as fast, and bytes of memory.

    As its maker states them.
    """

    name: str
    flops: float
    memory: float
    source: str


HARDWARE = (
    Hardware("A100 40 GB", 312e12, 40e9, "NVIDIA A100 datasheet"),
    Hardware("A100 80 GB", 312e12, 80e9, "NVIDIA A100 datasheet"),
    Hardware("H100 SXM", 989e12, 80e9, "NVIDIA H100 datasheet, without sparsity"),
    Hardware("H200 SXM", 989e12, 141e9, "NVIDIA H200 datasheet, without sparsity"),
    Hardware("RTX 4090", 165.2e12, 24e9, "NVIDIA Ada architecture whitepaper"),
    Hardware("RTX 3090", 71e12, 24e9, "NVIDIA GA102 architecture whitepaper"),
)
RESERVED = 1.5 * GIB  # bytes of a GPU that are kept for CUDA and for what the allocator cannot use
NF4 = 4.127 / 8  # bytes a weight with its scales, quantised themselves (QLoRA, arXiv 2305.14314, section 3)
PAIRS = 100_000  # of a run whose recipe does not say
MFU = 0.35  # of the peak FLOPs, assumed; on an H200 0.47 to 0.55 were measured at 7B, 0.22 to 0.24 at 0.5B


@dataclass(frozen=True, kw_only=True)
class TypicalSample:
    """A typical pair: one picture with its caption, and a dialogue that describes it.

    Attributes:
        width, height: pixels of the picture.
        caption: tokens of the caption, which is also the answer.
        prompt: tokens of the system prompt.
        prompt_overhead_tokens: tokens of an instruction or question with the template around it.
    """

    width: int = 640
    height: int = 480
    caption: int = 200
    prompt: int = 14
    prompt_overhead_tokens: int = 16


@dataclass(frozen=True, kw_only=True)
class StepWorkload:
    """What goes through the model in one step of one process.

    Attributes:
        crops, patches: that the tower reads, and patches of each.
        rows, columns: of tokens in the language model, padding included.
        labels: supervised tokens.
        read: tokens whose last hidden state is read: the labels' and the readouts.
        embedded: the share of the rows, and `embedded_crops` of the crops, that embeds: the gradient cache reads it
            once more, before the rest.
        vectors: embeddings, of all processes.
        micro_batches: how many the step is cut into.
        largest: the largest one's share of the step.
    """

    crops: float
    patches: int
    rows: float
    columns: int
    labels: float
    read: float
    embedded: float = 1.0
    embedded_crops: float = 1.0
    vectors: int = 0
    micro_batches: int = 1
    largest: float = 1.0

    @property
    def tokens(self) -> float:
        """Of the language model's rows."""
        return self.rows * self.columns


@dataclass(frozen=True, kw_only=True)
class TransformerShape:
    """The layers of one part.

    Attributes:
        layers: their number.
        width: of the residual stream.
        heads: width of all query heads together.
        queries: their number.
        intermediate_size: width of the feed-forward part.
        gated: a gate and RMS norms, as in Llama and Qwen; else two matrices and layer norms.
        window: tokens that see each other in all layers but `num_full_attention_layers` of them; None where all see all.
        num_full_attention_layers: see `window`.
    """

    layers: int
    width: int
    heads: int
    queries: int
    intermediate_size: int
    gated: bool
    window: int | None = None
    num_full_attention_layers: int = 0

    def seen(self, length: int) -> int:
        """Tokens that one of a sequence is compared with, over all layers; masked ones count."""
        if self.window:
            return self.num_full_attention_layers * length + (self.layers - self.num_full_attention_layers) * min(
                self.window, length
            )
        return self.layers * length

    def attention_flops(self, length: int) -> float:
        """Of the forward pass over one sequence: queries with keys, and weights with values."""
        return 4.0 * length * self.seen(length) * self.heads

    def kept(self, half: bool, scored: int = 0) -> float:
        """Bytes a token that a layer keeps for the backward pass; `tests/training/test_plan.py` counts them.

        Args:
            half: under autocast.
            scored: the length of a sequence whose scores are kept, as eager attention does.
        """
        # Under autocast the residual and what the norms make of it stay in float32.
        each = {
            (True, False): (24, 16, 16),
            (True, True): (26, 8, 8),
            (False, False): (16, 16, 8),
            (False, True): (16, 8, 4),
        }[self.gated, half]
        each_score = 6 if half else 4  # the softmax's, and a copy of 16 bits
        scores = each_score * self.queries * self.seen(scored) / self.layers
        widths = self.width, self.heads, self.intermediate_size
        return scores + sum(size * width for size, width in zip(each, widths, strict=True))


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one part: all, trained, and in matrices that every token or patch is multiplied with."""

    parameters: int = 0
    trained: int = 0
    matrices: int = 0
    trained_matrices: int = 0


@dataclass(frozen=True)
class ModelSizes:
    """A model as the formulas see it.

    Attributes:
        parts: parameters by part; the head and the embeddings are the language model's.
        patch_embedding_weights: weights of the patch embedding.
        head, head_trained: weights of the language-model head, and those of them that are trained.
        vocabulary: tokens.
        largest, layer, layer_parameters: parameters of the largest tensor, of the largest layer, and of all layers.
        patches_per_token: patches that become one row for the projector, which is then a part of the tower.
        cached_features_per_patch: numbers that the model reads of what the tower makes of a patch.
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
        """Of the model."""
        return sum(part.parameters for part in self.parts.values())

    @property
    def vision_is_cached(self) -> bool:
        """Whether what the tower makes of a picture is kept through a step."""
        inner: tuple[PartName, ...] = ("vision_tower", "projector") if self.patches_per_token > 1 else ("vision_tower",)
        return not any(self.parts[part].trained for part in inner)

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        return sum(part.trained for part in self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The costs of a run.

    Attributes:
        sizes: of the model.
        load: of one step of one GPU.
        flops: of a step, on all GPUs.
        memory: bytes of one GPU at the peak, by what they are for.
        gpus: their number.
        batch: pairs of a step.
        pairs: of the whole run.
    """

    sizes: ModelSizes
    load: StepWorkload
    flops: float
    memory: dict[str, float]
    gpus: int
    batch: int
    pairs: int

    @property
    def peak(self) -> float:
        """Bytes of one GPU at the peak."""
        return sum(self.memory.values())

    def hours(self, hardware: Hardware, mfu: float = MFU) -> float:
        """Of the whole run."""
        return self.pairs / self.batch * self.flops / (self.gpus * hardware.flops * mfu) / 3600


def measure_model(lvlm: PreTrainedModel) -> ModelSizes:
    """The sizes of a model, whose parameters say whether they are trained; it may be without weights.

    Raises:
        CafeError: it is a mixture of experts, of which a token meets a few, or its vision tower has no plain sizes.
    """
    family, text = lvlm.config.model_type, lvlm.config.get_text_config()
    vision: Any = getattr(lvlm.config, "vision_config", None)
    if is_mixture_of_experts(text):
        raise CafeError(f"This {family} model is a mixture of experts, whose costs are not known to `cafe plan`.")
    if not has_known_tower_sizes(vision):
        raise CafeError(f"The vision tower of a {family} model is of a kind whose costs are not known to `cafe plan`.")
    head = lvlm.get_output_embeddings()
    counts: dict[PartName, list[int]] = {name: [0, 0, 0, 0] for name in get_args(PartName)}
    for name, parameter in lvlm.named_parameters():
        counts[model_part(name, family)][0] += parameter.numel()
        counts[model_part(name, family)][1] += parameter.numel() * parameter.requires_grad
    stem = 0
    for name, module in lvlm.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            counts[model_part(f"{name}.", family)][2] += module.weight.numel()
            counts[model_part(f"{name}.", family)][3] += module.weight.numel() * module.weight.requires_grad
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            stem += module.weight.numel()
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in iter_layers(lvlm)]
    own = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    full = len(getattr(vision, "fullatt_block_indexes", []))
    merges, deep = getattr(vision, "spatial_merge_size", 1) ** 2, getattr(vision, "deepstack_visual_indexes", [])
    return ModelSizes(
        {name: ParameterCounts(*count) for name, count in counts.items()},
        patch_embedding_weights=stem,
        head=head.weight.numel(),
        head_trained=head.weight.numel() * head.weight.requires_grad,
        vocabulary=len(head.weight),
        largest=max(parameter.numel() for parameter in lvlm.parameters()),
        layer=max(layers),
        layer_parameters=sum(layers),
        patches_per_token=merges,
        cached_features_per_patch=width if merges == 1 else text.hidden_size * (1 + len(deep)) / merges,
        tower=TransformerShape(
            layers=getattr(vision, "depth", None) or vision.num_hidden_layers,
            width=width,
            heads=width,
            queries=getattr(vision, "num_heads", None) or vision.num_attention_heads,
            intermediate_size=getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio),
            gated=bool(full),
            window=(vision.window_size // vision.patch_size) ** 2 if full else None,
            num_full_attention_layers=full,
        ),
        language=TransformerShape(
            layers=text.num_hidden_layers,
            width=text.hidden_size,
            heads=own * text.num_attention_heads,
            queries=text.num_attention_heads,
            intermediate_size=text.intermediate_size,
            gated=True,
        ),
    )


def image_cost_from_config(
    lvlm: PreTrainedModel, data: TypicalSample, max_pixels: int | None = None, grids: Sequence[Sequence[int]] = ()
) -> ImageCost:
    """What a picture of the data costs in a Hub base of the table, whose processor is not at hand.

    Raises:
        CafeError: the limits, see `set_max_image_size`, are not for it.
    """
    return published_image_cost(lvlm, data.width, data.height, max_pixels, grids)


def image_cost_from_processor(chat_processor: ChatProcessor, lvlm: PreTrainedModel, data: TypicalSample) -> ImageCost:
    """What a picture of the data costs where a model's own processor makes it."""
    branch = blank_branch(chat_processor, data.width, data.height)
    pixels, tokens = branch.image_inputs["pixel_values"], int(branch.image_mask.sum())
    if "image_grid_thw" in branch.image_inputs:
        return ImageCost(crops=1, patches=len(pixels), tokens=tokens)
    patch = lvlm.config.vision_config.patch_size
    height, width = (patch, patch) if isinstance(patch, int) else patch
    patches = pixels.shape[-2] // height * (pixels.shape[-1] // width) if pixels.ndim > 3 else pixels.shape[-2]
    return ImageCost(crops=count_crops([branch]), patches=patches, tokens=tokens)


def typical_branches(
    data: TypicalSample, seen: ImageCost, contrast: bool, speaks: bool, number: int = 0
) -> list[Branch]:
    """The branches of a pair: query, target and dialogue, of tokens that are equal where those of real data are."""
    prompt, shown, caption = [0] * data.prompt, [-1 - number] * seen.tokens, [3 + number] * data.caption
    embedded = (
        [prompt + shown + [1] * data.prompt_overhead_tokens, prompt + caption + [1] * data.prompt_overhead_tokens]
        if contrast
        else []
    )
    spoken = [prompt + shown + [2] * data.prompt_overhead_tokens + caption] if speaks else []
    none = torch.zeros(0, dtype=torch.bool)
    return [Branch(torch.tensor(tokens), none, none) for tokens in embedded + spoken]


def estimate_workload(recipe: Recipe, lvlm: PreTrainedModel, data: TypicalSample, gpus: int) -> StepWorkload:
    """What one step of one GPU reads."""
    if recipe.model.base in KNOWN_CONFIGS:
        seen = image_cost_from_config(lvlm, data, recipe.model.max_image_pixels, recipe.model.image_grids)
    else:
        seen = image_cost_from_processor(
            build_chat_processor(resolve_checkpoint(recipe.model.base), recipe.prompts, recipe.model), lvlm, data
        )
    pairs = recipe.batch_size
    shares = recipe.model.share_prefixes and supports_prefix_sharing(lvlm) is not False
    contrast, speaks = recipe.objective.contrastive_weight > 0, recipe.objective.lm_weight > 0
    times = 1 if shares else contrast + speaks
    together = pairs  # that go through the model at once; what "auto" will find is not known before it is measured
    pair = typical_branches(data, seen, contrast, speaks)
    size = recipe.micro_batch if isinstance(recipe.micro_batch, MicroBatchSize) else NO_LIMIT
    if size.tokens:
        together = min(together, max(1, size.tokens // count_unique_tokens(pair)))
    if size.crops:
        together = min(together, max(1, size.crops // seen.crops))
    width = recipe.model.max_row_tokens or 2 * lvlm.config.get_text_config().hidden_size  # as in `packing_for`
    groups = [typical_branches(data, seen, contrast, speaks, number) for number in range(together)]
    rows, columns = build_layout(groups, PackingConfig(share_prefixes=shares, max_row_tokens=width)).subtree_end.shape
    embedded = pair[: 2 * contrast]
    return StepWorkload(
        crops=pairs * times * seen.crops,
        patches=seen.patches,
        rows=rows * pairs / together,
        columns=columns,
        labels=pairs * data.caption * speaks,
        read=pairs * (data.caption * speaks + 2 * contrast),
        embedded=count_unique_tokens(embedded) / count_unique_tokens(pair) if shares else len(embedded) / len(pair),
        embedded_crops=contrast / times,
        vectors=2 * pairs * gpus * contrast,
        micro_batches=math.ceil(pairs / together),
        largest=together / pairs,
    )


def estimate_flops(sizes: ModelSizes, load: StepWorkload, checkpointed: bool = False) -> dict[str, float]:
    """FLOPs of one step of one GPU, by part: a forward, as much again for each gradient taken, and what is read twice.

    Args:
        sizes: of the model.
        load: what it reads.
        checkpointed: layers are computed once more in the backward pass.
    """
    tower, projector, language = (sizes.parts[name] for name in get_args(PartName))
    again = 1 - 1 / load.micro_batches  # of what is embedded: one micro-batch is read once
    patches, cropped = load.crops * load.patches, load.embedded_crops * again

    def part(
        of: ParameterCounts,
        rows: float,
        attention: float,
        again: float,
        before: int,
        stack: TransformerShape | None = None,
    ) -> float:
        """`before`: parameters trained before this part or in it; without any, no gradient is asked of it."""
        forward = 2 * rows * of.matrices + attention
        if not before:
            return forward * (1 + again)
        backward = 2 * rows * (of.matrices + of.trained_matrices) + 2.5 * attention
        if stack and checkpointed:  # what nothing behind it in its layer keeps, its last product, is not made again
            backward += forward - 2 * rows * stack.layers * stack.intermediate_size * stack.width
        return forward * (1 + again) + backward

    # The last layer works only on the tokens that are read, unless it is made again.
    stack = sizes.language
    late = 0 if checkpointed else stack.width * (stack.heads + 3 * stack.intermediate_size) / language.matrices
    asking = load.rows * stack.attention_flops(load.columns)
    if not checkpointed and 2 * load.read <= load.tokens:
        asking -= 4.0 * load.columns * (load.tokens - load.read) * stack.heads
    rereads = 0.0 if sizes.vision_is_cached else cropped
    projects = rereads if sizes.patches_per_token > 1 else cropped
    attention = load.crops * sizes.tower.attention_flops(load.patches)
    looking = part(tower, patches, attention, rereads, tower.trained, sizes.tower)
    return {
        "vision tower": looking + 2 * patches * sizes.patch_embedding_weights * (1 + rereads + (tower.trained > 0)),
        "projector": part(
            projector, patches / sizes.patches_per_token, 0.0, projects, tower.trained + projector.trained
        ),
        "language model": part(
            language,
            load.tokens - late * (load.tokens - load.read),
            asking,
            load.embedded * again,
            sizes.trained,
            sizes.language,
        ),
        "head": 2 * load.labels * (2 * sizes.head + sizes.head_trained),
    }


def optimizer_state_bytes(sizes: ModelSizes, name: str) -> float:
    """Bytes of an optimizer's state: two moments a weight, as AdamW has them, unless it makes do with less."""
    if name == "adafactor":
        return 0.0  # a number a row and a column
    if name == "muon":  # one moment for the matrices inside the layers
        return 8.0 * sizes.trained - 4.0 * sum(part.trained_matrices for part in sizes.parts.values())
    return (2.0 if name.endswith("_8bit") else 8.0) * sizes.trained


def estimate_memory(sizes: ModelSizes, load: StepWorkload, recipe: Recipe, gpus: int = 1) -> dict[str, float]:
    """Bytes of one GPU at the peak of a step, by what they are for.

    A step that is logged is counted, which keeps the gradients of both losses apart. The peak is one of three moments:
    the losses are taken; the last layer is followed backwards; the optimizer steps.
    """
    half, checkpointed = recipe.model.precision in AUTOCAST_DTYPES, recipe.model.gradient_checkpointing
    shard = recipe.model.shard and gpus > 1
    part = 1 / gpus if shard else 1.0
    patches, tokens = load.largest * load.crops * load.patches, load.largest * load.tokens
    looks = sizes.parts["vision_tower"].trained > 0
    gradients = 4 * sizes.trained * part
    language = sizes.parts["language_model"]
    held = recipe.model.frozen_weights_dtype
    frozen = (4.0 if held == "fp32" else 2.0) * (sizes.parameters - sizes.trained)
    if held == "4bit":
        frozen -= (2.0 - NF4) * (language.matrices - language.trained_matrices)
    state = optimizer_state_bytes(sizes, recipe.optimizer.name)
    always = {"weights": (4 * sizes.trained + frozen) * part, "optimizer state": state * part}
    if shard:  # beside the layers: whole weights and gradients; of the layers, two at a time
        always["gathered weights"] = 8 * (sizes.parameters - sizes.layer_parameters) + 2 * sizes.layer * (
            2 if half else 4
        )

    # What the forward pass keeps for the backward pass.
    eager = recipe.model.attention == "eager"
    per_token, per_patch = sizes.language.kept(half, eager * load.columns), sizes.tower.kept(half, eager * load.patches)
    kept = tokens * sizes.language.layers * (4 * sizes.language.width if checkpointed else per_token)
    kept += looks * patches * sizes.tower.layers * (4 * sizes.tower.width if checkpointed else per_patch)
    kept += 16 * (
        tokens * sizes.language.width + looks * patches * sizes.tower.width
    )  # what is before and behind layers
    if recipe.model.attention in ("sdpa", "eager"):
        kept += tokens * load.columns * (2 if half else 4)  # the mask
    if half and not checkpointed:  # autocast's copies of the matrices
        kept += 2 * sum(each.matrices if held == "fp32" else each.trained_matrices for each in sizes.parts.values())

    # What a frozen tower made of all crops; of a projector in it, autocast makes 16 bits.
    made = load.crops * load.patches * sizes.cached_features_per_patch * sizes.vision_is_cached
    made *= 2 if held != "fp32" or (half and sizes.patches_per_token > 1) else 4

    # What is there for a moment.
    tile = min(HEAD_CHUNK_NUMEL, load.largest * load.labels * sizes.vocabulary)
    losses = (14 if half else 12) * tile + 8 * sizes.head_trained + 2 * half * sizes.head
    layer = max(tokens * per_token, looks * patches * per_patch)
    follow = layer * (1.5 if checkpointed else 0.5)  # a layer made again, and its gradients
    earlier = gradients * 2 if load.micro_batches > 1 else 0.0  # of micro-batches before
    moments = [
        (earlier, kept, made, losses),
        (max(earlier, gradients), kept, made, follow),
        (2 * gradients, 0.0, made, 0.0),
        (gradients, 0.0, 0.0, 4 * max(BUCKET_NUMEL, sizes.largest) if gpus > 1 and not shard else 0.0),
    ]
    pairs, width = load.vectors / 2, sizes.language.width
    contrast = 12 * min(CHUNK_NUMEL, pairs * min(pairs, width)) + 16 * load.vectors * width
    moments = [(grads, acts, made, extra + contrast) for grads, acts, made, extra in moments]
    names = ("gradients", "activations", "vision cache", "working memory")
    return always | dict(zip(names, max(moments, key=sum), strict=True))


def plan(recipe: Recipe, gpus: int = 1, data: TypicalSample | None = None, pairs: int | None = None) -> Plan:
    """The costs of a recipe.

    Args:
        recipe: the run.
        gpus: how many there are; each is one process.
        data: a typical pair.
        pairs: records of the data; the recipe's steps decide where it has them.

    Raises:
        CafeError: the sizes of the base model are not known here.
    """
    data = data or TypicalSample()
    lvlm = meta_model(load_config(resolve_checkpoint(recipe.model.base)))
    lvlm.config.get_text_config()._attn_implementation = recipe.model.attention  # which says whether branches share
    configure_trainable_parameters(lvlm, recipe.model)
    sizes, load = measure_model(lvlm), estimate_workload(recipe, lvlm, data, gpus)
    batch = recipe.batch_size * gpus
    if recipe.max_steps:
        pairs = recipe.max_steps * batch * recipe.optimizer.gradient_accumulation_steps
    return Plan(
        sizes=sizes,
        load=load,
        flops=gpus * sum(estimate_flops(sizes, load, recipe.model.gradient_checkpointing).values()),
        memory=estimate_memory(sizes, load, recipe, gpus),
        gpus=gpus,
        batch=batch,
        pairs=pairs * recipe.num_train_epochs if pairs and not recipe.max_steps else pairs or PAIRS,
    )


def format_plan(plan: Plan, mfu: float = MFU) -> str:
    """A plan as text."""
    sizes, load = plan.sizes, plan.load
    trained = {name.replace("_", " "): part.trained / 1e6 for name, part in sizes.parts.items() if part.trained}
    memory = {name: size / GIB for name, size in plan.memory.items() if size >= 0.05 * GIB}
    pairs = plan.batch / plan.gpus
    rows = {
        "parameters": f"{sizes.parameters / 1e6:,.1f}M, of which {sizes.trained / 1e6:,.1f}M are trained: "
        + ", ".join(f"{name} {count:,.1f}M" for name, count in trained.items()),
        "a step": f"{plan.batch} pairs on {_count(plan.gpus, 'GPU')}, "
        f"in {_count(load.micro_batches, 'micro-batch')} each",
        "a pair": f"{load.tokens / pairs:,.0f} tokens, {load.crops / pairs:g} crops of {load.patches:,} patches",
        "FLOPs a step": f"{plan.flops:.3g}",
        "peak of a GPU": f"{plan.peak / GIB:.1f} GiB: "
        + ", ".join(f"{name} {size:.1f}" for name, size in memory.items()),
        "hours": f"for {plan.pairs:,} pairs, if {mfu:.0%} of the peak bfloat16 FLOPs are used (assumed)",
    }
    lines = [f"{name:14} {text}" for name, text in rows.items()]
    for hardware in HARDWARE:
        fits = plan.peak <= hardware.memory - RESERVED
        hours = f"{plan.hours(hardware, mfu):,.1f}" if fits else "does not fit"
        stated = f"{hardware.flops / 1e12:g} TFLOPS, {hardware.memory / 1e9:g} GB: {hardware.source}"
        lines.append(f"  {hardware.name:12} {hours:>12}   {stated}")
    return "\n".join(lines)


def _count(number: int, name: str) -> str:
    plural = "es" if name.endswith("h") else "s"
    return f"{number} {name}{plural if number > 1 else ''}"
