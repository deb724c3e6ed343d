"""A running server of the tiny random model, and what talks to it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from http_samples import Http
from openai import OpenAI

from cafe.model import Cafe
from cafe.serving.config import RequestLimits, ServingConfig
from cafe.serving.server import running_server, running_services
from cafe.serving.services import Services

LIMITS = RequestLimits(max_body_bytes=2**20, max_image_bytes=2**18, max_image_pixels=10**6, body_timeout=5, timeout=60)
CONFIG = ServingConfig(port=0, limits=LIMITS)


@pytest.fixture(scope="session")
def served_model(random_base: Path) -> Cafe:
    """The tiny model, apart from the server's, which answers what the server should."""
    return Cafe.load(random_base)


@pytest.fixture(scope="session")
def services(random_base: Path) -> Iterator[Services]:
    """The parts of a server."""
    with running_services(CONFIG, Cafe.load(random_base)) as running:
        yield running


@pytest.fixture(scope="session")
def url(services: Services) -> Iterator[str]:
    """The address of a running server."""
    with running_server(services) as address:
        yield address


@pytest.fixture
def serve(services: Services) -> Iterator[Callable[..., Http]]:
    """A function that starts another server with the same model, and returns its client.

    Its keywords are other parts of the server, fields of the configuration and of the limits, and `engine_config`.
    """
    with ExitStack() as stack:

        def start(**changes: Any) -> Http:
            """Start a server."""
            parts, config, limits = (
                {name: changes[name] for name in (field.name for field in fields(kind)) if name in changes}
                for kind in (Services, ServingConfig, RequestLimits)
            )
            config["engine"] = changes.get("engine_config", CONFIG.engine)  # the engine is a part
            allowed = replace(CONFIG, **{**config, "limits": replace(LIMITS, **limits)})
            encoder = parts.pop("encoder", services.encoder)
            own = replace(services, config=allowed, encoder=replace(encoder, limits=allowed.limits), **parts)
            return Http(stack.enter_context(running_server(own)))

        yield start


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    """The real client, which does not try again."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


@pytest.fixture
def model_id(services: Services) -> str:
    """What clients call the model."""
    return services.model_id


@pytest.fixture
def http(url: str) -> Http:
    """A client of the running server."""
    return Http(url)
