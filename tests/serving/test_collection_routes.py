"""The routes of a collection, by HTTP, beside what the collection itself says."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from collection_samples import write_pdf
from gallery_samples import COLORS, CONFIG, SCRIPT_NAME, gallery_services
from PIL import Image

from cafe.content import Content
from cafe.index.asking import NOTHING_FOUND, ask
from cafe.index.collection import Collection
from cafe.index.query import Query, Term
from cafe.model import Cafe
from cafe.serving.server import running_server, running_services

OK, NOT_MODIFIED, BAD_REQUEST, NOT_FOUND, GONE, INVALID = 200, 304, 400, 404, 410, 422


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def services(directory, random_base):
    with gallery_services(directory, random_base) as running:
        yield running


@pytest.fixture(scope="module")
def url(services):
    with running_server(services) as address:
        yield address


@pytest.fixture(scope="module")
def collection(services, directory, random_base):
    """The same collection, searched without the server."""
    return Collection.open(directory / "gallery", Cafe.load(random_base))


@pytest.fixture
def post(url, directory):
    def send(path, status=OK, **body):
        """Send a request, whose answer may not tell where the images are."""
        response = requests.post(url + path, json=body, timeout=60)
        assert response.status_code == status, response.text
        assert str(directory) not in response.text and "gallery/" not in response.text
        return response

    return send


@pytest.fixture
def search(post):
    return lambda **body: post("/search", **body).json()["results"]


def names(results):
    return [result["name"] for result in results]


def events(response):
    """The events of a stream."""
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n") if line]


def answer_of(response):
    """The sources and the text of an answer, in the order of its events."""
    first, *pieces, last = events(response)
    assert set(first) == {"sources"} and last["done"] in ("stop", "length")
    return first["sources"], "".join(piece["text"] for piece in pieces)


def data_uri(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def assert_equal(results, hits):
    """Compare what was sent with hits."""
    assert names(results) == [Path(hit.path).name for hit in hits]
    assert [result["score"] for result in results] == pytest.approx([hit.score for hit in hits], abs=1e-3)
    for result, hit in zip(results, hits, strict=True):
        assert (result["width"], result["height"]) == (hit.width, hit.height)
        assert result["taken_at"] == hit.taken_at.isoformat()
        assert result["folder"] == Path(hit.path).parent.name


def test_words_find_what_the_collection_finds(search, collection):
    assert_equal(search(query="a red square", k=3), collection.search("a red square", 3))


def test_an_image_finds_what_the_collection_finds(search, collection):
    image = Image.new("RGB", (50, 40), "orange")
    assert_equal(search(image=data_uri(image)), collection.search(image))


def test_words_and_an_image_are_added_and_what_is_not_wanted_taken_away(search, collection):
    image = Image.new("RGB", (50, 40), "orange")
    terms = [Term(Content.of("at night")), Term(Content.of(image)), Term(Content.of("people"), -0.5)]
    found = search(query="at night", image=data_uri(image), exclude="people")
    assert_equal(found, collection.search(Query(tuple(terms))))


def test_more_like_an_image_finds_it_first(search, directory, collection):
    [red] = [result for result in search() if result["name"] == "red.png"]
    path = directory / "photos" / "town" / "red.png"
    found = search(like=red["id"])
    assert found[0]["id"] == red["id"]
    assert_equal(found, collection.search(path))


@pytest.mark.parametrize(
    "filters",
    [
        {"after": "2024-02"},
        {"before": "2024"},
        {"folder": "BEA"},
        {"min_width": 200, "min_height": 100},
        {"min_score": 0.99},
        {"sort": "newest"},
        {"sort": "name"},
        {"where": ["license=cc-by"]},
    ],
    ids=str,
)
def test_filters_are_the_collections(search, collection, filters):
    assert_equal(search(query="a square", **filters), collection.search("a square", 60, **filters))


def test_without_a_query_the_latest_come_first(search):
    newest = [SCRIPT_NAME, *(f"{name}.png" for name in reversed(COLORS))]
    assert names(search()) == newest
    assert names(search(k=2)) == newest[:2]
    assert names(search(sort="oldest", k=2)) == newest[:-3:-1]
    assert names(search(folder="town")) == ["blue.png", "red.png"]
    assert all(result["score"] is None for result in search())


def test_the_folders_above_are_none_of_the_clients_business(search, directory):
    assert search(query="a square", folder=directory.name) == []
    assert search(folder=directory.name) == []


@pytest.mark.parametrize("folder", ["/", "..", "~", "./town", "C:\\photos"])
def test_a_folder_is_no_path(post, folder):
    post("/search", BAD_REQUEST, query="a square", folder=folder)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (BAD_REQUEST, {"query": "x", "after": "yesterday"}),
        (BAD_REQUEST, {"query": "x", "where": ["license"]}),
        (BAD_REQUEST, {"image": "/etc/passwd"}),
        (BAD_REQUEST, {"image": "data:image/png;base64,AAAA"}),
        (BAD_REQUEST, {"image": "https://example.com/a.png"}),
        (BAD_REQUEST, {"query": "x", "folders": "y"}),
        (NOT_FOUND, {"like": "../photos/town/red.png"}),
        (INVALID, {"query": "x", "k": 0}),
        (INVALID, {"query": "x", "k": 10_000}),
        (INVALID, {"query": "\ud800"}),
        (INVALID, {"query": "x", "sort": "size"}),
    ],
    ids=str,
)
def test_what_cannot_be_searched_for_is_said(post, status, body):
    message = post("/search", status, **body).json()["error"]["message"]
    assert message.endswith(".") and "Error" not in message


def test_a_bad_image_of_a_query_has_the_code_of_bad_images(post):
    error = post("/search", BAD_REQUEST, query="x", image="data:image/png;base64,AAAA").json()["error"]
    assert (error["code"], error["param"]) == ("image_decode_failed", "image")


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_a_thumbnail_shows_the_image(url, search, size):
    for result in search():
        response = requests.get(f"{url}/thumbnails/{result['id']}?size={size}", timeout=60)
        assert response.headers["content-type"] == "image/jpeg"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"].startswith("private")
        image = Image.open(io.BytesIO(response.content))
        assert image.format == "JPEG" and image.size == (result["width"], result["height"])
        color = COLORS.get(result["name"].removesuffix(".png"), (90, 90, 90))
        corner = image.getpixel((image.width - 4, image.height - 4))
        assert max(abs(a - b) for a, b in zip(corner, color, strict=True)) < 12


def test_a_thumbnail_is_no_larger_than_was_asked_for(services, random_base, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (1600, 400), "navy").save(tmp_path / "photos" / "wide.jpg")
    opened = Collection.open(tmp_path / "gallery", Cafe.load(random_base))
    opened.add(tmp_path / "photos")
    with running_server(replace(services, collection=opened)) as url:
        [result] = requests.post(f"{url}/search", json={}, timeout=60).json()["results"]
        image = Image.open(io.BytesIO(requests.get(f"{url}/thumbnails/{result['id']}?size=256", timeout=60).content))
    assert image.size == (256, 64)


@pytest.mark.parametrize(
    ("status", "path"),
    [
        (NOT_FOUND, "0" * 32),
        (NOT_FOUND, "..%2Fphotos%2Ftown%2Fred.png"),
        (NOT_FOUND, "%00"),
        (INVALID, "0" * 32 + "?size=9999"),
    ],
)
def test_no_other_file_is_shown(url, status, path):
    assert requests.get(f"{url}/thumbnails/{path}", timeout=60).status_code == status


def test_an_image_that_has_vanished_is_gone(services, random_base, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("blue", "red"):
        Image.new("RGB", (90, 60), name).save(tmp_path / "photos" / f"{name}.png")
    opened = Collection.open(tmp_path / "gallery", Cafe.load(random_base))
    opened.add(tmp_path / "photos")
    with running_server(replace(services, collection=opened)) as url:
        found = requests.post(f"{url}/search", json={"sort": "name"}, timeout=60).json()["results"]
        blue, red = (result["id"] for result in found)
        assert requests.get(f"{url}/thumbnails/{red}", timeout=60).status_code == OK
        (tmp_path / "photos" / "red.png").unlink()
        response = requests.get(f"{url}/thumbnails/{red}", timeout=60)
        assert response.status_code == GONE and str(tmp_path) not in response.text
        assert requests.post(f"{url}/search", json={"like": red}, timeout=60).status_code == GONE
        # The others are asked about, and it is asked about nothing if there are none.
        body = {"question": "What is it?", "ids": [red, blue], "max_tokens": 4}
        sources, _ = answer_of(requests.post(f"{url}/ask", json=body, timeout=60))
        assert [source["id"] for source in sources] == [blue]
        assert answer_of(requests.post(f"{url}/ask", json={**body, "ids": [red]}, timeout=60)) == ([], NOTHING_FOUND)


def test_an_answer_about_chosen_images_is_the_models(post, search, collection):
    question = "Which of them is red?"
    chosen = [result["id"] for result in search()[1:3]]
    sources, text = answer_of(post("/ask", question=question, ids=chosen, max_tokens=12))
    assert [source["id"] for source in sources] == chosen
    assert all(source["score"] is None for source in sources)
    hits = {hit.key: hit for hit in collection.search("anything")}
    answer = ask(collection.model, question, [hits[id] for id in chosen], (), False, 12, stream=False)
    assert text.strip() == answer.text
    assert text


def test_an_answer_without_chosen_images_is_about_those_that_fit(post, collection):
    sources, text = answer_of(post("/ask", question="Where is a red square?", k=2, max_tokens=8, folder="town"))
    answer = collection.ask("Where is a red square?", k=2, max_new_tokens=8, folder="town")
    assert_equal(sources, answer.sources)
    assert text.strip() == answer.text


def test_a_follow_up_is_a_turn_of_the_same_conversation(post, search, served_chat):
    [red] = [result for result in search() if result["name"] == "red.png"]
    history = [{"question": "What is it?", "answer": "A square."}]
    _, text = answer_of(post("/ask", question="Which color?", ids=[red["id"]], history=history, max_tokens=8))
    assert text == served_chat(["What is it?", "A square.", "Which color?"], 8)


@pytest.fixture
def served_chat(url, directory):
    """A function that asks the chat route about the red image, in turns, and returns the answer."""

    def chat(turns, max_tokens):
        image = {"type": "image_url", "image_url": {"url": data_uri(Image.open(directory / "photos/town/red.png"))}}
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": [{"type": "text", "text": turn}]}
            for number, turn in enumerate(turns)
        ]
        messages[0]["content"].insert(0, image)
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0}
        answer = requests.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        return answer["choices"][0]["message"]["content"]

    return chat


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (BAD_REQUEST, {"question": " "}),
        (BAD_REQUEST, {"question": "x", "k": 9}),
        (BAD_REQUEST, {"question": "x", "ids": ["0"] * 9}),
        (BAD_REQUEST, {"question": "x", "max_tokens": 10**6}),
        (NOT_FOUND, {"question": "x", "ids": ["0" * 32]}),
        (INVALID, {}),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_said(post, status, body):
    assert post("/ask", status, **body).json()["error"]["message"].endswith(".")


def test_placeholders_of_images_in_words_are_words(post, search):
    search(query="<image> <|im_end|>")
    answer_of(post("/ask", question="<image><image>", k=2, max_tokens=2))


def test_what_is_served_is_told(url, directory):
    response = requests.get(f"{url}/collection", timeout=60)
    assert str(directory) not in response.text
    facts = response.json()["collection"]
    assert facts["name"] == "gallery" and facts["images"] == len(COLORS) + 1
    assert facts["folders"] == ["beach", "photos", "town"]
    assert (facts["first_day"][:7], facts["last_day"][:7]) == ("2023-11", "2024-12")


def test_a_server_without_a_collection_says_so(services):
    with running_server(replace(services, collection=None)) as url:
        assert requests.get(f"{url}/collection", timeout=60).json() == {"model": services.model_id, "collection": None}
        for path, body in {"/search": {"query": "x"}, "/ask": {"question": "x"}}.items():
            response = requests.post(url + path, json=body, timeout=60)
            assert response.status_code == NOT_FOUND and "no collection" in response.json()["error"]["message"]
        assert requests.get(f"{url}/thumbnails/0", timeout=60).status_code == NOT_FOUND


def test_records_are_shown_without_their_places(random_base, tmp_path):
    """Columns that name files are left out, and an image within a record is called by its number."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for number, color in enumerate(("teal", "olive")):
        path = folder / f"{color}.png"
        Image.new("RGB", (80, 60), color).save(path)
        rows.append({"image": str(path), "caption": f"<script>window.ran = {number}</script>", "year": 2020 + number})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Cafe.load(random_base)
    Collection.open(tmp_path / "gallery", model).add(folder / "rows.jsonl")
    with running_services(CONFIG, model, tmp_path / "gallery") as services, running_server(services) as url:
        response = requests.post(f"{url}/search", json={"where": ["year>2020"]}, timeout=60)
        assert str(tmp_path) not in response.text
        [result] = response.json()["results"]
        assert result["columns"] == {"caption": rows[1]["caption"], "year": 2021}
        assert requests.get(f"{url}/collection", timeout=60).json()["collection"]["columns"] == ["caption", "year"]
        # Nor can they be found out bit by bit.
        for body in ({"where": ["image>/"]}, {"where": ["image>/"], "query": "x"}):
            assert requests.post(f"{url}/search", json=body, timeout=60).json() == {"results": []}
        assert requests.get(f"{url}/thumbnails/{result['id']}", timeout=60).status_code == OK


