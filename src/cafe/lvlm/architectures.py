"""Models without weights: the published sizes of the Hub models that recipes name, and models on the meta device.

The sizes are those of each repository's `config.json`, so that `cafe plan` downloads nothing. A test compares their
parameters with the numbers that the Hub states.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from cafe.errors import CheckpointError


def _onevision(
    width: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    """Return the sizes of LLaVA-OneVision: a SigLIP so400m tower of 384 pixels in patches of 14, and a Qwen2."""
    return {
        "model_type": "llava_onevision",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        "text_config": {"model_type": "qwen2", **_text(width, layers, heads, kv_heads, inner, vocabulary, tied)},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": tied,
        "image_grid_pinpoints": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
    }


def _qwen2_5(
    width: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    """Return the sizes of Qwen2.5-VL, whose vision towers differ in nothing but the width of their output."""
    text = _text(width, layers, heads, kv_heads, inner, vocabulary, tied)
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": width}
    return {
        "model_type": "qwen2_5_vl",
        "vision_config": {**vision, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]},
        "text_config": text,
        "tie_word_embeddings": tied,
    }


def _qwen3(
    width: int, layers: int, heads: int, inner: int, tied: bool, vision: tuple[int, int, int, list[int]]
) -> dict[str, Any]:
    """Return the sizes of Qwen3-VL; `vision` is one of the two towers below."""
    text = _text(width, layers, heads, 8, inner, 151936, tied)
    depth, vision_width, vision_inner, deepstack = vision
    return {
        "model_type": "qwen3_vl",
        "vision_config": {
            "depth": depth,
            "hidden_size": vision_width,
            "intermediate_size": vision_inner,
            "num_heads": 16,
            "out_hidden_size": width,
            "deepstack_visual_indexes": deepstack,
        },
        "text_config": {**text, "head_dim": 128},  # in the 4B model, more than its width divided by its heads
        "tie_word_embeddings": tied,
    }


def _text(
    width: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    """Return the fields of a language model's configuration."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


# Of a tower: depth, width, feed-forward width, and the layers whose features go into the language model (DeepStack).
# Of a language model: width, layers, heads, key-value heads (Qwen3 has eight), feed-forward width, vocabulary (of
# Qwen3 the same in all), and whether the head is tied to the embeddings.
_SMALL_TOWER = (24, 1024, 4096, [5, 11, 17])
_LARGE_TOWER = (27, 1152, 4304, [8, 16, 24])
KNOWN_CONFIGS: dict[str, dict[str, Any]] = {
    "llava-hf/llava-onevision-qwen2-0.5b-si-hf": _onevision(896, 24, 14, 2, 4864, 152000, True),
    "llava-hf/llava-onevision-qwen2-7b-si-hf": _onevision(3584, 28, 28, 4, 18944, 152128, False),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5(2048, 36, 16, 2, 11008, 151936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5(3584, 28, 28, 4, 18944, 152064, False),
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3(2048, 28, 16, 6144, True, _SMALL_TOWER),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3(2560, 36, 32, 9728, True, _SMALL_TOWER),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3(4096, 36, 32, 12288, False, _LARGE_TOWER),
}


# Where the configurations of language models keep their number of experts, and those of vision towers their sizes.
_EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOWER_FIELDS = (
    ("embed_dim", "hidden_size"),
    ("depth", "num_hidden_layers"),
    ("num_heads", "num_attention_heads"),
    ("intermediate_size", "mlp_ratio"),
    ("patch_size",),
)


def load_config(base: str) -> PreTrainedConfig:
    """Load a base model's configuration: of a known Hub model from the table, of a directory from its files.

    Raises:
        CheckpointError: it is neither.
    """
    if base in KNOWN_CONFIGS:
        fields = dict(KNOWN_CONFIGS[base])
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    # Nothing is downloaded: a Hub model outside the table is not known, even where it could be fetched.
    try:
        return AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    except Exception:  # the file may hold anything, and transformers raises whatever it runs into
        advice = f"give a local directory, or one of {', '.join(KNOWN_CONFIGS)}."
        if Path(base).is_dir():
            advice = "it has no config.json that transformers reads; for an adapter, plan with its base."
        raise CheckpointError(f"The sizes of {base} are not known: {advice}") from None


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model without weights: its parameters have names and shapes, on the meta device."""
    # The constructor allocates its parameters on the default device.
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=False)


def is_mixture_of_experts(text_config: PreTrainedConfig) -> bool:
    """Tell whether a language model has experts, of which each token passes a few."""
    return any(getattr(text_config, field, None) for field in _EXPERT_FIELDS)


def has_known_tower_sizes(vision_config: Any) -> bool:
    """Tell whether a vision tower's configuration has all the usual sizes; timm's towers have none."""
    return all(any(hasattr(vision_config, name) for name in names) for names in _TOWER_FIELDS)
