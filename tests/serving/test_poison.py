"""Requests that ended or held up other servers are refused, say nothing of the inside, and spoil no other request."""

import asyncio
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from http_samples import Http
from samples import noise

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from serving_client import Connection, Response
from serving_faults import check_refusal
from serving_poison import Poison, bad_bodies, bad_fields, bad_images, foreign_addresses, placeholder_texts

CLOSED_PORT = 9
MAX_BYTES = 2**21  # of requests that are quick to send


def all_poison() -> Iterator[Poison]:
    """Yield the requests of the benchmark, without the largest."""
    buffer = io.BytesIO()
    noise(0, 60, 40).save(buffer, "JPEG")
    for poison in [*bad_images(buffer.getvalue()), *foreign_addresses(CLOSED_PORT), *bad_fields(), *bad_bodies()]:
        if len(poison.message) < MAX_BYTES:
            yield poison


@pytest.mark.parametrize("poison", all_poison(), ids=lambda poison: poison.name)
def test_poison_is_refused_and_a_good_request_answered_next(poison, url, served_model):
    async def ask() -> tuple[Response, Response]:
        """Send both over one connection."""
        address = urlsplit(url)
        async with Connection(str(address.hostname), int(address.port or 0)) as connection:
            good = Poison("", "/v1/embeddings", {"input": "a red circle"})
            return await connection.request(poison.message), await connection.request(good.message)

    refused, answered = asyncio.run(ask())
    assert check_refusal(poison, refused) == ""
    [expected] = served_model.embed(["a red circle"])
    vector = np.array(answered.json["data"][0]["embedding"], np.float32)
    assert vector @ expected >= 0.9999


def test_placeholder_tokens_in_a_text_are_words(http: Http, served_model):
    tokens = (*served_model.chat_processor.tokenizer.all_special_tokens, "<image>")
    for text in placeholder_texts(tokens):
        response = http.post("/v1/embeddings", {"input": text})
        [expected] = served_model.embed([text])
        assert np.array(response.json()["data"][0]["embedding"], np.float32) @ expected >= 0.9999
