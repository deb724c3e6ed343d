"""The one table of LVLM families: all that is known of a family stands in its entry.

Adding a family means one entry in `FAMILIES` and one tiny model in `tests/families.py`. A family outside the table
works as well: its parts are found by the usual names, and the rest is detected or tried when the model is loaded.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from cafe.attention.registration import CAFE_TREE, CAFE_TREE_FLEX
from cafe.packing import Branch, PositionIdsFn, default_position_ids

PartName = Literal["vision_tower", "projector", "language_model"]
ImageSizing = Literal["fixed", "image_grids", "area", "longest_edge", "max_patches", "soft_tokens"]
FeatureSource = Literal["hidden_states", "hidden_states_or_output"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Describe a family of LVLMs.

    Attributes:
        vision_tower, projector: fragments of parameter names; a name that matches neither is the language model's.
        supports_tree_mask: whether branches can share a prefix under a tree mask; None if that has to be tried.
        image_sizing: what limits the size of an image, see `cafe.lvlm.image_size`; None to detect it from the image
            processor.
        image_area: smallest and largest area of an image, in pixels, of the published image processor; None where an
            area is no limit. `cafe plan` uses it for models that are not on disk.
        feature_source: where the projector takes the tower's features from. "hidden_states" are the layers that
            `config.vision_feature_layer` names; with "hidden_states_or_output", layer -1 stands for the output behind
            the final norm instead. None if unknown.
        prefix_lm_template: the chat template of a prefix-LM, whose processor has none; empty for other families.
    """

    vision_tower: tuple[str, ...]
    projector: tuple[str, ...]
    supports_tree_mask: bool | None = None
    image_sizing: ImageSizing | None = None
    image_area: tuple[int, int] | None = None
    feature_source: FeatureSource | None = None
    prefix_lm_template: str = ""


