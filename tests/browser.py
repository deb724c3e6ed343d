"""A headless Chromium, driven by the DevTools protocol over a pipe, which needs no port and no package."""

import base64
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from threading import Condition, Thread
from typing import Any

import pytest

SECONDS = 60  # until something that is waited for is missing
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-extensions",
    "--remote-debugging-pipe",
)
# What a key is called by the protocol, beside its text.
KEY_CODES = {
    "Enter": 13,
    "Escape": 27,
    " ": 32,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Tab": 9,
    "/": 191,
}
WAIT = """
new Promise((resolve) => {
  const end = Date.now() + MILLISECONDS;
  const check = () => {
    let value = false;
    try { value = CONDITION; } catch {}
    if (value || Date.now() > end) resolve(Boolean(value));
    else setTimeout(check, 15);
  };
  check();
})
"""
SETTLE = """
new Promise((resolve) => {
  requestAnimationFrame(() => requestAnimationFrame(resolve));
  setTimeout(resolve, 500);
})
"""
DROP = """
(data, name, type) => {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], name, { type }));
  for (const kind of ["dragenter", "dragover", "drop"])
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer, bubbles: true, cancelable: true }));
}
"""
SHIFT = 8  # a bit of the protocol's modifiers


class Browser:
    """A running browser. Messages are JSON objects with a NUL behind each, on its file descriptors 3 and 4."""

    def __init__(self, profile: Path) -> None:
        program = next(filter(None, map(which, PROGRAMS)), None)
        if program is None:
            pytest.fail("This test opens the page in a real browser: install chromium.")
        # Above 4, so that none is overwritten when they become 3 and 4.
        ends = [_move_up(fd) for pair in (os.pipe(), os.pipe()) for fd in pair]
        commands, self._commands, self._answers, answers = ends

        def connect() -> None:
            """Put the pipes where the browser looks for them."""
            os.dup2(commands, 3)
            os.dup2(answers, 4)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            close_fds=False,
            preexec_fn=connect,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self._number = 0
        self._changed = Condition()
        self._results: dict[int, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        with self._changed:
            self._number += 1
            number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        _write_all(self._commands, json.dumps(message).encode() + b"\0")
        with self._changed:
            if not self._changed.wait_for(lambda: number in self._results, SECONDS):
                raise TimeoutError(method)
            answer = self._results.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str, **screen: Any) -> "Page":
        """Open a page in a profile of its own; `screen` is what `Page.set_screen` takes."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        page.set_screen(**screen)
        page.go(url)
        return page

    def close(self) -> None:
        """End the browser."""
        try:
            self.send("Browser.close")
            self._process.wait(SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            self._reader.join(SECONDS)
            os.close(self._commands)
            os.close(self._answers)

    def _read(self) -> None:
        """Sort what the browser sends into results and events."""
        buffer = b""
        while data := os.read(self._answers, 1 << 16):
            *messages, buffer = (buffer + data).split(b"\0")
            with self._changed:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._results[message["id"]] = message
                    else:
                        self.events.append(message)
                self._changed.notify_all()


class Page:
    """A page in a browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser = browser
        self.session = session

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command to the page, and return its result."""
        return self.browser.send(method, self.session, **parameters)

    def set_screen(self, width: int = 1280, height: int = 800, dark: bool = False, phone: bool = False) -> None:
        """Set the screen's size in CSS pixels, its colors, and whether it is a phone's."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        # Nothing moves, so that everything is where it is going to be.
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.send("Emulation.setEmulatedMedia", features=[scheme, still])

    def go(self, url: str) -> None:
        """Go to an address."""
        self.send("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith({json.dumps(url)}) && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        check = WAIT.replace("CONDITION", expression).replace("MILLISECONDS", str(SECONDS * 800))
        try:
            done = self.evaluate(check)
        except RuntimeError:  # the page was left meanwhile
            done = self.evaluate(check)
        assert done, f"never true: {expression}"

    def settle(self) -> None:
        """Wait until what the scripts changed is laid out and drawn: two frames, or a moment where none are drawn."""
        self.evaluate(SETTLE)

    def text(self, selector: str) -> str:
        """Return the text of an element, as it is shown."""
        text: str = self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")
        return text

    def click(self, selector: str, modifiers: int = 0) -> None:
        """Click on an element where it is seen."""
        self.settle()
        x, y = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            " e.scrollIntoView({ block: 'nearest' }); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for type in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=type, x=x, y=y, button="left", clickCount=1, modifiers=modifiers)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key."""
        common = {"key": key, "windowsVirtualKeyCode": KEY_CODES[key], "modifiers": modifiers}
        text = {"Enter": "\r", " ": " ", "/": "/"}.get(key, "")
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self.send("Input.insertText", text=text)

    def drop(self, name: str, data: bytes, media_type: str = "image/png") -> None:
        """Drop a file on the page."""
        arguments = (base64.b64encode(data).decode(), name, media_type)
        self.evaluate(f"({DROP})(...{json.dumps(arguments)})")

    def screenshot(self, path: Path) -> None:
        """Write what is seen as a PNG file."""
        self.settle()
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    @property
    def requests(self) -> list[str]:
        """Return the addresses of all requests so far."""
        return [event["request"]["url"] for event in self._events("Network.requestWillBeSent")]

    @property
    def complaints(self) -> list[str]:
        """Return what the page's scripts and the browser complain about: exceptions, errors, blocked content."""
        thrown = [str(event["exceptionDetails"]) for event in self._events("Runtime.exceptionThrown")]
        logged = [event["entry"]["text"] for event in self._events("Log.entryAdded")]
        console = [str(event["args"]) for event in self._events("Runtime.consoleAPICalled") if event["type"] == "error"]
        return thrown + logged + console

    def _events(self, method: str) -> list[dict[str, Any]]:
        """Return what the browser reported about this page by one kind of event."""
        events = list(self.browser.events)
        return [
            event["params"] for event in events if (event["method"], event.get("sessionId")) == (method, self.session)
        ]


@contextmanager
def running_browser(profile: Path) -> Iterator[Browser]:
    """Run a browser for a while."""
    browser = Browser(profile)
    try:
        yield browser
    finally:
        browser.close()


def _kind(event: dict[str, Any]) -> tuple[str, str | None]:
    """Return what an event is, and of which page."""
    return event["method"], event.get("sessionId")


def _move_up(fd: int) -> int:
    """Move a file descriptor above those that the browser uses."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(fd)
    return moved


def _write_all(fd: int, data: bytes) -> None:
    """Write all of some bytes, of which a pipe may take a part at a time."""
    while data:
        data = data[os.write(fd, data) :]
