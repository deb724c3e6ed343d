"""`Cafe`: one checkpoint that embeds and generates.

It wraps a Hugging Face LVLM and its processor. The checkpoint's `cafe.json` records what makes an embedding
(instructions, prompt frame, template), so that training and use agree.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor
from transformers import PreTrainedModel

from cafe.checkpoint import METADATA_FILE, ensure_overwritable, fingerprint, load_metadata, prompts_from_metadata
from cafe.content import Content, Dialogue, checked_content, content_list, prompt_content
from cafe.errors import CafeError
from cafe.export import detect_library, model_card, write_sentence_transformers, write_video_processor_config
from cafe.lvlm.adapters import has_adapter
from cafe.lvlm.content_encoder import ContentEncoder
from cafe.lvlm.forward import compute_logits, forward_packed, infer_packing
from cafe.lvlm.generation import generate_texts, generation_kwargs, prefill_embed_and_generate, stream_text
from cafe.lvlm.loading import load_lvlm
from cafe.lvlm.pickling import register_recorded_outputs, without_capturing_hooks
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import DESCRIBE_PROMPT, Prompts
from cafe.lvlm.saving import save_lvlm
from cafe.packing import Branch, PackingConfig, pack
from cafe.utils.atomic import commit, staging_path
from cafe.utils.batching import check_batch_size, encode_item, length_sorted_batches


@dataclass
class Cafe:
    """Embed and generate with one vision-language model.

    Attributes:
        lvlm: the Hugging Face model.
        chat_processor: its tokenizer, image processor and prompts.
        packing: how its branches are laid out in rows.
        metadata: what the checkpoint records about its training: temperature, recipe, data, versions.
        name: the directory or Hub id that it was loaded from.
    """

    lvlm: PreTrainedModel
    chat_processor: ChatProcessor
    packing: PackingConfig
    metadata: dict[str, Any] = field(default_factory=dict)
    name: str = ""

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
        """Load a checkpoint of ours, an adapter together with its base, or any Hugging Face LVLM.

        Args:
            path: a local directory or a Hub id.
            prompts: override those of the checkpoint; a model that has none gets the published ones.
            dtype: of the weights, "auto" for that of the files; by default float32 on a CPU and bfloat16 on a GPU.
            device: by default a GPU if there is one.
            attention: the attention implementation, by transformers' name; see `attention_kwargs`.
            four_bit: hold the language model's matrices in 4 bits, by bitsandbytes.

        Raises:
            CheckpointError: nothing can be loaded from there.
            MissingPackageError: a package that it needs is not installed.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        path = os.path.expanduser(path)
        metadata = load_metadata(path)
        prompts = prompts or prompts_from_metadata(metadata)
        lvlm, chat_processor = load_lvlm(path, prompts, dtype, device, attention, four_bit)
        return cls(lvlm, chat_processor, infer_packing(lvlm, chat_processor), metadata, str(path))

    def save(self, path: str | Path, weights: dict[str, Tensor] | None = None, **metadata: Any) -> None:
        """Write the checkpoint: complete or not at all.

        Args:
            path: the directory.
            weights: the model's state dict, if the model itself holds only a shard of it.
            metadata: added to the checkpoint's metadata.

        Raises:
            CheckpointError: there is something else at the path; a weight is not finite; the files lack a weight that
                was trained.
        """
        # Everything is written beside the path first, and takes its place in one rename.
        path = Path(path).expanduser()
        ensure_overwritable(path)
        partial = staging_path(path)
        shutil.rmtree(partial, ignore_errors=True)  # left by a save that was interrupted
        partial.mkdir(parents=True)

        # The files of transformers or PEFT.
        save_lvlm(self.lvlm, partial, weights)
        self.chat_processor.save(partial)
        write_video_processor_config(partial, self.chat_processor.tokenizer.name_or_path, self.lvlm.config.model_type)

        # Ours, and those that other software reads.
        self.metadata = {
            **self.metadata,
            **metadata,
            "prompts": asdict(self.chat_processor.prompts),
            "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        }
        # An adapter lies beside no base, and the processor of a prefix-LM takes no text without an image.
        if not has_adapter(self.lvlm) and not self.chat_processor.prefix_lm:
            write_sentence_transformers(partial, self.chat_processor, self._embedding_dim)
        (partial / "README.md").write_text(model_card(self.metadata, library=detect_library(partial)), encoding="utf-8")
        (partial / METADATA_FILE).write_text(json.dumps(self.metadata, indent=2) + "\n")
        commit(partial, path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the parts, of the model without what cannot be pickled."""
        lvlm = without_capturing_hooks(self.lvlm)
        return _restore, (lvlm, self.chat_processor, self.packing, self.metadata, self.name)

    def fingerprint(self) -> str:
        """Compute a digest of what decides the answers: weights, precision, device, prompts and image processing."""
        processor = getattr(self.chat_processor.processor, "image_processor", "")  # prints all of its settings
        return fingerprint(self.lvlm, self.chat_processor.prompts, processor)

    def with_prompts(self, **changes: Any) -> "Cafe":
        """Return the same weights with other prompts; keyword arguments are fields of `Prompts`."""
        # Copied, because a chat processor puts its chat template into its processor and tokenizer.
        processor = copy.copy(self.chat_processor.processor)
        processor.tokenizer = copy.copy(processor.tokenizer)
        chat_processor = ChatProcessor(processor, replace(self.chat_processor.prompts, **changes))
        return replace(self, chat_processor=chat_processor)

    @torch.inference_mode()
    def embed(self, contents: Any, batch_size: int = 32, dim: int | None = None) -> Float32[np.ndarray, "contents dim"]:
        """Embed contents as unit vectors, in the order given.

        What the contents of one forward pass begin with in common is read once, above all an image. Images are the same
        if they have the same path or bytes, or are one Pillow image.

        Args:
            contents: a sequence of whatever `Content.of` takes: texts, images, or both together. A string is text; the
                path of an image is a `Path`, or a string in `{"image": "cat.png"}`.
            batch_size: inputs per forward pass; inputs with the same images go together, and those of similar length.
            dim: keep this many first dimensions, for a model trained with them; see `recipe.objective.matryoshka_dims`
                in its metadata.

        Raises:
            CafeError: embeddings do not have that many dimensions, or `contents` is a single content.
            RecordError: a content cannot be read; the message has its index.
        """
        if dim is not None and not 0 < dim <= self._embedding_dim:
            raise CafeError(f"dim should be between 1 and the embedding's {self._embedding_dim}, not {dim}.")
        contents = content_list(contents)
        vectors = np.zeros((len(contents), dim or self._embedding_dim), np.float32)

        def make_encode() -> Callable[[Any], Branch]:
            """Make the function that encodes the contents of one window."""
            encoder = ContentEncoder(self.chat_processor)
            return lambda content: encoder.encode_embedding(checked_content(content))

        # Images are shared within a forward pass alone, so contents with the same ones go together.
        group = _images_of if self.packing.share_prefixes else id
        for indices, branches in length_sorted_batches(contents, make_encode, batch_size, "contents", group=group):
            vectors[indices] = self.embed_branches(branches, dim)
        return vectors

    @torch.inference_mode()
    def embed_branches(
        self, branches: Sequence[Branch], dim: int | None = None, packing: PackingConfig | None = None
    ) -> Float32[np.ndarray, "contents dim"]:
        """Embed encoded contents in one forward pass; `packing` packs them in another way than the model's own."""
        # Each content is an example by itself, without a dialogue.
        batch = pack([[branch] for branch in branches], [[]] * len(branches), packing or self.packing)
        hidden, _ = forward_packed(self.lvlm, batch)
        return F.normalize(hidden[:, :dim].float(), dim=-1).cpu().numpy()

    def generate(
        self,
        image: Any,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Answer a prompt about an image.

        Args:
            image: an image, a path, or several; None for text alone; or a `Content` of images and words.
            prompt: the user's words, which follow.
            max_new_tokens: maximum length of the answer, in tokens.
            temperature: 0 takes the likeliest token each time; above 0, tokens are sampled.
            top_p: sample among the likeliest tokens that together have this probability.
            stream: return an iterator over pieces of the answer as they are generated.
        """
        content = prompt_content(image, prompt)
        kwargs = generation_kwargs(max_new_tokens, temperature, top_p)
        if not stream:
            return self._generate([self.encode_prompt(content)], **kwargs)[0]
        # The prompt is encoded in the thread too, so that an image that cannot be read ends the stream with its error.
        return stream_text(
            lambda streamer: self._generate([self.encode_prompt(content)], **kwargs, streamer=streamer),
            self.chat_processor.tokenizer,
        )

    def generate_batch(
        self,
        prompts: Sequence[Content],
        max_new_tokens: int = 64,
        batch_size: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> list[str]:
        """Answer each content as a user's turn, in the order given; greedily unless sampled."""
        answers = [""] * len(prompts)
        kwargs = generation_kwargs(max_new_tokens, temperature, top_p)

        def make_encode() -> Callable[[Content], Branch]:
            """Make the function that encodes the prompts of one window."""
            return ContentEncoder(self.chat_processor).encode_prompt

        for indices, branches in length_sorted_batches(prompts, make_encode, batch_size, "prompts"):
            for index, answer in zip(indices, self._generate(branches, **kwargs), strict=True):
                answers[index] = answer
        return answers

    def embed_and_generate(
        self, image: Any, prompt: str, max_new_tokens: int = 128
    ) -> tuple[Float32[np.ndarray, " dim"], str]:
        """Embed an image and answer a prompt about it, from one pass over the image."""
        vectors, answers = self.embed_and_generate_batch([image], prompt, max_new_tokens)
        return vectors[0], answers[0]

    @torch.inference_mode()
    def embed_and_generate_batch(
        self,
        images: Sequence[Any],
        prompt: str = DESCRIBE_PROMPT,
        max_new_tokens: int = 128,
        batch_size: int = 32,
    ) -> tuple[Float32[np.ndarray, "images dim"], list[str]]:
        """Embed each image and answer a prompt about it, greedily, in the order given.

        Both continue from one cache, so each image is read once; a prefix-LM reads it once for each.

        Args:
            images: images or paths.
            prompt: the user's words about each.
            max_new_tokens: maximum length of an answer, in tokens.
            batch_size: images per forward pass; those of similar length go together.
        """

        def make_encode() -> Callable[[Any], tuple[Branch, Branch]]:
            """Make the function that encodes the images of one window, each with the prompt about it."""
            return partial(ContentEncoder(self.chat_processor).encode_described, prompt=prompt)

        def length(pair: tuple[Branch, Branch]) -> int:
            """Measure the embedding of an image."""
            return len(pair[0])

        images = content_list(images)
        vectors = np.zeros((len(images), self._embedding_dim), np.float32)
        answers = [""] * len(images)
        kwargs = generation_kwargs(max_new_tokens)
        for indices, pairs in length_sorted_batches(images, make_encode, batch_size, "images", length):
            vectors[indices], texts = self.embed_and_generate_branches(pairs, kwargs)
            for index, answer in zip(indices, texts, strict=True):
                answers[index] = answer
        return vectors, answers

    @torch.inference_mode()
    def embed_and_generate_branches(
        self, pairs: Sequence[tuple[Branch, Branch]], kwargs: dict[str, Any]
    ) -> tuple[Float32[np.ndarray, "images dim"], list[str]]:
        """Embed encoded images and answer encoded prompts about the same images, from one prefill where it can be.

        Args:
            pairs: an embedding branch and a prompt that begins with the same images.
            kwargs: arguments of transformers' `generate`.
        """
        if self.chat_processor.prefix_lm:
            # A prefix-LM's image tokens attend to the words behind them, so nothing can be shared. Each branch is read
            # by itself: first all embeddings, then all prompts.
            vectors = self.embed_branches([embedding for embedding, _ in pairs])
            return vectors, self._generate([prompt for _, prompt in pairs], **kwargs)
        hidden, texts = prefill_embed_and_generate(self.lvlm, self.chat_processor, pairs, kwargs)
        return F.normalize(hidden.float(), dim=-1).cpu().numpy(), texts

    def score(self, content: Any, answer: str) -> float:
        """Compute the log-likelihood, in nats, of an answer and its end, given the content as a user's turn."""
        return float(self.score_batch([content], [[answer]])[0][0])

    @torch.inference_mode()
    def score_batch(
        self, contents: Sequence[Any], answers: Sequence[Sequence[str]], batch_size: int = 16, with_end: bool = True
    ) -> list[Float[np.ndarray, " answers"]]:
        """Compute the log-likelihood of several answers to each content, in the order given, as `score` does for one.

        What the answers to a content share is read once, and so are images that several contents of one forward pass
        have in common, as in `embed`.

        Args:
            contents: whatever `Content.of` takes, each a user's turn.
            answers: the answers to each, at least one.
            batch_size: contents per forward pass.
            with_end: whether an answer is to end; if not, the likelihood is that of all answers that begin with it.
        """
        check_batch_size(batch_size)

        def make_encode() -> Callable[[tuple[Any, Sequence[str]]], list[Branch]]:
            """Make the function that encodes the answers to each content of one forward pass."""
            encoder = ContentEncoder(self.chat_processor)
            return lambda pair: encoder.encode_answers(checked_content(pair[0]), pair[1], with_end)

        pairs = list(zip(contents, answers, strict=True))
        scores: list[Float[np.ndarray, " answers"]] = []
        for start in range(0, len(pairs), batch_size):
            window, encode = range(start, min(start + batch_size, len(pairs))), make_encode()
            scores += self._score([encode_item(pairs, index, encode, "contents") for index in window])
        return scores

    @torch.inference_mode()
    def _score(self, dialogues: Sequence[Sequence[Branch]]) -> list[Float[np.ndarray, " answers"]]:
        """Compute the log-likelihood of the supervised tokens of some contents' dialogues, in one forward pass."""
        batch = pack([[]] * len(dialogues), dialogues, self.packing)  # nothing is embedded
        _, hidden = forward_packed(self.lvlm, batch)
        # The hidden states of all answers come one after the other. The first token of a branch is predicted by none.
        lengths = [int(branch.loss_mask[1:].sum()) for branches in dialogues for branch in branches]
        labels = batch.labels.to(hidden.device).split(lengths)
        # One answer at a time: with a large vocabulary, the logits of a whole batch would not fit in memory.
        likelihoods = [
            -F.cross_entropy(compute_logits(self.lvlm, states), label, reduction="sum")
            for states, label in zip(hidden.split(lengths), labels, strict=True)
        ]
        # Moved to the CPU at once, because each transfer waits for the GPU.
        answers_each = [len(branches) for branches in dialogues]
        return [part.numpy() for part in torch.stack(likelihoods).cpu().split(answers_each)]

    def encode_embedding(self, content: Content) -> Branch:
        """Encode the token sequence whose last token is the content's readout."""
        return ContentEncoder(self.chat_processor).encode_embedding(content)

    def encode_prompt(self, content: Content) -> Branch:
        """Encode the token sequence of a user's turn, up to where the model answers."""
        return ContentEncoder(self.chat_processor).encode_prompt(content)

    def encode_dialogue(self, dialogue: Dialogue) -> Branch:
        """Encode the token sequence of a whole dialogue."""
        return ContentEncoder(self.chat_processor).encode_dialogue(dialogue)

    def _generate(self, prompts: Sequence[Branch], **kwargs: Any) -> list[str]:
        """Generate the answers to encoded prompts, by arguments of transformers' `generate`."""
        return generate_texts(self.lvlm, self.chat_processor, prompts, kwargs)

    @property
    def _embedding_dim(self) -> int:
        """Return the number of dimensions of an embedding: the width of the language model."""
        dim: int = self.lvlm.config.get_text_config().hidden_size
        return dim


def _restore(lvlm: PreTrainedModel, *others: Any) -> Cafe:
    """Restore a model from its pickled parts."""
    register_recorded_outputs(lvlm)
    return Cafe(lvlm, *others)


def _images_of(branch: Branch) -> int:
    """Identify the images that a branch shares with others, or the branch itself if it has none."""
    return id(branch.image_inputs or branch)
