"""From the shapes that requests have to contents and chats. Images are bytes that came along, never files."""

import base64
import binascii
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cafe.content import Content, ImageLimits, ImageRef
from cafe.content import Part as ContentPart
from cafe.errors import RecordError
from cafe.lvlm.prompts import Message
from cafe.serving.config import ServingConfig
from cafe.serving.errors import ApiError
from cafe.serving.schemas import ChatMessage, ChatPart, Input, Item

DOWNLOAD_SECONDS = 20.0  # for all images of a request together, each of which holds a thread meanwhile

# Parameters may stand before the base64. What the image is called does not matter: its bytes say what it is. There is
# one way alone to read any text, so that the time does not grow with the square of its length.
_DATA_URI = re.compile(r"data:[\w.+-]*(?:/[\w.+-]*)?(?:;[\w.+-]+=[\w.+-]+)*;base64,", re.IGNORECASE)
_URL = re.compile(r"https?://", re.IGNORECASE)
# Some encoders break base64 into lines.
_WHITESPACE = str.maketrans("", "", " \t\r\n")


@dataclass
class ContentReader:
    """Read the contents of one request, whose images it counts.

    Attributes:
        config: what is allowed.
        num_images: the images of the request so far.
        download_seconds: those left to download images.
    """

    config: ServingConfig
    num_images: int = 0
    download_seconds: float = DOWNLOAD_SECONDS

    def read_input(self, value: Input, where: str) -> Content:
        """Read an input: a text, or an item of Jina's or vLLM's.

        Args:
            value: the input.
            where: what it is called in messages, such as "input.3".

        Raises:
            ApiError: an image or a field of it cannot be used.
        """
        if isinstance(value, str):
            return Content((value,))
        # Both shapes are one schema, so that errors name fields and not shapes.
        if value.content is not None:
            if value.text is not None or value.image is not None:
                raise ApiError(400, "invalid_value", "An item has either content, or text and image.", where)
            return self._read_parts(value.content, where)
        return self._read_item(value, where)

    def read_conversation(self, messages: Sequence[ChatMessage], where: str) -> Content:
        """Read a conversation that is to be embedded: the turns of a user.

        Raises:
            ApiError: it has other turns, or an image of it cannot be used.
        """
        self._check_length(messages, where)
        parts: list[ContentPart] = []
        for message in messages:
            # A closing turn of the assistant without words asks other servers for what the model does by itself.
            if message.role == "assistant" and not message.content:
                continue
            if message.role != "user":
                text = f"A conversation to embed has turns of the user alone, not of the {message.role}."
                raise ApiError(400, "unsupported_value", f"{text} The model has an instruction of its own.", where)
            parts += self._read_content(message.content, where).parts
        self._check_count(sum(not isinstance(part, str) for part in parts), where)
        return Content(tuple(parts))

    def read_chat(self, messages: Sequence[ChatMessage]) -> tuple[list[Message], list[ImageRef]]:
        """Read a chat that is to be answered: the turns as templates take them, and the images of all of them.

        Raises:
            ApiError: an image or a part of it cannot be used.
        """
        self._check_length(messages, "messages")
        # Templates write placeholders for images, which come in the same order beside the turns.
        turns: list[Message] = []
        refs: list[ImageRef] = []
        for number, message in enumerate(messages):
            content = self._read_content(message.content, f"messages.{number}")
            refs += content.images
            role = "system" if message.role == "developer" else message.role
            turns.append(chat_turn(role, content))
        self._check_count(len(refs), "messages")
        return turns, refs

    def _read_content(self, content: str | Sequence[ChatPart] | None, where: str) -> Content:
        """Read what a turn holds."""
        if content is None or isinstance(content, str):
            return Content((content,) if content else ())
        return self._read_parts(content, where)

    def _read_parts(self, parts: Sequence[ChatPart], where: str) -> Content:
        """Read the parts of a turn, in their order."""
        self._check_length(parts, where)
        read: list[ContentPart] = []
        for part in parts:
            match part.type:
                case "text" if part.text is not None and part.image_url is None:
                    read.append(part.text)
                case "image_url" if part.image_url is not None and part.text is None:
                    url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
                    read.append(self._read_image(url, where, allow_base64=False))
                case "text" | "image_url":
                    raise ApiError(400, "invalid_value", f"A part of type {part.type} has a field {part.type}.", where)
                case _:
                    raise ApiError(400, "unsupported_value", "A part is of type text or image_url.", where)
        content = Content(tuple(read))
        self._check_count(len(content.images), where)
        return content

    def _read_item(self, item: Item, where: str) -> Content:
        """Read an item of Jina's: an image, a text, or the image and then the text."""
        parts: list[ContentPart] = []
        if item.image is not None:
            parts.append(self._read_image(item.image, where, allow_base64=True))
        if item.text is not None:
            parts.append(item.text)
        if not parts:
            raise ApiError(400, "invalid_value", "An item has a text, an image, or both.", where)
        return Content(tuple(parts))

    def _check_length(self, values: Sequence[ChatMessage] | Sequence[ChatPart], where: str) -> None:
        """Refuse more turns or parts than tokens are allowed: without words, no other limit would count them."""
        most = self.config.limits.max_input_tokens
        if len(values) > most:
            message = f"There are {len(values):,} turns or parts, over the limit of {most:,}."
            raise ApiError(400, "context_length_exceeded", message, where)

    def _check_count(self, num_images: int, where: str) -> None:
        """Refuse a content with too many images."""
        most = self.config.limits.max_images
        if num_images > most:
            raise ApiError(400, "too_many_images", f"There are {num_images} images, over the limit of {most}.", where)

    def _read_image(self, value: str, where: str, allow_base64: bool) -> ImageRef:
        """Read an image: a data URI, or a URL where these are allowed, or base64 as it is."""
        limits = self.config.limits
        # Counted here, where all shapes of requests come together.
        self.num_images += 1
        if self.num_images > limits.max_request_images:
            message = f"A request has at most {limits.max_request_images} images."
            raise ApiError(400, "too_many_images", message, where)
        name = f"image {self.num_images}"
        # The limits of pixels are checked in the header, in the process that decodes the image.
        image_limits = ImageLimits(limits.max_image_bytes, limits.max_image_pixels)
        prefix = _DATA_URI.match(value)
        if prefix:
            data = _decode_base64(value[prefix.end() :], limits.max_image_bytes, name, where)
        elif _URL.match(value):
            data = self._download(value, name, where)
        # Base64 has no colon, and URLs have one soon.
        elif allow_base64 and ":" not in value[:16]:
            data = _decode_base64(value, limits.max_image_bytes, name, where)
        else:
            message = f"The {name} is no data URI with base64, such as data:image/png;base64,..."
            raise ApiError(400, "image_url_not_allowed", message, where)
        return ImageRef(data, image_limits, name)

    def _download(self, url: str, name: str, where: str) -> bytes:
        """Download an image, where that is allowed."""
        if not self.config.allow_image_urls:
            message = f"The {name} is a URL, from which this server downloads nothing: send a data URI with base64."
            raise ApiError(400, "image_url_not_allowed", message, where)
        # A server that downloads nothing does not even have what could.
        from cafe.serving.remote_images import FetchRules, fetch_image

        started, rules = time.monotonic(), FetchRules()
        rules = replace(rules, timeout=min(rules.timeout, self.download_seconds))
        try:
            return fetch_image(url, self.config.limits, rules)
        except RecordError:  # its text may tell what is in the server's network
            raise ApiError(400, "image_download_failed", f"The {name} cannot be downloaded.", where) from None
        finally:
            self.download_seconds -= time.monotonic() - started


def chat_turn(role: str, content: Content) -> Message:
    """Return a turn as templates take it."""
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in content.parts]
    return {"role": role, "content": parts}


def _decode_base64(text: str, max_bytes: int, name: str, where: str) -> bytes:
    """Decode the base64 of an image, if it is not too large.

    Raises:
        ApiError: it is too large, empty or no base64.
    """
    too_large = ApiError(400, "image_too_large", f"The {name} has more than {max_bytes:,} bytes.", where)
    if len(text) * 3 // 4 > 2 * max_bytes:  # white space included
        raise too_large
    try:
        data = base64.b64decode(text.translate(_WHITESPACE), validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "image_decode_failed", f"The {name} is no valid base64.", where) from None
    if len(data) > max_bytes:
        raise too_large
    if not data:
        raise ApiError(400, "image_decode_failed", f"The {name} is empty.", where)
    return data
