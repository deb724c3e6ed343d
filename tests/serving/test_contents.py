"""From the shapes of requests to contents, without a server."""

import base64

import pytest
from http_samples import BLUE, RED, data_uri, image_part, text_part, user

from cafe.errors import RecordError
from cafe.serving import contents, remote_images
from cafe.serving.config import RequestLimits, ServingConfig
from cafe.serving.contents import ContentReader
from cafe.serving.errors import ApiError
from cafe.serving.schemas import ChatMessage, Item

LIMITS = RequestLimits(max_images=2, max_request_images=3, max_image_bytes=1000)
CODED = base64.b64encode(RED).decode()


def reader(**config):
    """A reader of one request."""
    return ContentReader(ServingConfig(limits=LIMITS, **config))


def parts_of(content):
    """The texts and the bytes of a content."""
    return [part if isinstance(part, str) else part.source for part in content.parts]


@pytest.mark.parametrize(
    "uri",
    [
        data_uri(RED),
        f"data:image/png;charset=utf-8;base64,{CODED}",
        f"DATA:image/png;BASE64,{CODED}",
        f"data:;base64,{CODED}",
        f"data:image/svg+xml;base64,{CODED}",  # what it is called does not matter
    ],
)
def test_data_uris(uri):
    content = reader().read_input(Item(content=[{"type": "image_url", "image_url": {"url": uri, "detail": "low"}}]), "")
    assert parts_of(content) == [RED]


def test_an_image_has_the_limits_and_a_name():
    content = reader().read_input(Item(image=CODED, text="a"), "input.0")
    assert parts_of(content) == [RED, "a"]
    [image] = content.images
    assert image.name == "image 1"
    assert (image.limits.max_bytes, image.limits.max_pixels) == (LIMITS.max_image_bytes, LIMITS.max_image_pixels)


def test_a_chat_keeps_the_order_of_its_parts():
    messages = [
        ChatMessage(role="developer", content="be short"),
        ChatMessage(**user("before", RED, "between", BLUE)),
        ChatMessage(role="assistant", content=None),
    ]
    turns, refs = reader().read_chat(messages)
    assert [ref.source for ref in refs] == [RED, BLUE] and [ref.name for ref in refs] == ["image 1", "image 2"]
    assert turns[0] == {"role": "system", "content": [text_part("be short")]}
    assert turns[1]["content"] == [text_part("before"), {"type": "image"}, text_part("between"), {"type": "image"}]
    assert turns[2] == {"role": "assistant", "content": []}


def test_images_are_counted_in_an_input_in_a_chat_and_in_a_request():
    own = reader()
    with pytest.raises(ApiError, match="3 images, over the limit of 2"):
        own.read_input(Item(content=[image_part()] * 3), "input.0")
    own = reader()
    with pytest.raises(ApiError, match="3 images, over the limit of 2"):
        own.read_chat([ChatMessage(**user(RED)), ChatMessage(**user(RED, RED))])
    own = reader()
    for _ in range(3):
        own.read_input(Item(image=CODED), "input.0")
    with pytest.raises(ApiError, match="at most 3 images"):
        own.read_input(Item(image=CODED), "input.3")


def test_the_bytes_of_an_image_are_limited_before_and_after_decoding():
    for size in (1001, 10**6):
        with pytest.raises(ApiError, match="more than 1,000 bytes"):
            reader().read_input(Item(image=base64.b64encode(bytes(size)).decode()), "")
    assert len(parts_of(reader().read_input(Item(image=base64.b64encode(bytes(1000)).decode()), ""))[0]) == 1000


def test_images_are_downloaded_where_that_is_allowed(monkeypatch):
    asked = []

    def fetch(url, limits, rules):
        """Download one image, and no other."""
        asked.append(url)
        if "private" in url:
            raise RecordError("10.0.0.1 is private")
        return BLUE

    monkeypatch.setattr(remote_images, "fetch_image", fetch)
    with pytest.raises(ApiError, match="downloads nothing"):
        reader().read_input(Item(image="http://example.com/a.png"), "")
    assert not asked
    content = reader(allow_image_urls=True).read_input(Item(image="HTTPS://example.com/a.png"), "")
    assert parts_of(content) == [BLUE]
    with pytest.raises(ApiError, match="The image 1 cannot be downloaded"):
        reader(allow_image_urls=True).read_input(Item(image="http://private/a.png"), "")


def test_downloads_of_a_request_have_one_time_limit_together(monkeypatch):
    clock, timeouts = [0.0], []

    def fetch(url, limits, rules):
        """Take as long as is allowed, but for a second."""
        timeouts.append(rules.timeout)
        clock[0] += rules.timeout - 1
        return BLUE

    monkeypatch.setattr(remote_images, "fetch_image", fetch)
    monkeypatch.setattr(contents.time, "monotonic", lambda: clock[0])
    own = ContentReader(ServingConfig(allow_image_urls=True))
    for _ in range(4):
        own.read_input(Item(image="http://example.com/a.png"), "")
    assert timeouts == [10, 10, 2, 1]


@pytest.mark.parametrize("uri", ["data:" + "a" * 300_000, "data:a/" + ";a=b" * 100_000, "data:" + "/" * 300_000])
def test_a_long_address_that_is_no_image_is_refused_in_time(uri):
    # A pattern that tries all ways to read it would take hours, in which the server would answer nobody.
    with pytest.raises(ApiError, match="no data URI"):
        reader().read_input(Item(image=uri), "")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "/etc/passwd", "a.png", "data:text/plain,a", "gopher://a", ""])
def test_other_urls_are_refused_even_where_downloads_are_allowed(url):
    part = {"type": "image_url", "image_url": url}
    with pytest.raises(ApiError, match="no data URI"):
        reader(allow_image_urls=True).read_input(Item(content=[part]), "")
