"""Generate text, whole or streamed, and from one prefill both embeddings and text."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from threading import Event, Thread
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, TextIteratorStreamer

from cafe.attention.last_layer import restrict_last_layer
from cafe.lvlm.families import position_ids_fn
from cafe.lvlm.forward import check_token_ids, to_device
from cafe.lvlm.processing import ChatProcessor
from cafe.packing import Branch


def generation_kwargs(max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0) -> dict[str, Any]:
    """Return the arguments of `generate`; temperature 0 takes the likeliest token each time."""
    if temperature <= 0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature, "top_p": top_p}


def collate_to_device(
    lvlm: PreTrainedModel, chat_processor: ChatProcessor, branches: Sequence[Branch]
) -> dict[str, Tensor]:
    """Collate branches into inputs on the model's device, padded on the left, with their position ids."""
    inputs = chat_processor.collate(branches, left=True)
    check_token_ids(lvlm, inputs["input_ids"])
    # Given, not left to the model: under M-RoPE it would keep the offset of each row on itself for the next token
    # (`rope_deltas`), where another thread overwrites it.
    inputs["position_ids"] = _pad_position_ids(map(position_ids_fn(lvlm), branches))
    return to_device(inputs, lvlm.device, lvlm.dtype)


def _pad_position_ids(position_ids: Iterable[Int64[Tensor, "axes _tokens"]]) -> Int64[Tensor, "*axes rows columns"]:
    """Stack the position ids of rows, padded on the left; the axes come first only where there are several of them."""
    by_token = [ids.T for ids in position_ids]
    padded = pad_sequence(by_token, batch_first=True, padding_side="left")
    return padded.movedim(2, 0).squeeze(0)


@torch.inference_mode()
def generate_texts(
    lvlm: PreTrainedModel, chat_processor: ChatProcessor, prompts: Sequence[Branch], kwargs: dict[str, Any]
) -> list[str]:
    """Generate the continuation of each prompt."""
    inputs = collate_to_device(lvlm, chat_processor, prompts)
    output = lvlm.generate(**inputs, **kwargs)
    return _decode_new_tokens(chat_processor, output, inputs["input_ids"].shape[1])


class StoppableStreamer(TextIteratorStreamer):
    """Pass generated text on to another thread, which may stop the generation."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stopped = Event()

    def put(self, value: Tensor) -> None:
        """Take the next tokens.

        Raises:
            InterruptedError: nobody reads them any more.
        """
        if self.stopped.is_set():
            raise InterruptedError("The stream was closed.")
        super().put(value)


def stream_text(generate: Callable[[StoppableStreamer], Any], tokenizer: Any) -> Iterator[str]:
    """Run `generate` in a thread and yield the text that it puts into a streamer.

    An error of the thread is raised once the text before it was yielded. Closing the iterator ends the thread.
    """
    streamer = StoppableStreamer(tokenizer)
    errors: list[BaseException] = []

    def run() -> None:
        """Generate in the thread, and end the stream whatever happens: its reader would wait forever."""
        try:
            generate(streamer)
        except BaseException as error:
            errors.append(error)
            streamer.end()

    def iterate() -> Iterator[str]:
        """Yield the text; only at its end is it known whether the thread failed."""
        try:
            yield from streamer
        finally:
            # However reading ends: Python aborts if it exits while the thread is in PyTorch.
            streamer.stopped.set()
            thread.join()
        if errors:
            raise errors[0]

    # Started here and not in the iterator, so that the text is generated while the caller does other things.
    thread = Thread(target=run, daemon=True)
    thread.start()
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
    embedding_inputs = collate_to_device(lvlm, chat_processor, embeddings)
    prompt_inputs = collate_to_device(lvlm, chat_processor, prompts)
    # What follows the images is the same text in all rows, so the prefixes end in the same column in all of them.
    prefix_length = _common_prefix_length(embeddings[0].input_ids, prompts[0].input_ids)
    suffix_length = len(embeddings[0]) - prefix_length
    token_inputs = {"input_ids", "attention_mask", "position_ids", *chat_processor.token_type_fns}
    prefix = {
        name: tensor[..., :-suffix_length] if name in token_inputs else tensor
        for name, tensor in embedding_inputs.items()
    }
    cache = DynamicCache(config=lvlm.config.get_text_config())
    _prefill(lvlm, prefix, cache)

    # Both continue from the same prefix: the embedding from a copy of the cache, the text from the cache itself.
    hidden = _continue_embedding(lvlm, embedding_inputs, suffix_length, copy.deepcopy(cache))
    continued = {name: prompt_inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
    output = lvlm.generate(**continued, past_key_values=cache, **kwargs)
    return hidden, _decode_new_tokens(chat_processor, output, prompt_inputs["input_ids"].shape[1])


def _prefill(lvlm: PreTrainedModel, prefix: dict[str, Tensor], cache: DynamicCache) -> None:
    """Fill the cache with the prefix."""
    # Nothing but the cache is read, so the last layer computes no token's output.
    no_tokens = torch.empty(0, 2, dtype=torch.long)
    with restrict_last_layer(lvlm, no_tokens):
        lvlm.base_model(**prefix, past_key_values=cache, use_cache=True)


def _continue_embedding(
    lvlm: PreTrainedModel, inputs: dict[str, Tensor], suffix_length: int, cache: DynamicCache
) -> Float[Tensor, "rows dim"]:
    """Return the hidden state of the last token, of rows whose tokens before the suffix are in the cache."""
    output = lvlm.base_model(
        input_ids=inputs["input_ids"][:, -suffix_length:],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"][..., -suffix_length:],
        past_key_values=cache,
        use_cache=True,
    )
    hidden: Tensor = output.last_hidden_state[:, -1]
    return hidden


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
