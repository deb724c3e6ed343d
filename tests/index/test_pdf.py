"""Pages of PDF files. pdfium may end its process, so that a worker calls it: here one for all tests of this file."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from collection_samples import write_pdf

from cafe.errors import MissingPackageError, RecordError
from cafe.index.pdf import MAX_PAGES, PAGE_SIDE, iter_page_ids, read_pages

TEXTS = ["a red house", "two boats", "three dogs"]


@pytest.fixture(scope="module")
def worker():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda *arguments: pool.submit(read_pages, *arguments).result()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pdf(tmp_path_factory.mktemp("pdf") / "a.pdf", TEXTS).read_bytes()


def test_pages_come_as_images_of_one_size_with_their_texts(worker, data):
    num_pages, pages = worker(data, 1, 8, "a.pdf")
    assert num_pages == 3 and [text for _, text in pages] == TEXTS
    for image, _ in pages:  # of 2 by 3 inches
        assert image.mode == "RGB" and max(image.size) == PAGE_SIDE and abs(image.width / image.height - 2 / 3) < 0.01
        assert len(image.getcolors(image.width * image.height)) > 1
    num_pages, pages = worker(data, 3, 2, "a.pdf")
    assert num_pages == 3 and [text for _, text in pages] == TEXTS[2:]
    assert worker(data, 9, 8, "a.pdf") == (3, [])  # it had more pages before
    assert list(iter_page_ids("/a.pdf", 3, 2)) == [(3, "/a.pdf#page=3"), (4, "/a.pdf#page=4")]


def test_a_file_that_cannot_be_read_is_one_error(worker, data):
    for damaged in (b"", b"%PDF-1.4", b"no file", data[: len(data) // 2]):
        with pytest.raises(RecordError, match=r"The PDF file b\.pdf cannot be read: "):
            worker(damaged, 1, 8, "b.pdf")


def test_a_page_that_cannot_be_read_leaves_the_others(worker, data):
    start = data.index(b"/Kids [") + len(b"/Kids [")
    kids = data[start : data.index(b"]", start)].split(b" R")
    second = kids[1].strip()
    damaged = data.replace(second + b" R", b"9" * (len(second) - 2) + b" 0 R", 1)
    num_pages, pages = worker(damaged, 1, 8, "b.pdf")
    assert num_pages == 3 and isinstance(pages[1], RecordError)
    assert str(pages[1]).startswith("Page 2 of the PDF file b.pdf cannot be read: ")
    assert [pages[0][1], pages[2][1]] == [TEXTS[0], TEXTS[2]]


def test_a_file_of_very_many_pages_is_refused(worker, data):
    count = b"/Count 3"
    assert count in data
    kids = data[data.index(b"/Kids [") + 7 :].split(b" R")[0].strip() + b" R"
    start, end = data.index(b"/Kids ["), data.index(b"]", data.index(b"/Kids ["))
    many = data[:start] + b"/Kids [" + b" ".join([kids] * (MAX_PAGES + 1)) + data[end:]
    many = many.replace(count, b"/Count %d" % (MAX_PAGES + 1))
    with pytest.raises(RecordError, match=r"has 2,001 pages, over the limit of 2,000"):
        worker(many, 1, 8, "b.pdf")


def test_without_the_package_the_command_that_installs_it_is_named(data, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pypdfium2", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'cafe-lvlm\[pdf\]'"):
        read_pages(data, 1, 8, "a.pdf")
