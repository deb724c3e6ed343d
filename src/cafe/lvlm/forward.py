"""One pass of a model over a pack, and how branches are packed for a model."""

import logging
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor
from transformers import Cache, PreTrainedModel

from cafe.attention.paths import HALF_PRECISION
from cafe.attention.tree import choose_kernel, tree_attention
from cafe.content import Content, Dialogue, Turn
from cafe.errors import CheckpointError, RecipeError
from cafe.lvlm.families import MASKED_ATTENTION, logit_softcap, position_ids_fn, supports_prefix_sharing
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import dialogue_messages, embedding_messages
from cafe.packing import PackedBatch, PackingConfig, pack

logger = logging.getLogger(__name__)

UNBOUNDED_ROW = 2**40  # a row length that holds any batch
FLEX_MULTIPLE = 512  # tokens: four of FlexAttention's blocks
CUDNN_MULTIPLE = 128  # tokens: of rows that are read under a mask on a GPU


def forward_packed(
    lvlm: PreTrainedModel, packed: PackedBatch, cache: Cache | None = None
) -> tuple[Float[Tensor, "readouts dim"], Float[Tensor, "supervised dim"]]:
    """Run one forward pass over a pack.

    Args:
        lvlm: the model.
        packed: the pack.
        cache: an empty cache, which keeps the keys and values of all tokens where they lie; None to keep none.

    Returns:
        The last hidden states (after the final norm) of the readouts, and those that predict the supervised tokens.

    Raises:
        CheckpointError: the model has no embedding of a token.
    """
    device = lvlm.device
    check_token_ids(lvlm, packed.inputs["input_ids"])
    inputs: dict[str, Any] = {**to_device(packed.inputs, device, lvlm.dtype)}
    if packed.pixel_decoder:
        inputs["pixel_values"] = packed.pixel_decoder.normalize(inputs["pixel_values"]).to(lvlm.dtype)

    cache_inputs: dict[str, Any] = {"use_cache": cache is not None, "past_key_values": cache}

    # All that reaches into the model from outside is entered here; see `cafe.attention`.
    with tree_attention(lvlm, packed.tree, packed.embedding_index, packed.logits_index) as attention_inputs:
        hidden = lvlm.base_model(**inputs, **attention_inputs, **cache_inputs).last_hidden_state

    embedding_index = packed.embedding_index.to(device, non_blocking=True)
    logits_index = packed.logits_index.to(device, non_blocking=True)
    readouts = hidden[embedding_index[:, 0], embedding_index[:, 1]]
    predictors = hidden[logits_index[:, 0], logits_index[:, 1]]
    return readouts, predictors


def check_token_ids(lvlm: PreTrainedModel, input_ids: Int64[Tensor, "rows columns"]) -> None:
    """Make sure that the model has an embedding of every token, as it may not with a damaged or another's tokenizer.

    A GPU would fail without a word about the reason. Image tokens, which need no embedding, are left out.

    Raises:
        CheckpointError: a token has none.
    """
    num_embeddings = getattr(lvlm.get_input_embeddings(), "num_embeddings", None)
    image_token = getattr(lvlm.config, "image_token_id", None)
    words = input_ids if image_token is None else input_ids[input_ids != image_token]
    if num_embeddings is None or not words.numel():
        return
    largest = int(words.max())
    if largest >= num_embeddings:
        raise CheckpointError(
            f"The tokenizer of {lvlm.name_or_path} makes token {largest}, and the model has {num_embeddings} "
            "embeddings: the files belong to different models, or are damaged."
        )


