"""Requests that ended or held up other servers, and the statuses that they are answered with here.

Each is a whole request. What needs more than one, such as a body without end, is in `serving_faults.py`.
"""

import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

from serving_client import encode_request
from serving_work import chat_body, data_uri, embedding_body

BOMB_SIDE = 60_000  # pixels, which would take 10 GB


@dataclass(frozen=True)
class Poison:
    """Hold a request that is not to be answered as a good one is.

    Attributes:
        name: what is wrong with it.
        path: the route.
        body: of the request.
        statuses: any of which is right.
        code: of the error; empty for any.
        headers: that are added to the request.
    """

    name: str
    path: str
    body: Any
    statuses: tuple[int, ...] = (400,)
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def message(self) -> bytes:
        """Return the bytes of the request."""
        return encode_request(self.path, self.body, self.headers)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = b"") -> bytes:
    """Make a PNG file that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(pixels)), (b"IEND", b"")]
    packed = b""
    for kind, data in parts:
        packed += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + packed


def with_embedding(name: str, uri: str, *statuses: int, code: str = "") -> Poison:
    """Make a request to embed what an address names."""
    body = {"input": [{"image": uri}]}
    return Poison(name, "/v1/embeddings", body, statuses or (400,), code)


def with_chat(name: str, uri: str, *statuses: int, code: str = "") -> Poison:
    """Make a chat about what an address names."""
    body = chat_body([], "Describe the image.")
    body["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": uri}})
    return Poison(name, "/v1/chat/completions", body, statuses or (400,), code)


def bad_images(image: bytes) -> list[Poison]:
    """Return requests with images that cannot or must not be decoded; `image` is a good JPEG."""
    failed = "image_decode_failed"
    bomb, small = png(BOMB_SIDE, BOMB_SIDE), png(1, 1, pixels=b"\0\0")
    text_bomb = png(8, 8, (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**27))), pixels=bytes(9 * 8))
    return [
        with_embedding("a truncated image", data_uri(image[: len(image) // 2]), code=failed),
        with_embedding("bytes that are no image", data_uri(b"not an image" * 50), code=failed),
        with_embedding("an image of no bytes", data_uri(b"")),
        with_embedding("base64 that is none", "data:image/png;base64,@@@@"),
        with_embedding("a data URI without data", "data:image/png"),
        with_embedding("an image of 60,000 x 60,000 pixels", data_uri(bomb, "png"), 400, 413),
        with_chat("a chat with that image", data_uri(bomb, "png"), 400, 413),
        with_embedding("a GIF of 65,535 x 65,535 pixels", data_uri(gif_bomb(), "gif"), 400, 413),
        with_embedding("a text of 128 MB in an image", data_uri(text_bomb, "png"), 200, 400),
        with_embedding("an image of one pixel", data_uri(small, "png"), 200, 400),
        with_embedding("an image of 0 x 0 pixels", data_uri(png(0, 0), "png"), code=failed),
        with_embedding("an SVG", data_uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), code=failed),
        with_embedding("PostScript", data_uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), code=failed),
    ]


def gif_bomb() -> bytes:
    """Make a GIF file that says it has 65,535 x 65,535 pixels."""
    screen = struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    frame = b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00"
    return b"GIF89a" + screen + frame + b";"


def foreign_addresses(port: int) -> list[Poison]:
    """Return requests that name files and addresses; a port on loopback is that of a listener nobody may reach."""
    addresses = (
        f"http://127.0.0.1:{port}/a.png",
        f"http://localhost:{port}/a.png",
        f"http://[::ffff:127.0.0.1]:{port}/a.png",
        f"http://2130706433:{port}/a.png",  # 127.0.0.1 as a number
        f"http://example.org\\@127.0.0.1:{port}/a.png",  # which parsers read differently
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://127.0.0.1/a.png",
    )
    embeddings = [with_embedding(f"an image at {address}", address, 400, 403) for address in addresses]
    return [*embeddings, *(with_chat(f"a chat about {address}", address, 400, 403) for address in addresses)]


def bad_fields() -> list[Poison]:
    """Return requests whose fields are wrong, missing, too large or too many."""
    chat, embedding = chat_body([], "Hello"), embedding_body(["Hello"])
    path, chats = "/v1/embeddings", "/v1/chat/completions"
    wrong = (400, 422)
    turn = chat["messages"][0]
    return [
        Poison("a field that is unknown", chats, chat | {"tools_of_mine": 1}, wrong),
        Poison("a field that is unknown, to embed", path, embedding | {"inputs": "a"}, wrong),
        Poison("a model that is unknown", path, embedding | {"model": "another"}, (404,), "model_not_found"),
        Poison("no input", path, {}, wrong),
        Poison("an empty list of inputs", path, embedding | {"input": []}, wrong),
        Poison("inputs of the wrong type", path, embedding | {"input": [{"image": 1}]}, wrong),
        Poison("too many inputs", path, embedding | {"input": ["a"] * 100_000}, (400, 413, 422)),
        Poison("inputs of which each is wrong", path, embedding | {"input": [1.5] * 100_000}, wrong),
        Poison("a thousand unknown fields", path, embedding | {f"field_{n}": n for n in range(1000)}, wrong),
        with_embedding("an address of a megabyte", "data:" + "a" * 10**6),
        Poison("turns without words", chats, chat | {"messages": [turn | {"content": ""}] * 10_000}),
        Poison("dimensions below one", path, embedding | {"dimensions": -1}, wrong),
        Poison("too many dimensions", path, embedding | {"dimensions": 10**6}, wrong),
        Poison("too long a text", path, embedding | {"input": "circle " * 10**5}, code="context_length_exceeded"),
        Poison("too long a text without a space", path, embedding | {"input": "a" * 10**6}, (400,)),
        Poison("too long a chat", chats, chat_body([], "circle " * 10**5), code="context_length_exceeded"),
        Poison("too many new tokens", chats, chat | {"max_tokens": 10**9}, wrong),
        Poison("no new tokens", chats, chat | {"max_tokens": 0}, wrong),
        Poison("a temperature below zero", chats, chat | {"temperature": -1}, wrong),
        Poison("a temperature that is no number", chats, _with_raw(chat, "temperature", b"NaN"), wrong),
        Poison("a temperature beyond any number", chats, _with_raw(chat, "temperature", b"1e999"), wrong),
        Poison("a seed of a thousand digits", chats, _with_raw(chat, "seed", b"9" * 1000), wrong),
        Poison("too many stop texts", chats, chat | {"stop": ["a"] * 1000}, wrong),
        Poison("no messages", chats, chat | {"messages": []}, wrong),
        Poison("a role that is unknown", chats, chat | {"messages": [turn | {"role": "root"}]}, wrong),
        Poison("too many images", chats, chat_body([png(8, 8, pixels=bytes(72))] * 9, "What is it?"), (400, 413, 422)),
        Poison("many answers to one chat", chats, chat | {"n": 10**6}, wrong),
    ]


def bad_bodies() -> list[Poison]:
    """Return requests whose bodies or headers are not what they should be."""
    path, good = "/v1/embeddings", embedding_body(["Hello"])
    boundary = {"Content-Type": "multipart/form-data; boundary=a"}
    parts = b"--a\r\nContent-Disposition: form-data; name=b\r\n" + b"x" * 10**6
    return [
        Poison("JSON that is none", path, b'{"input": ', (400, 422)),
        Poison("JSON that is a number", path, b"1", (400, 422)),
        Poison("JSON nested a hundred thousand times", path, b"[" * 10**5, (400, 422)),
        Poison("a body that is not UTF-8", path, b'{"input": "\xff\xfe"}', (400, 422)),
        Poison("half a character", path, b'{"input": "\\ud800"}', (200, 400, 422)),
        Poison("a multipart body", path, parts, (400, 415, 422), headers=boundary),
        Poison("a host of others", path, good, (400, 403, 421), headers={"Host": "attacker.example"}),
        Poison("a page of others", path, good, (403,), headers={"Origin": "http://attacker.example"}),
        Poison("a body of 48 MiB", path, json.dumps(good | {"input": "a" * 48 * 2**20}).encode(), (413,)),
        Poison("an image of 21 MiB", path, embedding_body([b"\xff\xd8\xff" + bytes(21 * 2**20)]), (400, 413)),
    ]


def placeholder_texts(tokens: tuple[str, ...]) -> list[str]:
    """Return texts that hold a model's placeholder tokens, which are words here as any others."""
    return [f"a red circle {token} and a blue square" for token in tokens] + [tokens[0] * 50]


def cheap_poison(image: bytes) -> list[Poison]:
    """Return what a load can be sprinkled with: small requests that are refused."""
    refused = [*bad_images(image), *bad_fields()]
    return [poison for poison in refused if 200 not in poison.statuses and len(poison.message) < 2**18]


def _with_raw(body: dict[str, Any], name: str, value: bytes) -> bytes:
    """Return a body as JSON with a field whose value Python's JSON would not write."""
    return json.dumps({key: other for key, other in body.items() if key != name})[:-1].encode() + b', "%s": %s}' % (
        name.encode(),
        value,
    )
