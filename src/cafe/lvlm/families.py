"""What differs between LVLM families, in one table: the names of their parts, and whether their branches may share."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from cafe.errors import CafeError
from cafe.packing import Branch, PositionIdsFn, default_position_ids

PartName = Literal["vision_tower", "projector", "language_model"]


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        vision_tower, projector: pieces of parameter names; what matches neither is the language model.
        supports_tree_mask: whether branches may share a prefix under a tree mask; None where only a trial tells.
    """

    vision_tower: tuple[str, ...]
    projector: tuple[str, ...]
    supports_tree_mask: bool | None = None


_LLAVA = Family(("vision_tower.",), ("multi_modal_projector.", "image_newline"), supports_tree_mask=True)
_QWEN = Family(("visual.",), ("visual.merger.", "visual.deepstack_merger_list."), supports_tree_mask=True)
_IDEFICS = Family(("vision_model.",), ("connector.",), supports_tree_mask=True)
_GEMMA = Family(  # image tokens see each other both ways, PaliGemma's all of the prompt
    ("vision_tower.",), ("multi_modal_projector.", "embed_vision."), supports_tree_mask=False
)

FAMILIES = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "llava_onevision": _LLAVA,
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": _LLAVA,
    "gemma3": _GEMMA,
    "gemma4": _GEMMA,
    "paligemma": _GEMMA,
}

MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")  # attention implementations; FlashAttention takes none

_UNKNOWN = Family(
    vision_tower=("vision_tower.", "vision_model.", "visual."),
    projector=("projector.", "connector.", "merger.", "image_newline"),
)


def model_part(parameter: str, model_type: str) -> PartName:
    """The part that a parameter belongs to, by its name and the family's."""
    family = FAMILIES.get(model_type, _UNKNOWN)
    if any(piece in parameter for piece in family.projector):
        return "projector"
    return "vision_tower" if any(piece in parameter for piece in family.vision_tower) else "language_model"


def find_vision_tower(lvlm: PreTrainedModel) -> nn.Module | None:
    """A model's vision tower, found by its family's name for it."""
    pieces = FAMILIES.get(lvlm.config.model_type, _UNKNOWN).vision_tower
    found = (module for name, module in lvlm.named_modules() if f"{name}.".endswith(pieces))
    return next(found, None)


def quantization_kwargs(path: str, device: torch.device, dtype: torch.dtype | str) -> dict[str, Any]:
    """What `from_pretrained` takes to hold the language model's matrices in 4 bits (NF4, QLoRA, arXiv 2305.14314).

    The vision tower, the projector and the head stay as they are. What is computed with them is in `dtype` if that is
    float16, else in bfloat16.

    Raises:
        CafeError: bitsandbytes is not installed.
    """
    if not find_spec("bitsandbytes"):
        raise CafeError("4-bit weights need the package bitsandbytes: pip install 'cafe-lvlm[4bit]'.")
    family = FAMILIES.get(AutoConfig.from_pretrained(path).model_type, _UNKNOWN)
    kept = [*family.vision_tower, *family.projector, "lm_head"]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if dtype == torch.float16 else torch.bfloat16,
        llm_int8_skip_modules=[f".*{piece.rstrip('.')}" for piece in kept],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def attention_kwargs(config: PreTrainedConfig, attention: str) -> str | dict[str, str]:
    """What `from_pretrained` takes to read with an attention implementation.

    FlexAttention, compiled for each shape, is the language model's alone: it is for trees, and pictures come in numbers
    of their own. SDPA cannot cap scores, as Gemma 2 and so PaliGemma 2 do: such a language model takes eager for it.
    """
    if attention == "sdpa" and getattr(config.get_text_config(), "attn_logit_softcapping", None):
        return {"text_config": "eager"}
    return {"text_config": attention} if attention == "flex_attention" else attention


def supports_prefix_sharing(lvlm: PreTrainedModel) -> bool | None:
    """Whether a model's branches may share a prefix, as far as its configuration tells; None if a trial must."""
    text = lvlm.config.get_text_config()
    if text._attn_implementation not in MASKED_ATTENTION:
        return False
    layers = getattr(text, "layer_types", None)
    if set(layers) != {"full_attention"} if layers else getattr(text, "sliding_window", None):
        return False  # a sliding window, linear attention or a convolution sees neighbours in the row, not ancestors
    return FAMILIES.get(lvlm.config.model_type, _UNKNOWN).supports_tree_mask


def position_ids_fn(lvlm: PreTrainedModel) -> PositionIdsFn:
    """The position ids of a branch, by the model's own function where its family has several axes (M-RoPE)."""
    if not hasattr(lvlm.base_model, "get_rope_index"):
        return default_position_ids

    def positions(branch: Branch) -> Int64[Tensor, "3 tokens"]:
        grids = {name: grid for name, grid in branch.image_inputs.items() if name.endswith("_grid_thw")}
        types = branch.image_mask.long()[None].int()
        found: Tensor = lvlm.base_model.get_rope_index(branch.input_ids[None], mm_token_type_ids=types, **grids)[0]
        return found[:, 0]

    return positions