# A prefix-LM attends to its whole prompt in both directions, image tokens included, and to an answer causally. The
# template renders what the processor makes of a prompt and its `suffix`: the images of a turn before its text, wherever
# they stood, and no system prompt. Everything after the first answer is read as part of an answer.
_PALIGEMMA_TEMPLATE = (
    "{% for message in messages if message['role'] != 'system' %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{{ bos_token if loop.first else '' }}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)

_LLAVA = Family(
    vision_tower=("vision_tower.",),
    projector=("multi_modal_projector.", "image_newline"),
    supports_tree_mask=True,
    image_sizing="fixed",
    feature_source="hidden_states",
)
_QWEN = Family(
    vision_tower=("visual.",),
    projector=("visual.merger.", "visual.deepstack_merger_list."),
    supports_tree_mask=True,
    image_sizing="area",
    image_area=(56 * 56, 12_845_056),
)
_IDEFICS = Family(
    vision_tower=("vision_model.",),
    projector=("connector.",),
    supports_tree_mask=True,
    image_sizing="longest_edge",
)
# Image tokens see each other in both directions, and PaliGemma's see the whole prompt: no tree mask says that.
_GEMMA = Family(
    vision_tower=("vision_tower.",),
    projector=("multi_modal_projector.", "embed_vision."),
    supports_tree_mask=False,
    image_sizing="fixed",
)

FAMILIES: dict[str, Family] = {
    "llava": _LLAVA,
    "llava_next": replace(_LLAVA, image_sizing="image_grids"),
    "llava_onevision": replace(_LLAVA, image_sizing="image_grids"),
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": replace(_QWEN, image_area=(2**16, 2**24)),
    "idefics3": _IDEFICS,
    "smolvlm": _IDEFICS,
    "internvl": replace(_LLAVA, image_sizing="max_patches", feature_source="hidden_states_or_output"),
    "gemma3": _GEMMA,
    "gemma4": replace(_GEMMA, image_sizing="soft_tokens"),
    "paligemma": replace(_GEMMA, prefix_lm_template=_PALIGEMMA_TEMPLATE),
}

_UNKNOWN = Family(
    vision_tower=("vision_tower.", "vision_model.", "visual."),
    projector=("projector.", "connector.", "merger.", "image_newline"),
)

# By the tower's own model type: these read images of different sizes laid end to end in one row of patches.
PACKED_TOWERS = ("pixtral",)
# Attention implementations that take a mask; FlashAttention takes none.
MASKED_ATTENTION = ("sdpa", "eager", "flex_attention", CAFE_TREE, CAFE_TREE_FLEX)


def family_of(model_type: str) -> Family:
    """Look up a family by the model type of its configuration."""
    return FAMILIES.get(model_type, _UNKNOWN)


def family_of_processor(processor: ProcessorMixin) -> Family:
    """Look up a family by its processor, whose class transformers maps to model types."""
    # By the class's name: without its video processor, a processor is of another class with the same name.
    name = type(processor).__name__
    for model_type, family in FAMILIES.items():
        if PROCESSOR_MAPPING_NAMES.get(model_type) == name:
            return family
    return _UNKNOWN


def model_part(parameter: str, model_type: str) -> PartName:
    """Return the part of the model that a parameter belongs to.

    Args:
        parameter: its name; of a module, the name with a dot behind it.
        model_type: of the model's configuration.
    """
    family = family_of(model_type)
    # The projector comes first: in some families it is a module of the tower.
    if any(fragment in parameter for fragment in family.projector):
        return "projector"
    if any(fragment in parameter for fragment in family.vision_tower):
        return "vision_tower"
    return "language_model"


def find_vision_tower(lvlm: PreTrainedModel) -> nn.Module | None:
    """Find a model's vision tower by its family's name for it; None if it has none of that name."""
    # Modules come from the outside in, so the first match is the whole tower.
    names = family_of(lvlm.config.model_type).vision_tower
    for name, module in lvlm.named_modules():
        if f"{name}.".endswith(names):
            return module
    return None


def contains_projector(tower: nn.Module) -> bool:
    """Tell whether a vision tower holds the projector, which then reads the last hidden state within it."""
    return hasattr(tower, "merger")


def packed_patch_size(tower: nn.Module) -> int | None:
    """Return the patch size of a tower that lays images end to end in one row; None for other towers."""
    config: Any = getattr(tower, "config", None)
    if getattr(config, "model_type", "") not in PACKED_TOWERS:
        return None
    patch_size: int = config.patch_size
    return patch_size


def feature_layers(config: PreTrainedConfig) -> list[int] | None:
    """Return which of the tower's hidden states a model reads; an empty list if it reads the output alone.

    None for families of which this is not known.
    """
    source = family_of(config.model_type).feature_source
    if source is None:
        return None
    # The configuration names one layer or several, counted from the end if negative.
    layers = config.vision_feature_layer
    if source == "hidden_states_or_output" and layers == -1:
        return []
    return [layers] if isinstance(layers, int) else list(layers)


def attention_kwargs(config: PreTrainedConfig, attention: str) -> str | dict[str, str]:
    """Return `from_pretrained`'s `attn_implementation` for an attention implementation.

    FlexAttention is used in the language model alone: it is compiled for each shape, of which the images would bring
    many. Where branches share prefixes, it computes their trees, which `use_tree_attention` sees to. SDPA cannot cap
    attention scores, as Gemma 2 does and so PaliGemma 2, and neither can attention over trees: such a language model
    takes eager attention instead, or transformers' own FlexAttention.
    """
    caps_scores = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if attention == "flex_attention":
        computes_trees = not caps_scores and family_of(config.model_type).supports_tree_mask is not False
        return "sdpa" if computes_trees else {"text_config": attention}
    if attention == "sdpa" and caps_scores:
        return {"text_config": "eager"}
    return attention


def supports_prefix_sharing(lvlm: PreTrainedModel) -> bool | None:
    """Tell from the configuration whether branches can share a prefix; None if that has to be tried."""
    text = lvlm.config.get_text_config()
    if text._attn_implementation not in MASKED_ATTENTION:
        return False
    # Sliding windows, linear attention and convolutions see a token's neighbors in the row, not its ancestors.
    if not _has_only_full_attention(text):
        return False
    return family_of(lvlm.config.model_type).supports_tree_mask


def _has_only_full_attention(text_config: PreTrainedConfig) -> bool:
    """Tell whether every layer of a language model attends to all tokens before each."""
    # Where the kinds of the layers are listed, `sliding_window` may be set for none of them.
    layer_types = getattr(text_config, "layer_types", None)
    if layer_types:
        return set(layer_types) == {"full_attention"}
    return not getattr(text_config, "sliding_window", None)


def position_ids_fn(lvlm: PreTrainedModel) -> PositionIdsFn:
    """Return the function that numbers the tokens of a branch: the model's own under M-RoPE, which has several axes."""
    if not hasattr(lvlm.base_model, "get_rope_index"):
        return default_position_ids

    return partial(_mrope_position_ids, lvlm.base_model)


def _mrope_position_ids(base_model: PreTrainedModel, branch: Branch) -> Int64[Tensor, "3 tokens"]:
    """Number the tokens of a branch by the time, row and column of its images' patches."""
    # The model takes a batch, here of one row, and returns (axes, rows, tokens) with the rows' offsets.
    grids = {name: grid for name, grid in branch.image_inputs.items() if name.endswith("_grid_thw")}
    token_types = branch.image_mask.long()[None].int()
    position_ids: Tensor = base_model.get_rope_index(branch.input_ids[None], mm_token_type_ids=token_types, **grids)[0]
    return position_ids[:, 0]


def logit_softcap(lvlm: PreTrainedModel) -> float | None:
    """Return the bound that some language models (Gemma 2) put on their logits: softcap * tanh(logits / softcap)."""
    softcap: float | None = getattr(lvlm.config.get_text_config(), "final_logit_softcapping", None)
    return softcap
