"""Tiny models of many families, with random weights: a function for each, in the family's own classes and templates.

Some versions of transformers lack a family, or have it only with torchvision: then its function raises ImportError.
"""

from collections.abc import Callable
from inspect import getsource
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from cafe.attention.registration import use_tree_attention
from cafe.lvlm.families import attention_kwargs
from cafe.lvlm.forward import infer_packing
from cafe.lvlm.loading import without_video
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import CHATML, Prompts
from cafe.model import Cafe

WIDTH = 32

# What the text models have in common; a head is 16 wide, of which M-RoPE takes three parts.
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
# A vision tower of the ViT kind: 4 x 4 patches of 8 pixels.
VIT = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
# One of the Qwen kind: any size, patches of 4 pixels, four merged into one token.
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": WIDTH, "intermediate_size": 64}
QWEN_SIZE = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}  # pixels in all

LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""Images come first; a space follows the generation prompt; nothing ends the assistant's turn."""

MISTRAL_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + message['content'][0]['text'] + '\\n<</SYS>>\\n\\n' }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% else %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}{% endif %}{% endfor %}"
)

IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set prefix = messages[0]['content'][0]['text'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set prefix = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{{ 'OPEN' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ prefix if loop.first else '' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{{ 'CLOSE\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'OPENmodel\n' }}{% endif %}"
)

THINKING_TEMPLATE = (
    "{% set ns = namespace(last=-1) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""The prompt opens the assistant's thoughts, and only its last answer shows that it had any."""


def chatml(image: str) -> str:
    """The template of Qwen's kind."""
    return CHATML.replace("{{ '<image>' }}{% if not loop.last %}{{ '\\n' }}{% endif %}", f"{{{{ '{image}' }}}}")


def tokenizer(special: list[str], pad: str, eos: str, bos: str | None = None, **named: str) -> PreTrainedTokenizerFast:
    """Bytes and special tokens, so that a text has the same tokens however it is cut.

    Named tokens become attributes of the tokenizer, as in `image_token` and `image_token_id`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    every = list(dict.fromkeys([pad, eos, *([bos] if bos else []), *special, *named.values()]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=every, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, eos_token=eos, bos_token=bos, extra_special_tokens=named or special
    )


def build(model_type: str, processor: ProcessorMixin, text: dict[str, Any], vision: dict[str, Any], **rest) -> Cafe:
    """The model of a configuration, with random weights large enough that every part is felt."""
    tokens = processor.tokenizer
    text = {
        **TEXT, "vocab_size": len(tokens), "pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id,
        **text,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **rest)
    torch.manual_seed(0)
    lvlm = AutoModelForImageTextToText.from_config(config, attn_implementation=attention_kwargs(config, "sdpa")).eval()
    use_tree_attention(lvlm)
    for parameter in lvlm.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=WIDTH**-0.5)
    lvlm.generation_config.pad_token_id = tokens.pad_token_id
    lvlm.generation_config.eos_token_id = tokens.eos_token_id
    chat_processor = ChatProcessor(processor, Prompts())
    return Cafe(lvlm, chat_processor, infer_packing(lvlm, chat_processor))


def ids(processor: ProcessorMixin, **tokens: str) -> dict[str, int]:
    """The numbers of some tokens, for a configuration."""
    return {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}


def llava() -> Cafe:
    processor = hf.LlavaProcessor(
        hf.LlavaImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer(["<image>"], pad="<pad>", eos="</s>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    vision = {"model_type": "clip_vision_model", **VIT}
    return build("llava", processor, {"model_type": "llama"}, vision, **ids(processor, image_token_index="<image>"))


def llava_next() -> Cafe:
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    processor = hf.LlavaNextProcessor(
        hf.LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
        ),
        tokenizer(["<image>"], pad="<pad>", eos="</s>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL_TEMPLATE,
    )
    text = {"model_type": "mistral", "sliding_window": None}
    vision = {"model_type": "clip_vision_model", **VIT}
    tokens = ids(processor, image_token_index="<image>")
    return build("llava_next", processor, text, vision, image_grid_pinpoints=pinpoints, **tokens)


def llava_onevision() -> Cafe:
    processor = without_video(hf.LlavaOnevisionProcessor)(
        hf.LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=[[64, 64]]),
        tokenizer(["<|im_start|>", "<image>", "<video>"], pad="<|endoftext|>", eos="<|im_end|>"),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML,
    )
    text = {"model_type": "qwen2"}
    vision = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
    return build(
        "llava_onevision",
        processor,
        text,
        vision,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **ids(processor, image_token_index="<image>", video_token_index="<video>"),
    )


QWEN_TOKENS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


def qwen(family: str, processor_class: type, text: dict[str, Any], vision: dict[str, Any], template: str = "") -> Cafe:
    """What the Qwen-VL families have in common."""
    processor = without_video(processor_class)(
        hf.Qwen2VLImageProcessorPil(size=QWEN_SIZE, patch_size=4),
        tokenizer(["<|im_start|>", *QWEN_TOKENS.values()], pad="<|endoftext|>", eos="<|im_end|>"),
        chat_template=template or chatml("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return build(family, processor, text, {**QWEN_VISION, **vision}, **ids(processor, **QWEN_TOKENS))


def qwen2_vl() -> Cafe:
    return qwen("qwen2_vl", hf.Qwen2VLProcessor, MROPE, {"embed_dim": WIDTH})


def qwen2_5_vl() -> Cafe:
    vision = {"out_hidden_size": WIDTH, "fullatt_block_indexes": [1], "window_size": 16}
    return qwen("qwen2_5_vl", hf.Qwen2_5_VLProcessor, MROPE, vision)


def qwen3_vl() -> Cafe:
    vision = {"out_hidden_size": WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return qwen("qwen3_vl", hf.Qwen3VLProcessor, MROPE, vision)


def qwen3_5() -> Cafe:
    text = {
        "rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0},
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    vision = {"out_hidden_size": WIDTH, "num_position_embeddings": 16}
    return qwen("qwen3_5", hf.Qwen3VLProcessor, text, vision, THINKING_TEMPLATE)


IDEFICS_TOKENS = [
    "<|im_start|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
]
IDEFICS_SIZES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def smolvlm() -> Cafe:
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = str  # a package that only videos need, yet the processor asks for it
    processor = without_video(hf.SmolVLMProcessor)(
        hf.SmolVLMImageProcessorPil(**IDEFICS_SIZES),
        tokenizer(IDEFICS_TOKENS, pad="<|endoftext|>", eos="<end_of_utterance>"),
        None,
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    return build("smolvlm", processor, {"model_type": "llama"}, VIT, **ids(processor, image_token_id="<image>"))


def idefics3() -> Cafe:
    processor = hf.Idefics3Processor(
        hf.Idefics3ImageProcessorPil(**IDEFICS_SIZES),
        tokenizer(IDEFICS_TOKENS, pad="<|endoftext|>", eos="<end_of_utterance>"),
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    return build("idefics3", processor, {"model_type": "llama"}, VIT, **ids(processor, image_token_id="<image>"))


def internvl() -> Cafe:
    processor = without_video(hf.InternVLProcessor)(
        hf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4),
        tokenizer(
            ["<|im_start|>"],
            pad="<|endoftext|>",
            eos="<|im_end|>",
            start_token="<|im_start|>",
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\\n"),
    )
    vision = {**VIT, "image_size": [32, 32], "patch_size": [8, 8]}
    tokens = ids(processor, image_token_id="<IMG_CONTEXT>")
    return build("internvl", processor, {"model_type": "qwen2"}, vision, image_seq_length=4, **tokens)


def gemma_template(start: str, end: str, image: str) -> str:
    """Gemma's template with the words of one generation."""
    return GEMMA_TEMPLATE.replace("OPEN", start).replace("CLOSE", end).replace("IMAGE", image)


def gemma3() -> Cafe:
    processor = hf.Gemma3Processor(
        hf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32}),
        tokenizer(
            [],
            pad="<pad>",
            eos="<eos>",
            bos="<bos>",
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
            image_token="<image_soft_token>",
            start_token="<start_of_turn>",
            end_token="<end_of_turn>",
        ),
        image_seq_length=4,
        chat_template=gemma_template("<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
    )
    text = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24, "query_pre_attn_scalar": 16}
    vision = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
    tokens = ids(
        processor,
        boi_token_index="<start_of_image>",
        eoi_token_index="<end_of_image>",
        image_token_index="<image_soft_token>",
    )
    return build("gemma3", processor, text, vision, mm_tokens_per_image=4, **tokens)


def gemma4() -> Cafe:
    processor = without_video(hf.Gemma4Processor)(
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessorPil(patch_size=4, pooling_kernel_size=2, max_soft_tokens=70),
        tokenizer(
            [],
            pad="<pad>",
            eos="<eos>",
            bos="<bos>",
            boi_token="<|image>",
            eoi_token="<image|>",
            image_token="<|image|>",
            boa_token="<|audio>",
            eoa_token="<audio|>",
            audio_token="<|audio|>",
            start_token="<|turn>",
            end_token="<turn|>",
        ),
        video_processor=None,
        chat_template=gemma_template("<|turn>", "<turn|>", "<|image|>"),
    )
    size = len(processor.tokenizer)
    text = {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 24,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": size,
        "use_bidirectional_attention": "vision",
    }
    vision = {
        **VIT, "patch_size": 4, "pooling_kernel_size": 2, "num_key_value_heads": 2, "head_dim": 16,
        "position_embedding_size": 64, "use_clipped_linears": True,
    }  # fmt: skip
    tokens = ids(
        processor,
        boi_token_id="<|image>",
        eoi_token_id="<image|>",
        image_token_id="<|image|>",
        video_token_id="<|video|>",
        boa_token_id="<|audio>",
        eoa_token_index="<audio|>",
        audio_token_id="<|audio|>",
    )
    return build("gemma4", processor, text, vision, audio_config=None, **tokens)


def aya_vision() -> Cafe:
    """A family outside the table. In the text an image is another token than in the model's input."""
    tiles = ["TILE_GLOBAL", *(f"TILE_{number}" for number in range(1, 5))]
    marks = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    processor = hf.AyaVisionProcessor(
        hf.GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4),
        tokenizer(["<|im_start|>", *marks, *tiles], pad="<PAD>", eos="<|im_end|>", bos="<BOS>"),
        patch_size=8,
        img_size=32,
        downsample_factor=2,
        chat_template=chatml("<image>"),
    )
    text = {"model_type": "cohere2", "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
    vision = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
    return build("aya_vision", processor, text, vision, **ids(processor, image_token_index="<|IMG_PATCH|>"))


def glm4v() -> Cafe:
    """A family outside the table that reads trees, with positions of its own."""
    marks = {
        "image_start_token_id": "<|begin_of_image|>",
        "image_end_token_id": "<|end_of_image|>",
        "image_token_id": "<|image|>",
        "video_start_token_id": "<|begin_of_video|>",
        "video_end_token_id": "<|end_of_video|>",
        "video_token_id": "<|video|>",
    }
    processor = without_video(hf.Glm4vProcessor)(
        hf.Glm4vImageProcessorPil(size=QWEN_SIZE, patch_size=4),
        tokenizer(["<|im_start|>", *marks.values()], pad="<|endoftext|>", eos="<|im_end|>"),
        chat_template=chatml("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    vision = {**QWEN_VISION, "image_size": 32, "out_hidden_size": WIDTH}
    return build("glm4v", processor, MROPE, vision, **ids(processor, **marks))


def ovis2() -> Cafe:
    """A family outside the table that supports trees. The token run of an image has tokens of its parts and marks."""
    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    processor = hf.Ovis2Processor(
        hf.Ovis2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4),
        tokenizer(["<|im_start|>", "<image>", "<IMG_ATOM>", *marks], pad="<|endoftext|>", eos="<|im_end|>"),
        image_seq_length=4,
        chat_template=chatml("<image>\\n"),
    )
    vision = {**VIT, "hidden_stride": 2, "vocab_size": 16 + len(marks), "num_visual_indicator_tokens": len(marks)}
    indicators = list(ids(processor, **{mark: mark for mark in marks}).values())
    tokens = ids(processor, image_token_id="<IMG_ATOM>")
    return build(
        "ovis2", processor, {"model_type": "qwen2"}, vision, visual_indicator_token_ids=indicators, hidden_size=WIDTH,
        vocab_size=len(processor.tokenizer), **tokens,
    )  # fmt: skip


def paligemma(**text: Any) -> Cafe:
    processor = hf.PaliGemmaProcessor(
        hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=16),
        tokenizer([], pad="<pad>", eos="<eos>", bos="<bos>", image_token="<image>"),
    )
    vision = {"model_type": "siglip_vision_model", **VIT, "vision_use_head": False}
    tokens = ids(processor, image_token_index="<image>")
    return build("paligemma", processor, {"model_type": "gemma", **text}, vision, projection_dim=WIDTH, **tokens)


def paligemma2() -> Cafe:
    """Its text model has a sliding window in every other layer, and caps scores and logits."""
    if "final_logit_softcapping" not in getsource(hf.PaliGemmaForConditionalGeneration.forward):
        raise ImportError("This version of transformers does not cap the logits of PaliGemma 2.")
    capped = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 16}
    return paligemma(model_type="gemma2", sliding_window=24, **capped)


FAMILIES: dict[str, Callable[[], Cafe]] = {
    family.__name__: family
    for family in (
        llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl, smolvlm, idefics3, internvl, gemma3, gemma4,
        paligemma, paligemma2, qwen3_5, aya_vision, glm4v, ovis2,
    )
}  # fmt: skip
