"""What one step of one GPU reads, worked out from a recipe and a few words about the data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from transformers import PreTrainedModel

from cafe.attention.registration import CAFE_TREE, CAFE_TREE_FLEX
from cafe.checkpoint import resolve_checkpoint
from cafe.data.batch import NO_LIMIT, MicroBatchSize, blank_branch
from cafe.lvlm.architectures import KNOWN_CONFIGS
from cafe.lvlm.families import supports_prefix_sharing
from cafe.lvlm.forward import set_kernel
from cafe.lvlm.image_cost import ImageCost, published_image_cost
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import (
    NO_WORK,
    Branch,
    PackingConfig,
    PackWork,
    count_crops,
    count_unique_tokens,
    count_work,
    pack,
)
from cafe.training.build import build_chat_processor
from cafe.training.precision import AUTOCAST_DTYPES
from cafe.training.recipe import Recipe

# Token ids of the imagined data: equal where those of real data are, so that branches share what real ones share.
PROMPT, EMBEDDING_INSTRUCTION, QUESTION, FIRST_CAPTION = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class TypicalSample:
    """Describe a typical pair: one image with its caption, and a dialogue that describes it.

    Attributes:
        width, height: pixels of the image.
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
    """Describe what goes through the model in one step of one process.

    Attributes:
        crops, patches: crops that the tower reads, and patches of each.
        rows, columns: of tokens in the language model, padding included.
        labels: supervised tokens.
        text: the work of the language model in what is followed backward.
        reread_crops, reread_text: what the gradient cache reads once more, forward alone: the embedded branches of all
            micro-batches but one.
        vectors: embeddings, over all processes.
        micro_batches: how many the step is cut into.
        largest: the largest one's share of the step.
        has_dense_mask: whether attention takes a mask with a number for each pair of tokens in a row.
    """

    crops: float
    patches: int
    rows: float
    columns: int
    labels: float
    text: PackWork
    reread_crops: float = 0.0
    reread_text: PackWork = NO_WORK
    vectors: int = 0
    micro_batches: int = 1
    largest: float = 1.0
    has_dense_mask: bool = False

    @property
    def padded_tokens(self) -> float:
        """Count the tokens of the language model's rows, padding included."""
        return self.rows * self.columns


def image_cost_from_config(
    lvlm: PreTrainedModel, data: TypicalSample, max_pixels: int | None = None, grids: Sequence[Sequence[int]] = ()
) -> ImageCost:
    """Compute the cost of an image for a known Hub base, whose processor need not be on this machine.

    Raises:
        CafeError: the limits do not fit the model; see `set_max_image_size`.
    """
    return published_image_cost(lvlm, data.width, data.height, max_pixels, grids)


def image_cost_from_processor(chat_processor: ChatProcessor, lvlm: PreTrainedModel, data: TypicalSample) -> ImageCost:
    """Compute the cost of an image by processing a blank one of its size with the model's own processor."""
    branch = blank_branch(chat_processor, data.width, data.height)
    pixels, tokens = branch.image_inputs["pixel_values"], int(branch.image_mask.sum())
    # Patches of images of any size, laid end to end.
    if "image_grid_thw" in branch.image_inputs:
        return ImageCost(crops=1, patches=len(pixels), tokens=tokens)
    # Crops as rows of patches, or as (..., channels, height, width).
    patches = pixels.shape[-2]
    if pixels.ndim > 3:
        patch = lvlm.config.vision_config.patch_size
        height, width = (patch, patch) if isinstance(patch, int) else patch
        patches = pixels.shape[-2] // height * (pixels.shape[-1] // width)
    return ImageCost(crops=count_crops([branch]), patches=patches, tokens=tokens)


def typical_pair(
    data: TypicalSample, image: ImageCost, contrast: bool, language: bool, number: int = 0
) -> tuple[list[Branch], list[Branch]]:
    """Build the branches of pair number `number`.

    Returns:
        The embedded branches, query and target, if the pair is contrasted; its dialogue, if the language loss is taken.
    """
    prompt, overhead = [PROMPT] * data.prompt, data.prompt_overhead_tokens
    # Each pair has an image and a caption of its own. Images take negative ids, which no other token has.
    image_tokens, caption = [-1 - number] * image.tokens, [FIRST_CAPTION + number] * data.caption
    embedded, dialogue = [], []
    if contrast:
        instruction = [EMBEDDING_INSTRUCTION] * overhead
        embedded = [_branch(prompt + image_tokens + instruction), _branch(prompt + caption + instruction)]
    if language:
        dialogue = [_branch(prompt + image_tokens + [QUESTION] * overhead + caption, supervised=data.caption)]
    return embedded, dialogue


