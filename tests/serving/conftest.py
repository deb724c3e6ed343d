"""A running server of the tiny random model, and what talks to it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
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
def serve(services: Services) -> Iterator[Callable[..., str]]:
    """A function that starts another server with the same model and returns its address.

    Its keywords are fields of the configuration, or of the limits.
    """
    with ExitStack() as stack:

        def start(**changes: object) -> str:
            """Start a server."""
            of_limits = {name: value for name, value in changes.items() if hasattr(LIMITS, name)}
            of_config = {name: value for name, value in changes.items() if name not in of_limits}
            config = replace(CONFIG, limits=replace(LIMITS, **of_limits), **of_config)
            encoder = replace(services.encoder, limits=config.limits)
            return stack.enter_context(running_server(replace(services, config=config, encoder=encoder)))

        yield start


@pytest.fixture
def client(url: str) -> Iterator[OpenAI]:
    """The real client, which does not try again."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


class Http:
    """A client for requests that the real one would not send."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **options: Any) -> requests.Response:
        """Send a GET request."""
        return requests.get(self.url + path, timeout=60, **options)

    def post(self, path: str, json: Any = None, **options: Any) -> requests.Response:
        """Send a POST request."""
        return requests.post(self.url + path, json=json, timeout=60, **options)


@pytest.fixture
def http(url: str) -> Http:
    """A client of the running server."""
    return Http(url)
