"""A tiny LLaVA-OneVision that is trained from scratch: its processor, its untrained model and its training step."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from cafe.losses import linear_cross_entropy
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.loading import without_video
from cafe.lvlm.prompts import CHATML
from cafe.packing import PackedBatch
from cafe.training.muon import Muon, hidden_weight_names


@dataclass(frozen=True, kw_only=True)
class TinyLlavaConfig:
    """Configure the sizes of the model and what its images are cut into.

    Attributes:
        vocabulary: the maximum number of tokens.
        crop: the side of a crop in pixels, which is also that of the thumbnail.
        grid_pinpoints: the (height, width) of what images are resized to before they are cut into crops, as in anyres.
        patch: the side of a patch in pixels.
        width: the hidden size of the vision tower and of the language model.
        vision_layers: the number of layers of the vision tower.
        text_layers: the number of layers of the language model.
    """

    vocabulary: int
    crop: int
    grid_pinpoints: tuple[tuple[int, int], ...]
    patch: int = 16
    width: int = 160
    vision_layers: int = 5
    text_layers: int = 5


def make_processor(texts: Iterable[str], config: TinyLlavaConfig) -> LlavaOnevisionProcessor:
    """Make a LLaVA-OneVision processor whose byte-level BPE tokenizer is trained on the texts."""
    # Byte-level, so that any text can be encoded although the corpus is tiny.
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # The first one pads, the next two frame turns (ChatML), and the last two stand for images and videos.
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=config.vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        model_max_length=1024,
    )
    image_processor = LlavaOnevisionImageProcessorPil(
        # The tower sees squares of one size: crops, and the whole image made as small as one.
        size={"height": config.crop, "width": config.crop},
        image_grid_pinpoints=list(map(list, config.grid_pinpoints)),
        # Values from -1 to 1.
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return without_video(LlavaOnevisionProcessor)(
        image_processor=image_processor,
        tokenizer=tokenizer,
        num_image_tokens=(config.crop // config.patch) ** 2,
        # A SigLIP tower has no class token that would have to be dropped.
        vision_feature_select_strategy="full",
        chat_template=CHATML,
    )


def make_model(processor: LlavaOnevisionProcessor, config: TinyLlavaConfig) -> LlavaOnevisionForConditionalGeneration:
    """Make the untrained model for the processor's tokens and images."""
    tokenizer = processor.tokenizer
    vision = SiglipVisionConfig(
        image_size=config.crop,
        patch_size=config.patch,
        hidden_size=config.width,
        intermediate_size=2 * config.width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=4,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=3 * config.width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=config.width**-0.5,  # the usual 0.02 is for wide models: attention would start out uniform
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
            image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )
    # Each layer starts as the identity: what its attention and its MLP add to the residual stream is 0 at first.
    for path, parameter in model.named_parameters():
        if path.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            nn.init.zeros_(parameter)
    # Answers end where turns do.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def make_optimizer(modules: Sequence[nn.Module], learning_rate: float, weight_decay: float = 0.0) -> Muon:
    """Make the optimizer of what is trained: Muon for the matrices inside the layers, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        inner = hidden_weight_names(module)
        for path, parameter in module.named_parameters():
            if parameter.requires_grad:
                (matrices if path in inner else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": 2 * learning_rate, "orthogonal": True},
        {"params": others},
    ]
    return Muon(groups, lr=learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Make the learning-rate schedule: a short warm-up, then half a cosine down to a fiftieth.

    The learning rate of each group follows one curve, whatever it starts from.
    """

    def factor(step: int) -> float:
        """Return the lower of the two curves."""
        warm_up = (step + 1) / 50
        cosine = 1 + math.cos(math.pi * min(1, step / steps))  # from 2 down to 0
        return min(warm_up, 0.02 + 0.49 * cosine)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_step(
    model: LlavaOnevisionForConditionalGeneration,
    lessons: Mapping[str, PackedBatch],
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> dict[str, float]:
    """Take a step on lessons of several kinds, each of which has its own pass and the same weight in the step's loss.

    Returns:
        by kind, the mean language-modeling loss of a supervised token.
    """
    losses = {}
    # One backward pass for each kind, so that the activations of only one are held at a time.
    model.zero_grad()
    for kind, lesson in lessons.items():
        _, hidden = forward_packed(model, lesson)
        weight = model.lm_head.weight
        loss = linear_cross_entropy(hidden, lesson.labels.to(weight.device), weight) / len(lesson.labels)
        (loss / len(lessons)).backward()
        losses[kind] = loss.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    return losses
