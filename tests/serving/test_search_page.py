"""The page in a real Chromium: search, look, select and talk, with a server whose answers are written beforehand."""

import io
import json
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
from browser import SHIFT, running_browser
from gallery_samples import COLORS, CONFIG, SCRIPT_NAME, gallery_services
from PIL import Image

from cafe.serving.engine import Engine
from cafe.serving.jobs import ChatJob, Job, Piece
from cafe.serving.server import running_server

NUM_IMAGES = len(COLORS) + 1
PIECES = ["Sailing 🚤 ", "by [1]", " and [2], not [7]", ": <b onclick=alert(1)>", "é</b>."]
KEY = "a secret"
DRAWN = "document.querySelectorAll('.card:not(.skeleton)').length"
ANSWERED = "document.querySelector('#log').getAttribute('aria-busy') === 'false'"
NAMES = "[...document.querySelectorAll('.frame')].map((frame) => frame.title)"


class ScriptedEngine:
    """An engine that embeds as the real one does, and answers chats with the same pieces every time.

    Attributes:
        chats: those that were taken.
        endless: no answer ends until it is cancelled.
    """

    endless = False

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.chats: list[ChatJob] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def submit(self, job: Job) -> None:
        """Take a job."""
        if not isinstance(job, ChatJob):
            self.engine.submit(job)
            return
        self.chats.append(job)
        Thread(target=self._answer, args=(job,), daemon=True).start()

    def _answer(self, job: ChatJob) -> None:
        """Answer a chat."""
        for number, text in enumerate(PIECES, 1):
            job.on_piece(Piece(text, number))
        if self.endless:
            return
        job.on_piece(Piece("", len(PIECES), "stop"))
        job.future.set_result("stop")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with running_browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture(scope="module")
def real_services(tmp_path_factory, random_base):
    with gallery_services(tmp_path_factory.mktemp("served"), random_base) as running:
        yield running


@pytest.fixture(scope="module")
def engine(real_services):
    return ScriptedEngine(real_services.engine)


@pytest.fixture(scope="module")
def services(real_services, engine):
    return replace(real_services, engine=engine)


@pytest.fixture(scope="module")
def url(services):
    with running_server(services) as address:
        yield address


@pytest.fixture
def open_page(browser, url) -> Callable[..., Any]:
    """A function that opens the page; in the end, nothing may have been blocked, thrown or loaded from elsewhere."""
    pages = []

    def open_it(path="/", origin=url, **screen):
        """Open the page, and wait until it has drawn its images."""
        page = browser.open(origin + path, **screen)
        pages.append((page, origin))
        if origin == url:
            page.wait_for(f"{DRAWN} > 0")
        return page

    yield open_it
    for page, origin in pages:
        assert not page.complaints
        elsewhere = [each for each in page.requests if not each.startswith((origin, "blob:", "data:"))]
        assert not elsewhere
        assert page.evaluate("window.ran") is None


def search(page, words):
    """Search by words, as a person does."""
    page.click("#words")
    page.evaluate("document.querySelector('#words').select()")
    page.type(words)
    page.press("Enter")
    page.wait_for(f"document.querySelector('#status').textContent.includes({json.dumps(words)})")


def ask(page, question):
    """Ask a question in the panel, and wait for the whole answer."""
    page.evaluate("document.querySelector('#question').focus()")
    page.type(question)
    page.press("Enter")
    page.wait_for(ANSWERED)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_words_show_images_with_scores_and_dates(open_page):
    page = open_page()
    assert page.text("#hero h1") == f"Search {NUM_IMAGES} images"
    search(page, "a red square")
    assert page.text("#status") == f"{NUM_IMAGES} images for “a red square”"
    assert page.evaluate(DRAWN) == NUM_IMAGES
    assert page.evaluate("[...document.querySelectorAll('.card')].every((c) => /\\d\\.\\d\\d/.test(c.innerText))")
    assert page.evaluate("[...document.querySelectorAll('.card time')].every((t) => /20\\d\\d/.test(t.innerText))")
    # The pixels come, each once.
    page.wait_for(f"document.querySelectorAll('.loaded').length === {NUM_IMAGES}")


