"""Process images into the model's inputs: by the family's processor, or by a faster path that gives the same.

`FamilyImages` and `FastImages` have the same methods, and a `ChatProcessor` is given either. The fast path is for
training: the device normalizes the pixels, which arrive as bytes, and the text of hundreds of image tokens is written
and tokenized once for each image size.
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from cafe.content import ImageRef
from cafe.errors import RecordError
from cafe.images.decoding import decode_array, decode_image
from cafe.images.normalization import Normalization

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")  # inputs that mark image tokens in some families
MAX_KNOWN_SIZES = 512  # image sizes whose token runs are kept, each of up to thousands of tokens
_PROBE_SIDE = 1024  # pixels; a family that reads such an image at full size may read more of a larger one
_PROBE_SIZES = ((97, 61), (61, 97), (300, 180), (64, 64))  # (width, height) of the images both paths are compared on

# What turns an image processor's output into bytes. It is given an RGB array, and told that the colors come last,
# because an image three pixels high would be taken for one whose colors come first.
_BYTES_KWARGS = {
    "do_convert_rgb": False,
    "input_data_format": "channels_last",
    "do_rescale": False,
    "do_normalize": False,
}


@dataclass(frozen=True)
class ProcessedImages:
    """Hold the processed images of one content: the token run of each image, and the model's inputs for all of them."""

    token_runs: list[list[int]]
    inputs: dict[str, Tensor]


class FamilyImages:
    """Process images with the family's own processor.

    Args:
        processor: the family's processor.
        placeholder: the token that stands for an image in a rendered chat.
        image_tokens_only: drop all other tokens from the token runs; the processor of a prefix-LM puts the beginning
            and the end of a text behind its last image.
    """

    def __init__(self, processor: ProcessorMixin, placeholder: str, image_tokens_only: bool = False) -> None:
        self.processor = processor
        self.placeholder = placeholder
        self.image_tokens_only = image_tokens_only
        # Parts of an image may be other tokens than the placeholder (Gemma 3, Aya): the most frequent added token is
        # the one whose embeddings the model replaces.
        probe = self._call_processor([Image.new("RGB", (64, 64))])
        added_tokens = processor.tokenizer.added_tokens_decoder
        counts = Counter(token for token in probe["input_ids"][0].tolist() if token in added_tokens)
        [(self.image_token_id, _)] = counts.most_common(1)
        self.token_types = [name for name in TOKEN_TYPES if name in probe and probe[name].any()]

    def process(self, images: Sequence[Image.Image]) -> ProcessedImages:
        """Process the images of one content together, as the family does for one prompt."""
        if not images:
            return ProcessedImages([], {})
        batch = self._call_processor(images)
        # What is made for each token belongs to this prompt; the rest is the model's input for the images.
        token_runs = self._split_runs(batch.pop("input_ids")[0].tolist())
        for name in ("attention_mask", "labels", *TOKEN_TYPES):
            batch.pop(name, None)
        return ProcessedImages(token_runs, dict(batch))

    def load(self, refs: Sequence[ImageRef]) -> ProcessedImages:
        """Decode and process the images of one content."""
        return self.process(self.decode(refs))

    def decode(self, refs: Sequence[ImageRef]) -> list[Image.Image]:
        """Decode images, large JPEGs at a reduced size that the model cannot tell from the full one."""
        return [decode_image(ref, min_side=self.min_decode_side) for ref in refs]

    @cached_property
    def min_decode_side(self) -> int | None:
        """Pixels of a side that decoding has to keep: twice what the model reads of a large square; None for all."""
        # Crops, patches or a resized image: the model reads so many pixels of it, of three colors each.
        inputs = self.process([Image.new("RGB", (_PROBE_SIDE, _PROBE_SIDE))]).inputs
        pixels_read = inputs["pixel_values"].numel() // 3
        if pixels_read >= _PROBE_SIDE**2:
            return None
        return 2 * math.ceil(math.sqrt(pixels_read))

    def _call_processor(self, images: Sequence[Image.Image]) -> BatchFeature:
        """Call the processor on a prompt of images alone.

        Raises:
            RecordError: the family cannot read such an image.
        """
        # A special token between the placeholders keeps the runs apart, whatever the family writes into them.
        text = self.processor.tokenizer.eos_token.join([self.placeholder] * len(images))
        try:
            # Nested, because some families (LLaVA-OneVision) process several images of one prompt differently.
            return self.processor(text=[text], images=[list(images)], return_tensors="pt", add_special_tokens=False)
        except ValueError as error:  # Qwen: one side is more than 200 times as long as the other
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            name = type(self.processor).__name__
            raise RecordError(f"The {name} cannot read an image of {sizes} pixels: {error}.") from error

    def _split_runs(self, tokens: list[int]) -> list[list[int]]:
        """Split the tokens of a prompt of images into the run of each."""
        separator = self.processor.tokenizer.eos_token_id
        runs: list[list[int]] = [[]]
        for token in tokens:
            if token == separator:
                runs.append([])
            elif token == self.image_token_id or not self.image_tokens_only:
                runs[-1].append(token)
        return runs