def compute_logits(lvlm: PreTrainedModel, hidden: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens vocabulary"]:
    """Compute the model's logits, in float32, from its last hidden states."""
    logits: Tensor = lvlm.get_output_embeddings()(hidden).float()
    softcap = logit_softcap(lvlm)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    return logits


def infer_packing(lvlm: PreTrainedModel, chat_processor: ChatProcessor) -> PackingConfig:
    """Choose how branches are packed for a model: as trees if it supports them, which is tried for unknown families.

    Raises:
        RecipeError: the attention implementation takes no mask, which a prefix-LM needs to attend to prompts both ways.
    """
    text_config = lvlm.config.get_text_config()
    attention, family = text_config._attn_implementation, lvlm.config.model_type
    if chat_processor.prefix_lm and attention not in MASKED_ATTENTION:
        raise RecipeError(f"model.attention: a {family} model reads prompts both ways, and {attention} takes no mask.")

    can_share = supports_prefix_sharing(lvlm)  # None if it has to be tried, for which the packing must share
    packing = PackingConfig(
        share_prefixes=can_share is not False,
        pad_token_id=chat_processor.tokenizer.pad_token_id or 0,
        position_ids_fn=position_ids_fn(lvlm),
        token_type_fns=chat_processor.token_type_fns,
    )
    packing = set_kernel(packing, lvlm, lvlm.device, lvlm.dtype)
    if can_share is None and not supports_tree_attention(lvlm, chat_processor, packing):
        packing = set_kernel(replace(packing, share_prefixes=False), lvlm, lvlm.device, lvlm.dtype)
    if not packing.share_prefixes:
        logger.warning(
            "%s does not support prefix sharing; encoding each branch separately (slower, same results).", family
        )
    return packing


def set_kernel(
    packing: PackingConfig, lvlm: PreTrainedModel, device: torch.device | None, dtype: torch.dtype
) -> PackingConfig:
    """Choose how a model attends along trees, and how long rows are for it.

    Args:
        packing: how branches are packed otherwise.
        lvlm: the model.
        device: where it computes; None for a recent GPU that is not here.
        dtype: what it computes in.
    """
    config = lvlm.config.get_text_config()
    kernel = choose_kernel(config, device, dtype) if packing.share_prefixes else "mask"
    # The work of a token is about six times the model's width in the layers' matrices, plus the length of its row in
    # attention. Rows of twice the width keep attention, of which a dense mask hides what is computed, a small part.
    max_row_tokens, multiple = 2 * config.hidden_size, 1
    if kernel in ("paths", "blocks"):
        # What is masked is not computed, so one row holds all trees, without padding.
        max_row_tokens = UNBOUNDED_ROW
    elif kernel == "flex":
        # Nor is it here, and FlexAttention is compiled for each shape: one row for all trees, of few lengths.
        max_row_tokens, multiple = UNBOUNDED_ROW, FLEX_MULTIPLE
    elif config._attn_implementation == "flex_attention":
        multiple = FLEX_MULTIPLE  # transformers' own, for models that share no prefixes
    elif dtype in HALF_PRECISION and (device is None or device.type == "cuda"):
        # Under a mask, PyTorch's SDPA may take cuDNN's kernel, which makes a plan for each shape, and whose gradients
        # can be NaN where the columns are 64 more than a multiple of 128 (pytorch/pytorch#196678).
        multiple = CUDNN_MULTIPLE
    return replace(packing, kernel=kernel, max_row_tokens=max_row_tokens, pad_to_multiple_of=multiple)


@torch.no_grad()
def supports_tree_attention(lvlm: PreTrainedModel, chat_processor: ChatProcessor, packing: PackingConfig) -> bool:
    """Test on a small image whether a model encodes a tree of branches as it encodes each branch separately."""
    images = chat_processor.process_images([Image.new("RGB", (64, 64), "red")])
    content = Content.of([Image.new("RGB", (64, 64)), "one"])
    question = dialogue_messages(Dialogue((Turn("user", content),)), chat_processor.prompts)
    branches = [
        chat_processor.encode_prompt(question, images),
        chat_processor.encode_embedding(embedding_messages(content, chat_processor.prompts), images),
    ]
    in_one_row = replace(packing, max_row_tokens=UNBOUNDED_ROW)  # in two rows, nothing would be shared
    one_per_row = replace(packing, share_prefixes=False)
    try:
        shared, _ = forward_packed(lvlm, pack([branches], [[]], in_one_row))
    except (RuntimeError, ValueError, TypeError, IndexError):  # what models raise that do not take the mask
        return False
    separate, _ = forward_packed(lvlm, pack([branches], [[]], one_per_row))
    tolerance = 1e-3 if lvlm.dtype == torch.float32 else 5e-2
    return bool((shared - separate).norm() <= tolerance * separate.norm())


def to_device(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Move inputs to a device and cast those of floating point to the model's dtype."""
    moved = {}
    for name, tensor in inputs.items():
        target_dtype = dtype if tensor.is_floating_point() else None
        moved[name] = tensor.to(device, target_dtype, non_blocking=True)
    return moved
