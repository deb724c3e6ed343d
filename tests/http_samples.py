"""What tests send to a server."""

import base64
from typing import Any

from samples import png

RED = png("red")


def data_uri(data: bytes = RED) -> str:
    """Write an image as a data URI."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(data: bytes = RED) -> dict[str, Any]:
    """Return an image as a part of a turn."""
    return {"type": "image_url", "image_url": {"url": data_uri(data)}}


def text_part(text: str) -> dict[str, Any]:
    """Return a text as a part of a turn."""
    return {"type": "text", "text": text}


def user(*content: Any) -> dict[str, Any]:
    """Return a turn of a user: strings are texts, and bytes images."""
    return {
        "role": "user",
        "content": [image_part(each) if isinstance(each, bytes) else text_part(each) for each in content],
    }
