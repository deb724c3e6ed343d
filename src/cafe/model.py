"""`Cafe`: one checkpoint that embeds and generates.

A thin face over a Hugging Face LVLM and its processing. What makes an embedding (instructions, prompt frame, template)
travels in the checkpoint's `cafe.json`, so that training and use agree.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from threading import Thread
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
    TextIteratorStreamer,
)

from cafe.attention.last_layer import restrict_last_layer
from cafe.checkpoint import METADATA_FILE, _metadata_of, ensure_overwritable, fingerprint, prompts_from_metadata
from cafe.content import Content, Dialogue, Turn
from cafe.errors import CafeError, load_error
from cafe.export import detect_library, model_card, write_sentence_transformers, write_video_processor_config
from cafe.lvlm.adapters import has_adapter, load_adapter, read_adapter_config
from cafe.lvlm.families import attention_kwargs, quantization_kwargs
from cafe.lvlm.forward import compute_logits, forward_packed, infer_packing, to_device
from cafe.lvlm.image_size import sync_image_grids
from cafe.lvlm.processing import ChatProcessor, ProcessedImages, load_processor
from cafe.lvlm.prompts import Prompts, dialogue_messages, embedding_messages
from cafe.packing import Branch, PackingConfig, pack
from cafe.utils.atomic import commit, staging_path

T = TypeVar("T")
SORT_WINDOW = 8  # batches within which rows are sorted by length


@dataclass
class Cafe:
    """A vision-language model that embeds and generates.

    Attributes:
        lvlm: the Hugging Face model.
        chat_processor: its tokenizer, image processor and prompts.
        packing: how its branches are laid out.
        metadata: what the checkpoint tells of its making: temperature, recipe, data, versions.
    """

    lvlm: PreTrainedModel
    chat_processor: ChatProcessor
    packing: PackingConfig
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        path: str | Path,
        prompts: Prompts | None = None,
        dtype: torch.dtype | Literal["auto"] | None = None,
        device: str | torch.device | None = None,
        attention: str = "sdpa",
        four_bit: bool = False,
    ) -> "Cafe":
        """Loads a checkpoint of ours, an adapter together with its base, or any Hugging Face LVLM.

        Args:
            path: a local directory or a Hub id.
            prompts: overrides those of the checkpoint; a model without any gets the published ones.
            dtype: of the weights, "auto" for that of the files; float32 on a CPU and bfloat16 on a GPU unless given.
            device: a GPU where there is one, unless given.
            attention: the attention implementation by transformers' name; see `attention_kwargs`.
            four_bit: hold the language model's matrices in 4 bits, by bitsandbytes.

        Raises:
            CafeError: nothing can be loaded from there, or a package that it needs is not installed.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        record = _metadata_of(path)
        prompts = prompts or prompts_from_metadata(record)
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        base = str(path)
        try:
            adapter = read_adapter_config(path)
            base = str((adapter and adapter.base_model_name_or_path) or path)
            options = quantization_kwargs(base, device, dtype) if four_bit else {}
            by_part = attention_kwargs(AutoConfig.from_pretrained(base), attention)
            lvlm = AutoModelForImageTextToText.from_pretrained(
                base, dtype=dtype, attn_implementation=by_part, **options
            )
            processor = load_processor(str(path), lvlm.config.model_type)
        except (ImportError, OSError, ValueError, SafetensorError) as error:  # ImportError: a processor's package
            raise load_error("vision-language model", base, error) from error
        chat_processor = ChatProcessor(processor, prompts)
        sync_image_grids(lvlm, processor)
        if not four_bit:
            lvlm = lvlm.to(device)
        if adapter:
            load_adapter(lvlm, path, adapter)
        lvlm.eval()
        return cls(lvlm, chat_processor, infer_packing(lvlm, chat_processor), record)

    def save(self, path: str | Path, weights: dict[str, Tensor] | None = None, **record: Any) -> None:
        """Writes the checkpoint: complete or not at all.

        Args:
            path: the directory.
            weights: the model's, where it does not hold them whole itself.
            record: goes into the checkpoint's record.

        Raises:
            CafeError: there is something else at the path.
        """
        path = Path(path)
        ensure_overwritable(path)
        partial = staging_path(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.lvlm.save_pretrained(partial, state_dict=weights)
        self.chat_processor.save(partial)
        write_video_processor_config(partial, self.chat_processor.tokenizer.name_or_path, self.lvlm.config.model_type)
        versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
        self.metadata = {
            **self.metadata,
            **record,
            "prompts": asdict(self.chat_processor.prompts),
            "versions": versions,
        }
        if not has_adapter(self.lvlm) and not self.chat_processor.prefix_lm:  # whose processor takes no text alone
            write_sentence_transformers(partial, self.chat_processor, self.lvlm.config.get_text_config().hidden_size)
        (partial / "README.md").write_text(model_card(self.metadata, library=detect_library(partial)))
        (partial / METADATA_FILE).write_text(json.dumps(self.metadata, indent=2) + "\n")
        commit(partial, path)

    def fingerprint(self) -> str:
        """A digest of what decides the answers: weights, precision, device, prompts and image processing."""
        processor = getattr(self.chat_processor.processor, "image_processor", "")
        return fingerprint(self.lvlm, self.chat_processor.prompts, processor)

    def with_prompts(self, **changes: Any) -> "Cafe":
        """The same weights with other prompts; keyword arguments are fields of `Prompts`."""
        processor = copy.copy(self.chat_processor.processor)  # of which a chat template becomes a part
        processor.tokenizer = copy.copy(processor.tokenizer)
        chat_processor = ChatProcessor(processor, replace(self.chat_processor.prompts, **changes))
        return Cafe(self.lvlm, chat_processor, self.packing, self.metadata)

    @torch.inference_mode()
    def embed(self, contents: Any, batch_size: int = 32, dim: int | None = None) -> Float32[np.ndarray, "contents dim"]:
        """Embeds contents: unit vectors, in the order given.

        Args:
            contents: a sequence of whatever `Content.of` takes: texts, pictures, or both together.
            batch_size: how many go through the model at once, some of similar length.
            dim: take this many first dimensions alone, for a model trained so; its record says which under
                `recipe.objective.matryoshka`.

        Raises:
            CafeError: an embedding has not as many dimensions, or `contents` is one content and no sequence.
        """
        width = self.lvlm.config.get_text_config().hidden_size
        if dim is not None and not 0 < dim <= width:
            raise CafeError(f"dim should be between 1 and the embedding's {width}, not {dim}.")
        contents = _as_list(contents)
        vectors = np.zeros((len(contents), dim or width), np.float32)
        encode = lambda content: self.encode_embedding(Content.of(content))  # noqa: E731
        for chosen, rows in _length_sorted_batches(contents, encode, batch_size):
            hidden, _ = forward_packed(self.lvlm, pack([[row] for row in rows], [[]] * len(rows), self.packing))
            vectors[chosen] = F.normalize(hidden[:, :dim].float(), dim=-1).cpu().numpy()
        return vectors

    def generate(
        self,
        image: Any,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Answers a prompt about an image.

        Args:
            image: a picture, a path, or several; None for text alone.
            prompt: what to say to the model.
            max_new_tokens: the longest answer, in tokens.
            temperature: 0 takes the likeliest token each time; above it, tokens are sampled.
            top_p: samples among the likeliest tokens that together hold this probability.
            stream: return an iterator over pieces of the answer as they come.
        """
        content = _prompt_content(image, prompt)
        options = _generation_kwargs(max_new_tokens, temperature, top_p)
        if not stream:
            return self._generate([self.encode_prompt(content)], options)[0]
        streamer = TextIteratorStreamer(self.chat_processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return _stream(
            lambda: self._generate([self.encode_prompt(content)], {**options, "streamer": streamer}), streamer
        )

    def generate_batch(
        self,
        prompts: Sequence[Content],
        max_new_tokens: int = 64,
        batch_size: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> list[str]:
        """The answer to each content taken as a user's turn, in the order given; the likeliest unless sampled."""
        answers = [""] * len(prompts)
        options = _generation_kwargs(max_new_tokens, temperature, top_p)
        for chosen, rows in _length_sorted_batches(prompts, self.encode_prompt, batch_size):
            for index, answer in zip(chosen, self._generate(rows, options), strict=True):
                answers[index] = answer
        return answers

    def embed_and_generate(
        self, image: Any, prompt: str, max_new_tokens: int = 128
    ) -> tuple[Float32[np.ndarray, " dim"], str]:
        """An image's embedding and the answer to a prompt about it, from one pass over the image."""
        vectors, answers = self.embed_and_generate_batch([image], prompt, max_new_tokens)
        return vectors[0], answers[0]

    @torch.inference_mode()
    def embed_and_generate_batch(
        self,
        images: Sequence[Any],
        prompt: str = "Describe the image.",
        max_new_tokens: int = 128,
        batch_size: int = 32,
    ) -> tuple[Float32[np.ndarray, "images dim"], list[str]]:
        """Each image's embedding and the likeliest answer to a prompt about it, in the order given.

        An image is read once: both continue from the same cache. But a prefix-LM reads an image anew with each prompt.

        Args:
            images: pictures or paths.
            prompt: what to say to the model about each.
            max_new_tokens: the longest answer, in tokens.
            batch_size: how many images go through the model at once, some of similar length.
        """

        def encode(image: Any) -> tuple[Branch, Branch]:
            content = _prompt_content(image, prompt)
            if not content.images:
                raise CafeError("There is no image to describe.")
            pictures = self._load_images(content)
            embedding = self.encode_embedding(Content(tuple(content.images)), pictures)
            return embedding, self.encode_prompt(content, pictures)

        images = _as_list(images)
        vectors = np.zeros((len(images), self.lvlm.config.get_text_config().hidden_size), np.float32)
        answers = [""] * len(images)
        for chosen, pairs in _length_sorted_batches(images, encode, batch_size, lambda pair: len(pair[0])):
            hidden, said = self._embed_and_generate(pairs, max_new_tokens)
            vectors[chosen] = F.normalize(hidden.float(), dim=-1).cpu().numpy()
            for index, answer in zip(chosen, said, strict=True):
                answers[index] = answer
        return vectors, answers

    def _embed_and_generate(
        self, pairs: Sequence[tuple[Branch, Branch]], max_new_tokens: int
    ) -> tuple[Tensor, list[str]]:
        """The readouts of embedding branches and the answers to questions which begin with the same pictures."""
        options = _generation_kwargs(max_new_tokens, 0.0, 1.0)
        if self.chat_processor.prefix_lm:
            rows = pack([[embedding] for embedding, _ in pairs], [[]] * len(pairs), self.packing)
            return forward_packed(self.lvlm, rows)[0], self._generate([question for _, question in pairs], options)
        shared = [_common_prefix(embedding.input_ids, question.input_ids) for embedding, question in pairs]
        prefixes = [embedding.truncate(length) for (embedding, _), length in zip(pairs, shared, strict=True)]
        device, base = self.lvlm.device, self.lvlm.base_model
        cache = DynamicCache(config=self.lvlm.config.get_text_config())
        inputs = self._inputs(prefixes, left=True)
        has_axes = hasattr(base, "get_rope_index")  # M-RoPE: the model counts pictures by itself, and keeps the offset
        if not has_axes:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with restrict_last_layer(self.lvlm, torch.empty(0, 2, dtype=torch.long)):  # the cache is all that is read
            base(**inputs, past_key_values=cache, use_cache=True)

        def mask_of(rest: Tensor) -> Tensor:
            return torch.cat([inputs["attention_mask"], torch.ones_like(rest)], dim=1)

        # The embedding goes on from a copy of the cache, the answer from the cache itself.
        rest = torch.stack([e.input_ids[n:] for (e, _), n in zip(pairs, shared, strict=True)]).to(device)
        mask = mask_of(rest)
        positions = mask.cumsum(1)[:, -rest.shape[1] :] - 1
        hidden = base(
            input_ids=rest,
            attention_mask=mask,
            position_ids=(positions + base.rope_deltas).expand(3, -1, -1) if has_axes else positions,
            past_key_values=copy.deepcopy(cache),
            use_cache=True,
        ).last_hidden_state[:, -1]

        asked = torch.stack([q.input_ids[n:] for (_, q), n in zip(pairs, shared, strict=True)]).to(device)
        ids = torch.cat([inputs["input_ids"], asked], dim=1)
        output = self.lvlm.generate(input_ids=ids, attention_mask=mask_of(asked), past_key_values=cache, **options)
        said = self.chat_processor.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        return hidden, [text.strip() for text in said]

    def score(self, content: Any, answer: str) -> float:
        """The log-likelihood, in nats, of an answer and its end, after the content as a user's turn."""
        return float(self.score_batch([content], [[answer]])[0][0])

    @torch.inference_mode()
    def score_batch(
        self, contents: Sequence[Any], answers: Sequence[Sequence[str]], batch_size: int = 16
    ) -> list[Float[np.ndarray, " answers"]]:
        """The log-likelihood of several answers to each content, in the order given, as `score` has it of one.

        What the answers to a content share, its pictures above all, is read once.

        Args:
            contents: whatever `Content.of` takes, each a user's turn.
            answers: the answers to each, at least one.
            batch_size: how many contents go through the model at once.
        """
        _check_size(batch_size)
        scores: list[Float[np.ndarray, " answers"]] = []
        for start in range(0, len(contents), batch_size):
            chosen = slice(start, start + batch_size)
            pairs = zip(contents[chosen], answers[chosen], strict=True)
            scores += self._score([self._encode_answers(Content.of(content), said) for content, said in pairs])
        return scores

    def _score(self, said: Sequence[Sequence[Branch]]) -> list[Float[np.ndarray, " answers"]]:
        """The log-likelihood of what is supervised in the branches of some contents, read in one pass."""
        rows = pack([[]] * len(said), said, self.packing)
        _, before = forward_packed(self.lvlm, rows)
        # One answer at a time: the logits of a whole batch would not fit where the vocabulary is large.
        lengths = [int(branch.loss_mask[1:].sum()) for branches in said for branch in branches]
        labels = rows.labels.to(before.device).split(lengths)
        likelihoods = [
            -F.cross_entropy(compute_logits(self.lvlm, hidden), label, reduction="sum")
            for hidden, label in zip(before.split(lengths), labels, strict=True)
        ]
        return [part.numpy() for part in torch.stack(likelihoods).cpu().split(list(map(len, said)))]

    def _encode_answers(self, content: Content, answers: Sequence[str]) -> list[Branch]:
        """Dialogues of one user's turn, which show the same pictures."""
        pictures = self._load_images(content)
        return [
            self.encode_dialogue(Dialogue((Turn("user", content), Turn("assistant", Content.of(answer)))), pictures)
            for answer in answers
        ]

    def encode_embedding(self, content: Content, pictures: ProcessedImages | None = None) -> Branch:
        """The token sequence whose last token is the content's readout."""
        pictures = pictures or self._load_images(content)
        return self.chat_processor.encode_embedding(embedding_messages(content, self.chat_processor.prompts), pictures)

    def encode_prompt(self, content: Content, pictures: ProcessedImages | None = None) -> Branch:
        """The token sequence of a user's turn, up to where the model answers."""
        dialogue = Dialogue((Turn("user", content),))
        messages = dialogue_messages(dialogue, self.chat_processor.prompts)
        return self.chat_processor.encode_prompt(messages, pictures or self._load_images(content))

    def encode_dialogue(self, dialogue: Dialogue, pictures: ProcessedImages | None = None) -> Branch:
        """The token sequence of a whole dialogue."""
        content = Content(tuple(part for turn in dialogue.turns for part in turn.content.parts))
        messages = dialogue_messages(dialogue, self.chat_processor.prompts)
        return self.chat_processor.encode_dialogue(messages, pictures or self._load_images(content))

    def _load_images(self, content: Content) -> ProcessedImages:
        return self.chat_processor.load_images(content.images)

    def _inputs(self, rows: Sequence[Branch], left: bool = False) -> dict[str, Tensor]:
        inputs = self.chat_processor.collate(rows, left=left)
        return to_device(inputs, self.lvlm.device, self.lvlm.dtype)

    @torch.inference_mode()
    def _generate(self, rows: Sequence[Branch], options: dict[str, Any]) -> list[str]:
        inputs = self._inputs(rows, left=True)
        output = self.lvlm.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.chat_processor.tokenizer.batch_decode(output, skip_special_tokens=True)]


def _as_list(contents: Any) -> list[Any]:
    """A sequence as a list; what is one content and not several would be taken apart, a text into its letters."""
    if isinstance(contents, (str, bytes, dict)) or not isinstance(contents, Iterable):
        raise CafeError(f"A list of contents is wanted, not a {type(contents).__name__}: put a single one in a list.")
    return list(contents)


def _check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise CafeError(f"batch_size should be above 0, not {batch_size}.")


def _length_sorted_batches(
    items: Sequence[Any], encode: Callable[[Any], T], batch_size: int, length: Callable[[Any], int] = len
) -> Iterator[tuple[list[int], list[T]]]:
    """Items of similar length, encoded, with their places: sorted within some batches, so that few wait encoded."""
    _check_size(batch_size)
    for start in range(0, len(items), SORT_WINDOW * batch_size):
        rows = [encode(item) for item in items[start : start + SORT_WINDOW * batch_size]]
        order = sorted(range(len(rows)), key=lambda index: -length(rows[index]))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            yield [start + index for index in chosen], [rows[index] for index in chosen]


def _stream(generate: Callable[[], Any], streamer: TextIteratorStreamer) -> Iterator[str]:
    """The pieces of text that come through a streamer while a thread generates; its mistakes are raised behind them."""
    mistakes: list[BaseException] = []

    def work() -> None:
        try:
            generate()
        except BaseException as error:
            mistakes.append(error)
            streamer.end()

    def pieces() -> Iterator[str]:
        yield from streamer
        if mistakes:
            raise mistakes[0]

    Thread(target=work, daemon=True).start()
    return pieces()


def _prompt_content(image: Any, prompt: str) -> Content:
    if image is None:
        return Content.of(prompt)
    picture = Path(image) if isinstance(image, str) else image
    return Content.of([picture, prompt])


def _generation_kwargs(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    if temperature <= 0:
        return {"max_new_tokens": max_new_tokens, "do_sample": False}
    return {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature, "top_p": top_p}


def _common_prefix(first: Tensor, second: Tensor) -> int:
    length = min(len(first), len(second)) - 1
    parted = (first[:length] != second[:length]).nonzero()
    return int(parted[0]) if len(parted) else length
