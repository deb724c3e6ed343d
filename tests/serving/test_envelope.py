"""What surrounds an answer, without a server."""

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cafe.serving import envelope
from cafe.serving.envelope import Envelope
from cafe.serving.metrics import Metrics

SCOPE = {"type": "http", "method": "GET", "path": "/", "headers": []}


def answer_by(app, send_message=None, metrics=None):
    """The messages that an app's answer becomes."""
    sent = []

    async def send(message):
        """Note a message."""
        sent.append(message)
        if send_message:
            await send_message()

    async def receive():
        """Receive nothing."""
        await asyncio.Event().wait()

    asyncio.run(Envelope(app, metrics or Metrics())({**SCOPE}, receive, send))
    return sent


def count(metrics, status):
    """The requests that were answered with a status."""
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name == "cafe_requests_total" and sample.labels["status"] == status:
                return sample.value
    return 0


async def broken(scope, receive, send):
    """Fail before the answer."""
    raise RuntimeError("secret")


async def half(scope, receive, send):
    """Fail in the midst of the answer."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    raise RuntimeError("secret")


def test_an_app_that_fails_is_answered_for(caplog):
    start, body = answer_by(broken)
    assert start["status"] == 500 and b"secret" not in body["body"] and "secret" in caplog.text
    headers = dict(start["headers"])
    assert headers[b"x-request-id"].decode() in caplog.text and headers[b"x-content-type-options"] == b"nosniff"


def test_an_answer_that_has_begun_is_not_begun_again():
    assert [message["type"] for message in answer_by(half)] == ["http.response.start"]


def test_a_client_that_does_not_read_is_left(monkeypatch, caplog):
    monkeypatch.setattr(envelope, "SEND_SECONDS", 0.05)
    metrics = Metrics()
    sent = answer_by(half, asyncio.Event().wait, metrics)
    assert len(sent) == 1 and not caplog.records and count(metrics, "499") == 1


@pytest.mark.parametrize("sent", ["a" * 65, "", "a b", "\x1b[2J", "é"])
def test_an_id_that_is_not_safe_to_print_is_replaced(sent):
    assert envelope._choose_id(sent) != sent


def test_other_protocols_pass():
    kinds = []

    async def app(scope, receive, send):
        """Note what comes."""
        kinds.append(scope["type"])

    asyncio.run(Envelope(app, Metrics())({"type": "lifespan"}, None, None))
    assert kinds == ["lifespan"]
