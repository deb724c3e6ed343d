"""The pages of a PDF file, as images and as text.

pdfium is not safe to use from several threads and may end its process, so it is called in worker processes alone.
"""

from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from typing import Any

from PIL import Image

from cafe.errors import MissingPackageError, RecordError, first_line

PAGE_SIDE = 1600  # pixels of a page's longer side
MAX_PAGES = 2000  # of one file
MAX_TEXT = 100_000  # characters of a page


def has_pdfium() -> bool:
    """Return whether the package that reads PDF files is installed."""
    return find_spec("pypdfium2") is not None


Page = tuple[Image.Image, str] | RecordError  # its image and its text, or what is wrong with it


def read_pages(data: bytes, first: int, count: int, name: str) -> tuple[int, list[Page]]:
    """Read some pages of a PDF file.

    Args:
        data: the file's bytes.
        first: the number of the first page, from 1.
        count: the number of pages; fewer are read at the end of the file.
        name: what the file is called in errors.

    Returns:
        The number of pages in the file, and the pages that were read.

    Raises:
        RecordError: the file is damaged, needs a password, or has too many pages.
        MissingPackageError: pypdfium2 is not installed.
    """
    try:
        import pypdfium2
    except ImportError:
        raise MissingPackageError("PDF files need the package pypdfium2: pip install 'cafe-lvlm[pdf]'.") from None
    try:
        with closing(pypdfium2.PdfDocument(data)) as document:
            num_pages = len(document)
            if num_pages > MAX_PAGES:
                raise RecordError(f"The PDF file {name} has {num_pages:,} pages, over the limit of {MAX_PAGES:,}.")
            numbers = range(first - 1, min(first - 1 + count, num_pages))
            return num_pages, [_read_page(document, number, name) for number in numbers]
    except pypdfium2.PdfiumError as error:
        raise RecordError(f"The PDF file {name} cannot be read: {first_line(error).rstrip('.')}.") from None


def _read_page(document: Any, number: int, name: str) -> Page:
    """Read a page by its number, from 0; one that is damaged leaves the others as they are."""
    import pypdfium2

    try:
        return _render(document[number])
    except pypdfium2.PdfiumError as error:
        reason = first_line(error).rstrip(".")
        return RecordError(f"Page {number + 1} of the PDF file {name} cannot be read: {reason}.")


def _render(page: Any) -> tuple[Image.Image, str]:
    """Render a page, and return it with its text layer."""
    with closing(page):
        # By its longer side, so that a poster costs no more than a letter.
        scale = PAGE_SIDE / max(*page.get_size(), 1)
        image = page.render(scale=scale).to_pil().convert("RGB")
        with closing(page.get_textpage()) as textpage:
            text: str = textpage.get_text_bounded()[:MAX_TEXT]
        return image, text.encode(errors="ignore").decode()  # a damaged text layer may hold half a character


def iter_page_ids(path: str, first: int, count: int) -> Iterator[tuple[int, str]]:
    """Yield the numbers of some pages with the ids of their places."""
    for page in range(first, first + count):
        yield page, f"{path}#page={page}"