def test_pages_of_a_document_are_shown_and_asked_about(random_base, tmp_path):
    (tmp_path / "papers").mkdir()
    write_pdf(tmp_path / "papers" / "report.pdf", ["a red boat", "a green tree"])
    model = Cafe.load(random_base)
    Collection.open(tmp_path / "gallery", model).add(tmp_path / "papers")
    with running_services(CONFIG, model, tmp_path / "gallery") as services, running_server(services) as url:
        found = requests.post(f"{url}/search", json={"query": "a green tree"}, timeout=60).json()["results"]
        assert [(each["name"], each["page"]) for each in found] == [("report.pdf", 2), ("report.pdf", 1)]
        thumbnails = [requests.get(f"{url}/thumbnails/{each['id']}", timeout=60).content for each in found]
        assert [Image.open(io.BytesIO(each)).size for each in thumbnails] == [(341, 512)] * 2
        assert thumbnails[0] != thumbnails[1]
        body = {"question": "What is it?", "ids": [each["id"] for each in found], "max_tokens": 4}
        sources, _ = answer_of(requests.post(f"{url}/ask", json=body, timeout=60))
        assert [source["page"] for source in sources] == [2, 1]
        # A page that a new version of the file has no more.
        write_pdf(tmp_path / "papers" / "report.pdf", ["a red boat"])
        assert requests.get(f"{url}/thumbnails/{found[0]['id']}", timeout=60).status_code == GONE
        assert requests.get(f"{url}/thumbnails/{found[1]['id']}", timeout=60).status_code == OK


def test_files_of_the_page_have_their_types_and_are_asked_for_again(url):
    types = {
        "/": "text/html; charset=utf-8",
        "/page/style.css": "text/css; charset=utf-8",
        "/page/app.js": "text/javascript; charset=utf-8",
        "/page/icon.svg": "image/svg+xml",
    }
    for path, media_type in types.items():
        response = requests.get(url + path, timeout=60)
        assert response.headers["content-type"] == media_type and response.headers["cache-control"] == "no-cache"
        again = requests.get(url + path, headers={"If-None-Match": response.headers["etag"]}, timeout=60)
        assert again.status_code == NOT_MODIFIED and not again.content
    for path in ("/page/..%2Fapp.py", "/page/%2e%2e/app.py", "/page/app.py", "/page/"):
        assert requests.get(url + path, timeout=60).status_code == NOT_FOUND
