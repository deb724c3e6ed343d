"""What a server allows, and how much of it."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Limit what one request may ask for.

    Attributes:
        max_body_bytes: of the request's body.
        max_image_bytes: of an encoded image.
        max_image_pixels: of an image, checked in its header before it is decoded.
        max_images: in one chat or one input of an embeddings request.
        max_request_images: in all inputs of a request together.
        max_inputs: inputs of an embeddings request, or documents to rank.
        max_input_tokens: tokens of a prompt or an input, image tokens included.
        max_new_tokens: tokens of an answer.
        max_stop: stop sequences of a chat.
        max_stop_characters: of a stop sequence, each beginning of which is looked for at the end of the answer.
        timeout: seconds until a request that is not done is answered with status 504.
        body_timeout: seconds that a client may take to send its body.
    """

    max_body_bytes: int = 32 * 2**20
    max_image_bytes: int = 20 * 2**20
    max_image_pixels: int = 50_000_000
    max_images: int = 8
    max_request_images: int = 32
    max_inputs: int = 256
    max_input_tokens: int = 8192
    max_new_tokens: int = 4096
    max_stop: int = 4
    max_stop_characters: int = 256
    timeout: float = 120.0
    body_timeout: float = 30.0


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Configure how the model is shared by requests.

    Attributes:
        step_tokens: the most tokens of waiting jobs that are read in one step; a longer job is read alone.
        max_chats: chats that are decoded together.
        max_chat_tokens: tokens of all running chats, each as long as the longest may become; by default as many as fit
            into half of the memory that is free at the start.
        max_waiting: jobs that may wait for the model.
        cache_bytes: memory for what images became: pixels, features of the vision tower, prefixes; each a third.
    """

    step_tokens: int = 4096
    max_chats: int = 32
    max_chat_tokens: int | None = None
    max_waiting: int = 512
    cache_bytes: int = 192 * 2**20


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """Configure a server.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        api_key: what clients send as a bearer token; empty for none, which is allowed on loopback alone.
        allowed_hosts: further names that the `Host` and `Origin` headers of a request may have.
        allow_image_urls: whether images are downloaded from addresses that requests name.
        image_workers: processes that decode and process images.
        limits: of one request.
        engine: how the model is shared.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = field(default="", repr=False)
    allowed_hosts: tuple[str, ...] = ()
    allow_image_urls: bool = False
    image_workers: int = 1
    limits: RequestLimits = RequestLimits()
    engine: EngineConfig = EngineConfig()