def test_a_dropped_image_is_searched_for_alone_and_with_words(open_page):
    page = open_page()
    page.drop("orange.png", png(Image.new("RGB", (60, 40), "orange")))
    page.wait_for("document.querySelector('#status').textContent.includes('your image')")
    assert page.text("#query-image") == "orange.png"
    page.wait_for("document.querySelector('#query-image img').naturalWidth === 60")
    search(page, "at night")
    assert page.text("#status") == f"{NUM_IMAGES} images for “at night” and your image"
    page.click("#query-image button")
    page.wait_for("!document.querySelector('#status').textContent.includes('your image')")


def test_what_is_no_image_is_said(open_page):
    page = open_page()
    page.drop("notes.txt", b"words", "text/plain")
    page.wait_for("document.querySelector('.toast')")
    assert page.text(".toast span") == "That is no image."


def test_an_image_that_cannot_be_read_is_said_in_plain_words(browser, url):
    page = browser.open(url + "/")
    page.wait_for(f"{DRAWN} > 0")
    page.drop("broken.png", b"no image")
    page.wait_for("!document.querySelector('#nothing').hidden")
    assert page.text("#nothing p") == "The image of the query cannot be read."


def test_selected_images_are_talked_about_in_a_streamed_answer(open_page, engine):
    page = open_page()
    page.click(".card:nth-child(2) .check")
    page.click(".card:nth-child(4) .check")
    assert page.text("#selected-count") == "2 selected"
    page.click("#ask-selected")
    ask(page, "What is it?")
    assert page.text(".answer .text") == "Sailing 🚤 by 1 and 2, not [7]: <b onclick=alert(1)>é</b>."
    assert page.evaluate("document.querySelectorAll('.answer .thumb').length") == 2
    assert engine.chats[-1].branch.image_mask.any()
    # A citation opens the image that it names.
    chosen = page.evaluate(NAMES)[3].rpartition("/")[2]
    page.click(".cite:nth-of-type(2)")
    page.wait_for("document.querySelector('#viewer').open")
    assert page.text("#viewer-name") == chosen
    page.press("Escape")
    # The next turn is about the same images, and longer by what was said before.
    length = len(engine.chats[-1].branch)
    ask(page, "And then?")
    assert page.evaluate("document.querySelectorAll('.answer').length") == 2
    assert len(engine.chats[-1].branch) > length


def test_a_question_without_a_selection_is_about_what_fits_it(open_page):
    page = open_page()
    page.click("#chat-toggle")
    ask(page, "Where is it?")
    assert page.evaluate("document.querySelectorAll('.answer .thumb').length") == 4


def test_an_answer_can_be_stopped(open_page, engine, monkeypatch):
    monkeypatch.setattr(ScriptedEngine, "endless", True)
    page = open_page()
    page.click("#chat-toggle")
    page.click("#question")
    page.type("Tell a long story.")
    page.press("Enter")
    page.wait_for("document.querySelector('.answer .text')?.innerText.endsWith('.')")
    page.click("#stop")
    page.wait_for(ANSWERED)
    assert page.text(".answer .note") == "Stopped."
    # Which the server notices too.
    with pytest.raises(CancelledError):
        engine.chats[-1].future.result(timeout=30)


def test_an_answer_that_is_cut_off_is_not_taken_for_a_whole_one(open_page):
    page = open_page()
    page.click("#chat-toggle")
    # As a proxy does that ends a stream in good order.
    page.evaluate('window.fetch = async () => new Response(\'data: {"text": "Half an"}\\n\\n\'); 1')
    ask(page, "What is it?")
    assert page.text(".answer .text") == "Half an"
    assert page.text(".answer .note") == "The connection was lost while the answer came."