class FastImages:
    """Process single images into bytes, and look up their token runs by their size.

    Args:
        family: the family's own way, which the first image of each size and several images together still take.
    """

    def __init__(self, family: FamilyImages) -> None:
        self.family = family
        self.image_token_id = family.image_token_id
        self._image_kwargs = {**_record_image_kwargs(family), **_BYTES_KWARGS}
        self._token_runs: dict[tuple[int, ...], list[list[int]]] = {}
        self._input_names: frozenset[str] = frozenset()

    def process(self, images: Sequence[Image.Image]) -> ProcessedImages:
        """Process the images of one content together, as the family does for one prompt."""
        # Several images together may be padded with values that are no byte's.
        if len(images) != 1:
            return self.family.process(images)
        return self.process_array(np.array(images[0]))

    def load(self, refs: Sequence[ImageRef]) -> ProcessedImages:
        """Decode and process the images of one content."""
        if len(refs) != 1:
            return self.family.load(refs)
        return self.process_array(decode_array(refs[0], min_side=self.family.min_decode_side))

    def decode(self, refs: Sequence[ImageRef]) -> list[Image.Image]:
        """Decode images as the family does."""
        return self.family.decode(refs)

    def process_array(self, pixels: UInt8[np.ndarray, "height width 3"]) -> ProcessedImages:
        """Process one image; its tokens depend on its size alone."""
        token_runs = self._token_runs.get(pixels.shape)
        if token_runs is None:
            return self._learn_size(pixels)
        inputs = self.image_inputs(pixels)
        return ProcessedImages(token_runs, {name: inputs[name] for name in self._input_names})

    def image_inputs(self, pixels: UInt8[np.ndarray, "height width 3"]) -> dict[str, Tensor]:
        """Call the family's image processor alone, without normalization."""
        inputs = self.family.processor.image_processor([[pixels]], **self._image_kwargs)
        return {**inputs, "pixel_values": inputs["pixel_values"].to(torch.uint8)}

    def _learn_size(self, pixels: UInt8[np.ndarray, "height width 3"]) -> ProcessedImages:
        """Process the first image of a size as the family does, and keep its token runs."""
        processed = self.family.process([Image.fromarray(pixels)])
        if len(self._token_runs) >= MAX_KNOWN_SIZES:
            self._token_runs.clear()
        self._token_runs[pixels.shape] = processed.token_runs
        self._input_names = frozenset(processed.inputs)
        return processed


def make_fast_images(family: FamilyImages) -> tuple[FamilyImages | FastImages, Normalization | None]:
    """Return the fast path and what normalizes its bytes, if it gives the same inputs for some images of noise.

    Otherwise return the family's own way, with its normalization if that has the usual form.
    """
    normalization = Normalization.from_processor(getattr(family.processor, "image_processor", None))
    if normalization is None:
        return family, None
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (height, width, 3), np.uint8) for width, height in _PROBE_SIZES]
    fast = FastImages(family)
    if all(_gives_same_inputs(fast, pixels, normalization) for pixels in noise):
        return fast, normalization
    return family, normalization


def _gives_same_inputs(
    fast: FastImages, pixels: UInt8[np.ndarray, "height width 3"], normalization: Normalization
) -> bool:
    """Compare both paths on one image: pixels within rounding, all other inputs exactly."""
    expected = fast.family.process([Image.fromarray(pixels)]).inputs
    inputs = fast.image_inputs(pixels)
    for name in expected.keys() - {"pixel_values"}:
        if name not in inputs or not torch.equal(inputs[name], expected[name]):
            return False
    return normalization.reproduces(expected["pixel_values"], inputs["pixel_values"])


def _record_image_kwargs(family: FamilyImages) -> dict[str, Any]:
    """Find the arguments that the family's processor gives its image processor."""
    recorder = _KwargsRecorder(family.processor.image_processor)
    processor = copy.copy(family.processor)
    processor.image_processor = recorder
    FamilyImages(processor, family.placeholder)  # it probes the processor with an image
    return recorder.kwargs


class _KwargsRecorder:
    """Stand before an image processor and record the keyword arguments of its calls."""

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor
        self.kwargs: dict[str, Any] = {}

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        self.kwargs.update(kwargs)
        return self.image_processor(images, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.image_processor, name)
