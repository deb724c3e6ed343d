"""The command serve: embeddings, chat and search over HTTP."""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from cafe.cli.options import PATH, POSITIVE
from cafe.errors import CafeError, MissingPackageError

KEY_VARIABLE = "CAFE_API_KEY"
PORT = click.IntRange(0, 65535)
SECONDS = click.FloatRange(min=0, min_open=True)


@click.command("serve")
@click.option("--model", metavar="CHECKPOINT", show_default="the collection's", help="A run, a directory or a Hub id.")
@click.option("--collection", metavar="NAME|DIRECTORY", help="What can be searched; a directory has a slash in it.")
@click.option("--host", default="127.0.0.1", help="Address to listen on. Any but this machine's own needs a key.")
@click.option("--port", type=PORT, default=8000, help="Port to listen on; 0 takes a free one.")
@click.option("--api-key-file", type=PATH, metavar="FILE", help=f"What clients must send; or set {KEY_VARIABLE}.")
@click.option("--allowed-host", multiple=True, metavar="NAME", help="A further name that clients call the server by.")
@click.option("--allow-image-urls", is_flag=True, help="Download images from public addresses in requests.")
@click.option("--image-workers", type=POSITIVE, default=1, help="Processes that decode images.")
@click.option("--max-chats", type=POSITIVE, default=32, help="Chats that are answered together.")
@click.option("--max-waiting", type=POSITIVE, default=512, help="Inputs and chats that may wait.")
@click.option("--cache-size", type=POSITIVE, default=192, metavar="MIB", help="Memory for images read lately.")
@click.option("--max-input-tokens", type=POSITIVE, default=8192, help="Tokens of an input, images included.")
@click.option("--max-new-tokens", type=POSITIVE, default=4096, help="Tokens of an answer.")
@click.option("--timeout", type=SECONDS, default=120.0, help="Seconds until a request is given up.")
def serve_command(
    model: str | None,
    collection: str | None,
    host: str,
    port: int,
    api_key_file: Path | None,
    allowed_host: tuple[str, ...],
    allow_image_urls: bool,
    image_workers: int,
    cache_size: int,
    **options: Any,
) -> None:
    """Serve embeddings and chat by OpenAI's API, and a page to search a collection.

    One process and one copy of the weights do all of it. The server is reached from this machine alone, unless it has a
    key. It ends by Ctrl-C or SIGTERM, once it has answered what it took; a second signal ends it at once.
    """
    # Not by catching the import error of the server, which another missing module would raise too.
    if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client")):
        raise MissingPackageError("Serving needs more packages: pip install 'cafe-lvlm[serve]'.")
    from cafe.serving.config import EngineConfig, RequestLimits, ServingConfig
    from cafe.serving.server import serve

    limits = RequestLimits()
    limits = replace(limits, **{name: options.pop(name) for name in ("max_input_tokens", "max_new_tokens", "timeout")})
    config = ServingConfig(
        host=host,
        port=port,
        api_key=_read_key(api_key_file),
        allowed_hosts=allowed_host,
        allow_image_urls=allow_image_urls,
        image_workers=image_workers,
        limits=limits,
        engine=EngineConfig(cache_bytes=cache_size * 2**20, **options),
    )
    serve(config, model, collection)


def _read_key(file: Path | None) -> str:
    """Read the key from a file or from the environment; empty for none.

    Raises:
        CafeError: there is something wrong with it.
    """
    try:
        key = os.environ.get(KEY_VARIABLE, "") if file is None else file.read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise CafeError(f"The key in {file} has other characters than ASCII's.") from None
    key = key.strip()
    if file is not None and not key:
        raise CafeError(f"The file {file} has no key in it.")
    # A header could not hold others.
    if not key.isascii() or any(not character.isprintable() or character == " " for character in key):
        raise CafeError("The key has spaces, control characters or characters other than ASCII's.")
    return key