def test_a_file_name_that_is_a_script_is_text(open_page):
    page = open_page()
    assert f"beach/{SCRIPT_NAME}" in page.evaluate(NAMES)
    number = page.evaluate(NAMES).index(f"beach/{SCRIPT_NAME}") + 1
    page.click(f".card:nth-child({number}) .frame")
    page.wait_for("document.querySelector('#viewer').open")
    assert page.text("#viewer-name") == SCRIPT_NAME
    assert page.evaluate("document.querySelectorAll('img[src=x]').length") == 0


def test_a_caption_that_is_a_script_is_text(open_page, services, monkeypatch):
    script = "<script>window.ran = 1</script><img src=x onerror='window.ran = 1'>"
    described = type(services.collection).read_snapshot

    def with_captions(collection):
        """Give all images a caption."""
        snapshot = described(collection)
        captions = snapshot.images["caption"].to_pylist()
        column = snapshot.images.column_names.index("caption")
        return replace(snapshot, images=snapshot.images.set_column(column, "caption", [[script] * len(captions)]))

    monkeypatch.setattr(type(services.collection), "read_snapshot", with_captions)
    page = open_page()
    assert page.evaluate("[...document.querySelectorAll('.frame img')].every((i) => i.alt.startsWith('<script>'))")
    page.click(".frame")
    page.wait_for("document.querySelector('#viewer').open")
    assert page.text("#viewer-caption") == script


def test_by_keyboard_alone(open_page):
    page = open_page()
    page.evaluate("document.activeElement.blur()")
    page.press("/")
    page.type("a green square")
    page.press("Enter")
    page.wait_for("document.querySelector('#status').textContent.includes('green')")
    page.press("ArrowDown")
    focused = "[...document.querySelectorAll('.frame')].indexOf(document.activeElement)"
    assert page.evaluate(focused) == 0
    page.press("ArrowRight")
    page.press(" ")
    page.press("ArrowRight", SHIFT)
    assert page.text("#selected-count") == "2 selected"
    page.press("Home")
    assert page.evaluate(focused) == 0
    page.press("End")
    assert page.evaluate(focused) == NUM_IMAGES - 1
    page.press("Enter")
    page.wait_for("document.querySelector('#viewer').open")
    name = page.text("#viewer-name")
    page.press("ArrowLeft")
    assert page.text("#viewer-name") != name
    page.press("Escape")
    page.wait_for("!document.querySelector('#viewer').open")
    # The focus is where the viewer was left.
    page.wait_for(f"{focused} === {NUM_IMAGES - 2}")
    page.press("Escape")
    assert page.evaluate("document.querySelector('#selection').hidden")


def test_filters_and_back_and_the_address(open_page, url):
    page = open_page()
    search(page, "a square")
    page.click("#filter-toggle")
    page.evaluate("document.querySelector('[name=folder]').value = 'town'")
    page.click("#filter-form [type=submit]")
    page.wait_for(f"{DRAWN} === 2")
    assert page.text("#filter-count") == "1"
    assert page.evaluate("location.search") == "?query=a+square&folder=town"
    page.evaluate("history.back()")
    page.wait_for(f"{DRAWN} === {NUM_IMAGES}")
    assert page.evaluate("location.search") == "?query=a+square"
    # The same address shows the same in another window.
    other = open_page("/?query=a+square&folder=town&sort=newest")
    assert other.evaluate(NAMES) == ["town/blue.png", "town/red.png"]
    assert other.evaluate("document.querySelector('#words').value") == "a square"


def test_more_like_this_leaves_the_image_itself_out(open_page):
    page = open_page()
    page.click(".card:nth-child(1) .like")
    page.wait_for(f"{DRAWN} === {NUM_IMAGES - 1}")
    assert page.text("#query-image span") == "like this"


def test_filters_that_nothing_passes_are_said(browser, url):
    page = browser.open(url + "/?min_width=5000")
    page.wait_for("!document.querySelector('#nothing').hidden")
    assert page.text("#nothing h2") == "Nothing passes the filters"


