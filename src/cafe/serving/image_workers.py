"""Processes that decode and process images, so that no image can end the server or hold up the model."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from cafe.content import ImageRef
from cafe.lvlm.images import ProcessedImages
from cafe.lvlm.processing import ChatProcessor


class ImageWorkers:
    """Read images in processes of their own. It has the methods of `FamilyImages`. (A first version: in this one.)"""

    def __init__(self, chat_processor: ChatProcessor) -> None:
        self.chat_processor = chat_processor

    def load(self, refs: Sequence[ImageRef]) -> ProcessedImages:
        """Decode and process the images of one content."""
        return self.chat_processor.images.load(refs)

    def process(self, images: Sequence[Image.Image]) -> ProcessedImages:
        """Process decoded images of one content."""
        return self.chat_processor.images.process(images)

    def decode(self, refs: Sequence[ImageRef]) -> list[Image.Image]:
        """Decode images."""
        return self.chat_processor.images.decode(refs)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of a module with the chat processor and these arguments in a worker, and wait for it."""
        return function(self.chat_processor, *args)

    def close(self) -> None:
        """End the processes."""