def _branch(tokens: list[int], supervised: int = 0) -> Branch:
    """Make a branch whose last tokens are supervised; image tokens, told apart by their ids, are not marked."""
    is_supervised = torch.arange(len(tokens)) >= len(tokens) - supervised
    return Branch(torch.tensor(tokens), is_supervised, torch.zeros_like(is_supervised))


def estimate_workload(recipe: Recipe, lvlm: PreTrainedModel, data: TypicalSample, gpus: int) -> StepWorkload:
    """Estimate what one step of one GPU reads.

    Args:
        recipe: the run.
        lvlm: its base model, which may be on the meta device.
        data: a typical pair.
        gpus: the number of GPUs, each one process.
    """
    image = _image_cost(recipe, lvlm, data)
    pairs = recipe.batch_size
    contrast, language = recipe.objective.contrastive_weight > 0, recipe.objective.lm_weight > 0
    shares = recipe.model.share_prefixes and supports_prefix_sharing(lvlm) is not False
    # A query and a dialogue show the same image; a switched-off loss counts 0 in all that follows.
    image_reads = 1 if shares else contrast + language
    pair = list(chain(*typical_pair(data, image, contrast, language)))
    together = _pairs_per_micro_batch(recipe, pair, image)

    # Pack the pairs of one micro-batch as training would on a GPU.
    implementation = lvlm.config.get_text_config()._attn_implementation
    dtype = AUTOCAST_DTYPES.get(recipe.model.precision, torch.float32)
    packing = set_kernel(PackingConfig(share_prefixes=shares), lvlm, None, dtype)
    packing = replace(packing, max_row_tokens=recipe.model.max_row_tokens or packing.max_row_tokens)
    numbered = [typical_pair(data, image, contrast, language, number) for number in range(together)]
    embedded, dialogues = zip(*numbered, strict=True)
    joint = pack(embedded, dialogues, packing)
    rows, columns = joint.inputs["input_ids"].shape

    # The gradient cache reads the embedded branches once more, of all pairs but those of one micro-batch.
    reread_pairs = contrast * (pairs - together)
    reread_text = NO_WORK
    if reread_pairs:
        reread_text = count_work(pack(embedded, [[]] * together, packing)) * (reread_pairs / together)
    return StepWorkload(
        crops=pairs * image_reads * image.crops,
        patches=image.patches,
        rows=rows * pairs / together,
        columns=columns,
        labels=pairs * data.caption * language,
        text=count_work(joint) * (pairs / together),
        reread_crops=reread_pairs * image.crops,
        reread_text=reread_text,
        vectors=2 * pairs * gpus * contrast,
        micro_batches=math.ceil(pairs / together),
        largest=together / pairs,
        has_dense_mask=packing.kernel == "mask" and implementation in ("eager", CAFE_TREE, CAFE_TREE_FLEX),
    )


def _image_cost(recipe: Recipe, lvlm: PreTrainedModel, data: TypicalSample) -> ImageCost:
    """Compute the cost of an image: from the table for a known Hub base, otherwise by the base's own processor."""
    if recipe.model.base in KNOWN_CONFIGS:
        return image_cost_from_config(lvlm, data, recipe.model.max_image_pixels, recipe.model.image_grids)
    base = resolve_checkpoint(recipe.model.base)
    return image_cost_from_processor(build_chat_processor(base, recipe.prompts, recipe.model), lvlm, data)


def _pairs_per_micro_batch(recipe: Recipe, pair: list[Branch], image: ImageCost) -> int:
    """Count the pairs that go through the model at once; what "auto" will find is not known before it is measured."""
    size = recipe.micro_batch if isinstance(recipe.micro_batch, MicroBatchSize) else NO_LIMIT
    # Both limits may be set; a pair that is larger than one goes through alone.
    pairs = recipe.batch_size
    if size.tokens:
        pairs = min(pairs, max(1, size.tokens // count_unique_tokens(pair)))
    if size.crops:
        pairs = min(pairs, max(1, size.crops // image.crops))
    return pairs
