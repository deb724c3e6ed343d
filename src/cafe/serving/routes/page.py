"""The page at `/`: a few files of the package, which need no other server and no build step."""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

from cafe.serving.errors import ApiError

FOLDER = Path(__file__).parents[1] / "page"
# By the endings of the files' names: nothing is guessed from this machine's tables.
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class PageFile:
    """Hold a file of the page.

    Attributes:
        data: its bytes.
        media_type: what it is.
        tag: changes when the file does.
    """

    data: bytes
    media_type: str
    tag: str


@cache
def page_files() -> dict[str, PageFile]:
    """Return all files of the page by their names, the only ones that are served."""
    files = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in _TYPES:
            data = path.read_bytes()
            tag = f'"{hashlib.sha256(data).hexdigest()[:32]}"'
            files[path.name] = PageFile(data, _TYPES[path.suffix], tag)
    return files


@router.get("/")
def page(request: Request) -> Response:
    """Return the page."""
    return _respond(request, "index.html")


@router.get("/page/{name}")
def page_file(name: str, request: Request) -> Response:
    """Return a file that the page is made of."""
    return _respond(request, name)


def _respond(request: Request, name: str) -> Response:
    """Return a file, or that the browser has it already.

    Raises:
        ApiError: there is no such file.
    """
    file = page_files().get(name)
    if file is None:
        raise ApiError(404, "not_found", "There is no such file.")
    # Browsers ask each time, so that all files are of the same version.
    headers = {"Cache-Control": "no-cache", "ETag": file.tag, "X-Content-Type-Options": "nosniff"}
    if request.headers.get("if-none-match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.data, media_type=file.media_type, headers=headers)
