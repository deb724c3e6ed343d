"""Weights in 4 bits, by bitsandbytes."""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from cafe.errors import MissingPackageError
from cafe.lvlm.families import family_of


def quantization_kwargs(path: str, device: torch.device, dtype: torch.dtype | str) -> dict[str, Any]:
    """Return `from_pretrained`'s arguments to hold the language model's matrices in 4 bits (NF4, arXiv 2305.14314).

    The vision tower, the projector and the head keep their precision. Products are computed in `dtype` if that is
    float16, and otherwise in bfloat16.

    Raises:
        MissingPackageError: bitsandbytes is not installed.
    """
    if not find_spec("bitsandbytes"):
        raise MissingPackageError("4-bit weights need the package bitsandbytes: pip install 'cafe-lvlm[4bit]'.")
    # bitsandbytes takes regular expressions of module names, where a fragment's dot ends a name.
    family = family_of(AutoConfig.from_pretrained(path, trust_remote_code=False).model_type)
    unquantized = [*family.vision_tower, *family.projector, "lm_head"]
    # As QLoRA: normal-float values in blocks, whose scales are quantized too.
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if dtype == torch.float16 else torch.bfloat16,
        llm_int8_skip_modules=[f".*{fragment.rstrip('.')}" for fragment in unquantized],
    )
    return {"quantization_config": config, "device_map": {"": device}}
