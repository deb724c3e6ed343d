"""Generate text, whole or streamed, and from one prefill both embeddings and text."""

import copy
from collections.abc import Callable, Iterator, Sequence
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, TextIteratorStreamer

from cafe.attention.last_layer import restrict_last_layer
from cafe.lvlm.families import uses_mrope
from cafe.lvlm.forward import to_device
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import Branch


def generation_kwargs(max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0) -> dict[str, Any]:
    """Return the arguments of `generate`; temperature 0 takes the likeliest token each time."""
    if temperature <= 0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature, "top_p": top_p}


def collate_to_device(
    lvlm: PreTrainedModel, chat_processor: ChatProcessor, branches: Sequence[Branch], left: bool = False
) -> dict[str, Tensor]:
    """Collate branches into inputs on the model's device, padded on the left for generation."""
    return to_device(chat_processor.collate(branches, left=left), lvlm.device, lvlm.dtype)


@torch.inference_mode()
def generate_texts(
    lvlm: PreTrainedModel, chat_processor: ChatProcessor, prompts: Sequence[Branch], kwargs: dict[str, Any]
) -> list[str]:
    """Generate the continuation of each prompt."""
    inputs = collate_to_device(lvlm, chat_processor, prompts, left=True)
    output = lvlm.generate(**inputs, **kwargs)
    return _decode_new_tokens(chat_processor, output, inputs["input_ids"].shape[1])


def stream_text(generate: Callable[[], Any], streamer: TextIteratorStreamer) -> Iterator[str]:
    """Run `generate` in a thread and yield the text that it puts into a streamer.

    An error of the thread is raised once the text before it was yielded.
    """
    errors: list[BaseException] = []

    def run() -> None:
        """Generate in the thread, and end the stream whatever happens: its reader would wait forever."""
        try:
            generate()
        except BaseException as error:
            errors.append(error)
            streamer.end()

    def iterate() -> Iterator[str]:
        """Yield the text; only at its end is it known whether the thread failed."""
        yield from streamer
        if errors:
            raise errors[0]

    # Started here and not in the iterator, so that the text is generated while the caller does other things.
    Thread(target=run, daemon=True).start()
    return iterate()


@torch.inference_mode()
def prefill_embed_and_generate(
    lvlm: PreTrainedModel,
    chat_processor: ChatProcessor,
    pairs: Sequence[tuple[Branch, Branch]],
    kwargs: dict[str, Any],
) -> tuple[Tensor, list[str]]:
    """Embed and generate from one prefill of what an embedding branch and a prompt share: the images.

    Args:
        lvlm: the model.
        chat_processor: its processor.
        pairs: an embedding branch and a prompt, which begin with the same images; embedding branches differ in nothing
            but their images, and so do prompts.
        kwargs: arguments of `generate`.

    Returns:
        The last hidden state of each embedding branch's readout, and the text generated from each prompt.
    """
    embeddings, prompts = zip(*pairs, strict=True)
    lengths = [_common_prefix_length(embedding.input_ids, prompt.input_ids) for embedding, prompt in pairs]
    prefixes = [embedding.truncate(length) for embedding, length in zip(embeddings, lengths, strict=True)]
    # Padded on the left, so that what follows the prefixes begins in the same column for all.
    prefix = collate_to_device(lvlm, chat_processor, prefixes, left=True)
    cache = DynamicCache(config=lvlm.config.get_text_config())
    _prefill(lvlm, prefix, cache)

    # Both continue from the same prefix: the embedding from a copy of the cache, the text from the cache itself.
    suffix = _stack_suffixes(embeddings, lengths).to(lvlm.device)
    hidden = _continue_embedding(lvlm, prefix, suffix, copy.deepcopy(cache))

    suffix = _stack_suffixes(prompts, lengths).to(lvlm.device)
    input_ids = torch.cat([prefix["input_ids"], suffix], dim=1)
    output = lvlm.generate(
        input_ids=input_ids, attention_mask=_extend_mask(prefix, suffix), past_key_values=cache, **kwargs
    )
    return hidden, _decode_new_tokens(chat_processor, output, input_ids.shape[1])


def _stack_suffixes(branches: Sequence[Branch], lengths: Sequence[int]) -> Tensor:
    """Stack what follows the prefix of each branch: the same instruction or question, so of the same length."""
    suffixes = [branch.input_ids[length:] for branch, length in zip(branches, lengths, strict=True)]
    return torch.stack(suffixes)


def _prefill(lvlm: PreTrainedModel, prefix: dict[str, Tensor], cache: DynamicCache) -> None:
    """Fill the cache with the prefix."""
    position_ids = {}
    # Under M-RoPE the model counts the tokens of images itself, and keeps their offset in `rope_deltas`.
    if not uses_mrope(lvlm):
        position_ids["position_ids"] = (prefix["attention_mask"].cumsum(1) - 1).clamp(min=0)
    # Nothing but the cache is read, so the last layer computes no token's output.
    no_tokens = torch.empty(0, 2, dtype=torch.long)
    with restrict_last_layer(lvlm, no_tokens):
        lvlm.base_model(**prefix, **position_ids, past_key_values=cache, use_cache=True)


def _continue_embedding(
    lvlm: PreTrainedModel, prefix: dict[str, Tensor], suffix: Tensor, cache: DynamicCache
) -> Tensor:
    """Return the hidden state of the last token behind a prefix in the cache."""
    base = lvlm.base_model
    # A position is the number of tokens before it in its row, padding left out.
    mask = _extend_mask(prefix, suffix)
    position_ids = mask.cumsum(1)[:, -suffix.shape[1] :] - 1
    if uses_mrope(lvlm):
        position_ids = (position_ids + base.rope_deltas).expand(3, -1, -1)
    output = base(
        input_ids=suffix, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
    )
    hidden: Tensor = output.last_hidden_state[:, -1]
    return hidden


def _extend_mask(prefix: dict[str, Tensor], suffix: Tensor) -> Tensor:
    """Return the attention mask of a prefix and a suffix, which has no padding."""
    return torch.cat([prefix["attention_mask"], torch.ones_like(suffix)], dim=1)


def _decode_new_tokens(chat_processor: ChatProcessor, output: Tensor, prompt_length: int) -> list[str]:
    """Decode what `generate` wrote behind the prompts."""
    texts = chat_processor.tokenizer.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def _common_prefix_length(first: Tensor, second: Tensor) -> int:
    """Count the tokens that two sequences begin with in common."""
    # At least one token of each is left to continue with.
    length = min(len(first), len(second)) - 1
    differing = (first[:length] != second[:length]).nonzero()
    return int(differing[0]) if len(differing) else length