@pytest.mark.parametrize("path", ["/", "/?query=a+square"])
def test_on_a_phone_nothing_is_wider_than_the_screen(open_page, path):
    page = open_page(path, width=390, height=844, phone=True)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) == 390
    page.click("#filter-toggle")
    assert page.evaluate(width) == 390
    page.click("#filter-toggle")
    page.click(".card:nth-child(1) .check")
    page.click("#ask-selected")
    ask(page, "What is it? " + "x" * 200)
    assert page.evaluate(width) == 390
    # The panel is a sheet at the bottom.
    top, bottom = page.evaluate(
        "(() => { const b = document.querySelector('#chat').getBoundingClientRect(); return [b.top, b.bottom]; })()"
    )
    assert top > 100 and bottom == 844


@pytest.mark.parametrize(("dark", "other"), [(False, "dark"), (True, "light")])
def test_colors_are_the_systems_until_others_are_chosen(open_page, tmp_path, dark, other):
    def brightness(page):
        """How bright the page is where nothing is."""
        page.screenshot(tmp_path / "page.png")
        return Image.open(tmp_path / "page.png").convert("L").getpixel((5, 300))

    page = open_page(dark=dark)
    assert (brightness(page) < 60) == dark
    page.click("#theme")
    page.wait_for(f"document.documentElement.dataset.theme === '{other}'")
    assert (brightness(page) < 60) != dark
    page.send("Page.reload")
    page.wait_for(f"document.documentElement.dataset.theme === '{other}' && {DRAWN} > 0")
    assert (brightness(page) < 60) != dark


def test_a_server_with_a_key_asks_for_it_once(browser, services):
    config = replace(CONFIG, api_key=KEY)
    with running_server(replace(services, config=config)) as url:
        page = browser.open(url + "/")
        page.wait_for("document.querySelector('#key').open")
        page.type("a guess")
        page.press("Enter")
        page.wait_for("document.querySelector('#key').open && document.querySelector('#key input').value === ''")
        page.type(KEY)
        page.press("Enter")
        page.wait_for(f"document.querySelectorAll('.loaded').length === {NUM_IMAGES}")
        page.send("Page.reload")
        page.wait_for(f"document.querySelectorAll('.loaded').length === {NUM_IMAGES}")
        assert not page.evaluate("document.querySelector('#key').open")
        page.click(".frame")
        page.wait_for("document.querySelector('#viewer img').naturalWidth > 0")
        page.press("ArrowRight")
        page.wait_for("document.querySelector('#viewer img').naturalWidth === 240")
        assert KEY not in " ".join(page.requests)


def test_without_a_collection_one_talks_about_dropped_images(browser, services, engine):
    with running_server(replace(services, collection=None)) as url:
        page = browser.open(url + "/")
        page.wait_for("document.body.classList.contains('chat-only')")
        page.drop("orange.png", png(Image.new("RGB", (60, 40), "orange")))
        page.wait_for("document.querySelector('#about img')?.naturalWidth === 60")
        ask(page, "What is it?")
        assert page.text(".answer .text") == "".join(PIECES)
        assert engine.chats[-1].branch.image_mask.any()
        length = len(engine.chats[-1].branch)
        ask(page, "And then?")
        assert len(engine.chats[-1].branch) > length
        assert not page.complaints


def test_events_that_are_cut_anywhere_are_put_together(open_page):
    page = open_page()
    text = 'data: {"a": "é🚤"}\r\n\r\n: a comment\ndata: one\ndata: two\n\nevent: x\rdata:three\r\rdata: lost'
    script = """
    (async () => {
      const { parseEvents } = await import("/page/events.js");
      const bytes = new TextEncoder().encode(TEXT);
      const all = [];
      for (const size of [1, 2, 3, 7, 1000]) {
        const stream = new ReadableStream({
          start(controller) {
            for (let at = 0; at < bytes.length; at += size) controller.enqueue(bytes.slice(at, at + size));
            controller.close();
          },
        });
        const events = [];
        for await (const data of parseEvents(stream)) events.push(data);
        all.push(events);
      }
      return all;
    })()
    """
    events = page.evaluate(script.replace("TEXT", json.dumps(text)))
    assert events == [['{"a": "é🚤"}', "one\ntwo", "three"]] * 5
