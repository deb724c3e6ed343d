"""A pack through a model: its last hidden states where they are read, and how branches are laid out for a model."""

import logging
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from cafe.attention.last_layer import restrict_last_layer
from cafe.attention.tree import attention_mask
from cafe.content import Content, Dialogue, Turn
from cafe.errors import CafeError
from cafe.lvlm.families import MASKED_ATTENTION, logit_softcap, position_ids_fn, supports_prefix_sharing
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import dialogue_messages, embedding_messages
from cafe.packing import PackedBatch, PackingConfig, pack

logger = logging.getLogger(__name__)

UNBOUNDED_ROW = 2**40  # columns that hold any batch
FLEX_MULTIPLE = 512  # tokens: four of FlexAttention's blocks


def forward_packed(
    lvlm: PreTrainedModel, pack: PackedBatch
) -> tuple[Float[Tensor, "readouts dim"], Float[Tensor, "supervised dim"]]:
    """One pass: the last hidden state (after the final norm) of each readout, and before each supervised token."""
    device = lvlm.device
    inputs: dict[str, Any] = {**to_device(pack.inputs, device, lvlm.dtype)}
    if pack.pixel_decoder:
        inputs["pixel_values"] = pack.pixel_decoder.normalize(inputs["pixel_values"]).to(lvlm.dtype)
    if pack.subtree_end is not None:
        end, half = pack.subtree_end.to(device, non_blocking=True), torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if half else lvlm.dtype
        inputs["attention_mask"] = attention_mask(end, lvlm.config.get_text_config(), dtype)
    with restrict_last_layer(lvlm, pack.embedding_index, pack.logits_index):
        hidden = lvlm.base_model(**inputs, use_cache=False).last_hidden_state
    readouts, predictors = (each.to(device, non_blocking=True) for each in (pack.embedding_index, pack.logits_index))
    return hidden[readouts[:, 0], readouts[:, 1]], hidden[predictors[:, 0], predictors[:, 1]]


def compute_logits(lvlm: PreTrainedModel, hidden: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens vocabulary"]:
    """The model's logits, in float32, from its last hidden states."""
    logits: Tensor = lvlm.get_output_embeddings()(hidden).float()
    softcap = logit_softcap(lvlm)
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def infer_packing(lvlm: PreTrainedModel, chat_processor: ChatProcessor) -> PackingConfig:
    """How a model's branches are laid out: as trees where it can read them, which an unknown family has to show.

    Rows are at most twice as long as the model is wide: then what is computed and masked in attention is little beside
    the rest, six times the width for each token.
    FlexAttention computes nothing that is masked, and is compiled for each shape: all goes in one row, of few lengths.

    Raises:
        CafeError: a prefix-LM would read prompts as it does answers, for want of a mask.
    """
    text = lvlm.config.get_text_config()
    attention, family = text._attn_implementation, lvlm.config.model_type
    if chat_processor.prefix_lm and attention not in MASKED_ATTENTION:
        raise CafeError(f"model.attention: a {family} model reads prompts both ways, and {attention} takes no mask.")
    flex = attention == "flex_attention"
    packing = PackingConfig(
        share_prefixes=supports_prefix_sharing(lvlm) is not False,
        max_row_tokens=UNBOUNDED_ROW if flex else 2 * text.hidden_size,
        pad_to_multiple_of=FLEX_MULTIPLE if flex else 1,
        pad_token_id=chat_processor.tokenizer.pad_token_id or 0,
        position_ids_fn=position_ids_fn(lvlm),
        token_type_fns=chat_processor.token_type_fns,
    )
    if supports_prefix_sharing(lvlm) is None and not supports_tree_attention(lvlm, chat_processor, packing):
        packing = replace(packing, share_prefixes=False)
    if not packing.share_prefixes:
        logger.warning("The branches of a %s model are read one by one: nothing is shared.", family)
    return packing


@torch.no_grad()
def supports_tree_attention(lvlm: PreTrainedModel, chat_processor: ChatProcessor, packing: PackingConfig) -> bool:
    """Whether a model reads branches laid out as a tree as it reads them one by one: tried on a small picture."""
    pictures = chat_processor.process_images([Image.new("RGB", (64, 64), "red")])
    content = Content.of([Image.new("RGB", (64, 64)), "one"])
    branches = [
        chat_processor.encode_prompt(
            dialogue_messages(Dialogue((Turn("user", content),)), chat_processor.prompts), pictures
        ),
        chat_processor.encode_embedding(embedding_messages(content, chat_processor.prompts), pictures),
    ]
    try:
        shared, _ = forward_packed(
            lvlm, pack([branches], [[]], replace(packing, max_row_tokens=UNBOUNDED_ROW))
        )  # two rows would try nothing
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    alone, _ = forward_packed(lvlm, pack([branches], [[]], replace(packing, share_prefixes=False)))
    tolerance = 1e-3 if lvlm.dtype == torch.float32 else 5e-2
    return bool((shared - alone).norm() <= tolerance * alone.norm())


def to_device(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs on a device, pictures in the model's precision."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
        for name, tensor in inputs.items()
    }
