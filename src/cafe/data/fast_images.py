"""Pictures for training, by a shorter way: as bytes, and without a text to count their tokens where these are known.

A family's own processor normalizes each picture, and writes and tokenizes hundreds of image tokens for it. For training
the first is left to the device, and the second is done once for each size of picture.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from cafe.content import ImageRef
from cafe.images.decoding import decode_array
from cafe.images.normalization import Normalization
from cafe.lvlm.processing import ChatProcessor, ProcessedImages

# A picture comes as an array in RGB. That its colours are last is said, because a low one could be taken for another.
_RAW = {"do_convert_rgb": False, "input_data_format": "channels_last", "do_rescale": False, "do_normalize": False}
KNOWN_SIZES = 512  # whose token runs are kept, of thousands of numbers each
_SIZES = ((97, 61), (61, 97), (300, 180), (64, 64))  # (width, height) of the pictures that both ways are tried on


def with_fast_images(chat_processor: ChatProcessor) -> tuple[ChatProcessor, Normalization | None]:
    """Processing that makes the same of contents, pictures as bytes where it can, and what normalizes these.

    The short way is only gone where it made the same of some pictures of noise.
    """
    normalization = Normalization.from_processor(getattr(chat_processor.processor, "image_processor", None))
    if normalization is None:
        return chat_processor, None
    draw = np.random.default_rng(0)
    noise = [Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)) for width, height in _SIZES]
    short = FastImageProcessor(chat_processor, captured_kwargs(chat_processor, noise[0]))
    for image in noise:
        whole, made = chat_processor.process_images([image]).inputs, short.image_inputs(np.array(image))
        same = all(name in made and torch.equal(made[name], whole[name]) for name in whole if name != "pixel_values")
        if not same or not normalization.reproduces(whole["pixel_values"], made["pixel_values"]):
            return chat_processor, normalization
    return short, normalization


class FastImageProcessor(ChatProcessor):
    def __init__(self, chat_processor: ChatProcessor, options: dict[str, Any]) -> None:
        self.__dict__.update(chat_processor.__dict__)
        self.options = options | _RAW
        self.known: dict[tuple[int, ...], list[list[int]]] = {}  # token runs, which depend on a picture's size alone
        self.names: frozenset[str] = frozenset()

    def load_images(self, refs: Sequence[ImageRef]) -> ProcessedImages:
        # Several pictures together may be filled up with values that no byte becomes.
        return (
            self.process_array(decode_array(refs[0], enough=self.min_decode_side))
            if len(refs) == 1
            else super().load_images(refs)
        )

    def process_array(self, pixels: UInt8[np.ndarray, "height width 3"]) -> ProcessedImages:
        """A picture alone; the first of a size goes the family's own way."""
        if pixels.shape not in self.known:
            whole = self.process_images([Image.fromarray(pixels)])
            if len(self.known) >= KNOWN_SIZES:
                self.known.clear()
            self.known[pixels.shape], self.names = whole.token_runs, frozenset(whole.inputs)
            return whole
        made = self.image_inputs(pixels)
        return ProcessedImages(self.known[pixels.shape], {name: made[name] for name in self.names})

    def image_inputs(self, pixels: UInt8[np.ndarray, "height width 3"]) -> dict[str, Tensor]:
        """What the family's image processor makes of a picture, in bytes, and all else that it says of it."""
        made = self.processor.image_processor([[pixels]], **self.options)
        return {**made, "pixel_values": made["pixel_values"].to(torch.uint8)}


def captured_kwargs(chat_processor: ChatProcessor, image: Image.Image) -> dict[str, Any]:
    """The options with which a family's processor calls its image processor."""
    images = chat_processor.processor.image_processor
    preprocess, asked = images.preprocess, dict[str, Any]()

    def listen(given: Any, **options: Any) -> Any:
        asked.update(options)
        return preprocess(given, **options)

    images.preprocess = listen
    try:
        chat_processor.process_images([image])
    finally:
        del images.preprocess
    return asked
