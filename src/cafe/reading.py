"""A pack through a model: its last hidden states where they are read, and how branches are laid out for a model."""

import logging
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from PIL import Image
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig, PreTrainedModel

from cafe.content import Content, Dialogue, Turn
from cafe.errors import CafeError
from cafe.families import TAKE_MASKS, may_share, positions_of
from cafe.instructions import dialogue_messages, embedding_messages
from cafe.last_layer import last_layer_at
from cafe.packing import Pack, Packing, pack, tree_block_mask, tree_mask
from cafe.processing import Processing
from cafe.tree_attention import LONG, by_blocks

logger = logging.getLogger(__name__)

ONE_ROW = 2**40  # columns that hold any batch
FLEX_MULTIPLE = 512  # tokens: four of FlexAttention's blocks


def read(lvlm: PreTrainedModel, pack: Pack) -> tuple[Float[Tensor, "readouts dim"], Float[Tensor, "supervised dim"]]:
    """One pass: the last hidden state (after the final norm) of each readout, and before each supervised token."""
    device = lvlm.device
    inputs: dict[str, Any] = {**to_device(pack.inputs, device, lvlm.dtype)}
    if pack.pixels:
        inputs["pixel_values"] = pack.pixels.to_values(inputs["pixel_values"]).to(lvlm.dtype)
    if pack.end is not None:
        end, half = pack.end.to(device, non_blocking=True), torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if half else lvlm.dtype
        inputs["attention_mask"] = attention_mask(end, lvlm.config.get_text_config(), dtype)
    with last_layer_at(lvlm, pack.readouts, pack.predictors):
        hidden = lvlm.base_model(**inputs, use_cache=False).last_hidden_state
    readouts, predictors = (each.to(device, non_blocking=True) for each in (pack.readouts, pack.predictors))
    return hidden[readouts[:, 0], readouts[:, 1]], hidden[predictors[:, 0], predictors[:, 1]]


def logits_of(lvlm: PreTrainedModel, hidden: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens vocabulary"]:
    """The model's logits, in float32, from its last hidden states."""
    logits: Tensor = lvlm.get_output_embeddings()(hidden).float()
    softcap = getattr(lvlm.config.get_text_config(), "final_logit_softcapping", None)  # Gemma's
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def attention_mask(
    end: Int64[Tensor, "rows columns"], config: PreTrainedConfig, dtype: torch.dtype = torch.float32
) -> Tensor | BlockMask:
    """The mask of trees, as the attention implementation takes it."""
    if config._attn_implementation == "flex_attention":
        return tree_block_mask(end)
    if end.device.type == "cpu" and end.shape[1] >= LONG and config._attn_implementation == "sdpa":
        return by_blocks(end)
    # As numbers, and rows of them at multiples of eight: else every layer on a GPU would make such numbers for itself,
    # and keep them for its backward pass.
    seen, columns = tree_mask(end), end.shape[1]
    hidden = torch.finfo(dtype).min if config._attn_implementation == "eager" else float("-inf")
    numbers = torch.zeros(*seen.shape[:3], -(-columns // 8) * 8, dtype=dtype, device=end.device)
    return numbers[..., :columns].masked_fill_(~seen, hidden)


def packing_for(lvlm: PreTrainedModel, processing: Processing) -> Packing:
    """How a model's branches are laid out: as trees where it can read them, which an unknown family has to show.

    Rows are at most twice as long as the model is wide: then what is computed and masked in attention is little beside
    the rest, six times the width for each token.
    FlexAttention computes nothing that is masked, and is compiled for each shape: all goes in one row, of few lengths.

    Raises:
        CafeError: a prefix-LM would read prompts as it does answers, for want of a mask.
    """
    text = lvlm.config.get_text_config()
    attention, family = text._attn_implementation, lvlm.config.model_type
    if processing.prefix_lm and attention not in TAKE_MASKS:
        raise CafeError(f"model.attention: a {family} model reads prompts both ways, and {attention} takes no mask.")
    flex = attention == "flex_attention"
    packing = Packing(
        share=may_share(lvlm) is not False,
        columns=ONE_ROW if flex else 2 * text.hidden_size,
        multiple=FLEX_MULTIPLE if flex else 1,
        pad=processing.tokenizer.pad_token_id or 0,
        positions=positions_of(lvlm),
        token_types=processing.token_types,
    )
    if may_share(lvlm) is None and not reads_trees(lvlm, processing, packing):
        packing = replace(packing, share=False)
    if not packing.share:
        logger.warning("The branches of a %s model are read one by one: nothing is shared.", family)
    return packing


@torch.no_grad()
def reads_trees(lvlm: PreTrainedModel, processing: Processing, packing: Packing) -> bool:
    """Whether a model reads branches laid out as a tree as it reads them one by one: tried on a small picture."""
    pictures = processing.pictures([Image.new("RGB", (64, 64), "red")])
    content = Content.of([Image.new("RGB", (64, 64)), "one"])
    branches = [
        processing.encode_prompt(dialogue_messages(Dialogue((Turn("user", content),)), processing.prompts), pictures),
        processing.encode_embedding(embedding_messages(content, processing.prompts), pictures),
    ]
    try:
        shared, _ = read(lvlm, pack([branches], [[]], replace(packing, columns=ONE_ROW)))  # two rows would try nothing
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    alone, _ = read(lvlm, pack([branches], [[]], replace(packing, share=False)))
    tolerance = 1e-3 if lvlm.dtype == torch.float32 else 5e-2
    return bool((shared - alone).norm() <= tolerance * alone.norm())


def to_device(inputs: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs on a device, pictures in the model's precision."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
        for name, tensor in inputs.items()
    }
