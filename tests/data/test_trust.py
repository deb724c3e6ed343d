"""What records may name: images of their own folder or store, and beyond it what the source allows; never more."""

import io
import json
import os
import socket
import tarfile
from random import Random

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import png

from cafe.data.image_fields import image_refs
from cafe.data.records import open_source
from cafe.data.source import Columns, Source
from cafe.data.trust import check_public, resolve_image
from cafe.errors import CafeError, RecordError

LOCAL = ("json", "jsonl", "csv", "tsv")
DOWNLOADED = ("parquet", "tar", "dataset", "store")


@pytest.fixture
def secret(tmp_path):
    """An image outside of the folder of images, and a link to it inside."""
    (tmp_path / "secret.png").write_bytes(png("red"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "data" / "frames").mkdir()
    (tmp_path / "data" / "frames" / "1.png").symlink_to(tmp_path / "secret.png")
    return tmp_path / "secret.png"


def write(folder, kind: str, image: str) -> Source:
    """A source of one record that names an image."""
    row = {"query_image": image, "positive": "a secret"}
    path = folder / f"a.{kind}"
    match kind:
        case "json":
            path.write_text(json.dumps([row]))
        case "jsonl":
            path.write_text(json.dumps(row))
        case "csv" | "tsv":
            path.write_text("\n".join({"csv": ",", "tsv": "\t"}[kind].join(line) for line in (row, row.values())))
        case "parquet":
            pq.write_table(pa.Table.from_pylist([row]), path)
        case "dataset":
            path = folder / "saved"
            datasets.Dataset.from_list([row]).save_to_disk(path)
        case "tar":
            data = json.dumps(row).encode()
            with tarfile.open(path, "w") as tar:
                info = tarfile.TarInfo("0.json")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        case "store":
            fsspec.filesystem("memory").pipe("/shop/data/a.jsonl", json.dumps(row).encode())
            return Source(path="memory://shop/data/a.jsonl", format="pairs")
    return Source(path=str(path), format="pairs")


def named(source: Source) -> str:
    """What the record's image is read from."""
    [ref] = open_source(source).example(0, Random(0)).pair.query.images
    return str(ref)


@pytest.mark.parametrize("kind", [*LOCAL, *DOWNLOADED])
def test_no_record_leaves_its_folder_by_dots_unless_the_source_allows_it(secret, tmp_path, kind):
    for name in ("../secret.png", "frames/../../secret.png", "./../data/../secret.png"):
        source = write(tmp_path / "data", kind, name)
        if kind == "dataset":
            source = Source(**vars(source) | {"images": str(tmp_path / "data")})
        if kind == "store":
            source = Source(**vars(source) | {"images": str(tmp_path / "data")})
        with pytest.raises(RecordError, match=r"record 0.*is outside of .*allow_outside: true"):
            named(source)
        allowed = Source(**vars(source) | {"allow_outside": True})
        assert os.path.realpath(named(allowed)) == str(secret)


@pytest.mark.parametrize("kind", [*LOCAL, *DOWNLOADED])
def test_absolute_paths_are_for_local_text_files(secret, tmp_path, kind):
    source = write(tmp_path / "data", kind, str(secret))
    if kind in LOCAL:
        assert named(source) == str(secret)
        return
    if kind == "dataset":  # is beside its images
        source = Source(**vars(source) | {"images": str(tmp_path / "data")})
    with pytest.raises(RecordError, match=r"record 0.*is outside of .*allow_outside: true"):
        named(source)


@pytest.mark.parametrize("name", ["link.png", "frames", "frames/1.png"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar"])
def test_links_out_of_the_folder_are_for_local_text_files(secret, tmp_path, kind, name):
    source = write(tmp_path / "data", kind, name)
    if kind == "jsonl":
        assert os.path.realpath(named(source)) == str(secret)
        return
    with pytest.raises(RecordError, match=r"is outside of .*allow_outside: true"):
        named(source)


@pytest.mark.parametrize("kind", ["parquet", "tar", "dataset"])
def test_records_of_downloaded_kinds_name_files_in_their_folder(tmp_path, kind):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "in.png").write_bytes(png("red"))
    for name in ("x/in.png", str(tmp_path / "x" / "in.png"), "x/../x/in.png"):
        assert os.path.realpath(named(write(tmp_path, kind, name))) == str(tmp_path / "x" / "in.png")


def test_a_folder_of_images_that_is_a_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "in.png").write_bytes(png("red"))
    (tmp_path / "images").symlink_to(tmp_path / "real")
    source = Source(**vars(write(tmp_path, "parquet", "in.png")) | {"images": str(tmp_path / "images")})
    assert named(source) == str(tmp_path / "images" / "in.png")


URLS = [
    "http://127.0.0.1:9/x.png", "https://localhost/x", "HTTP://127.0.0.1/x.png", "ftp://127.0.0.1/x.png",
    "s3://other/x.png", "file:///dev/zero", "file:///etc/passwd", "local:///etc/passwd", "simplecache::file:///etc/passwd",
    "zip://x.png::http://127.0.0.1/x.zip", "filecache::http://127.0.0.1/x.png", "reference://x", "memory://other/x.png",
    "github://a:b@c/x.png", "hf://datasets/a/b/x.png", "memory://shop@127.0.0.1/x.png",
]  # fmt: skip


@pytest.fixture
def no_network(monkeypatch):
    """Fails whatever looks up a host or connects to one."""

    def refuse(*arguments, **options):
        raise AssertionError(f"the network was asked: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tar", "store"])
def test_no_url_is_read_that_the_source_does_not_allow(tmp_path, no_network, kind, url):
    with pytest.raises(RecordError, match=r"record 0.*(allow_urls: \[[a-z0-9]+\]|which records may not name)"):
        named(write(tmp_path, kind, url))


def test_urls_of_listed_schemes_are_read_and_their_chains_are_not():
    fsspec.filesystem("memory").pipe("/other/x.png", png("red"))
    source = Source(path="x.jsonl", allow_urls=("memory", "simplecache", "http"))
    [ref] = image_refs("memory://other/x.png", source)
    assert ref.source == png("red")
    for chain in ("simplecache::memory://other/x.png", "zip://x::http://127.0.0.1/x.zip"):
        with pytest.raises(RecordError, match="a chain of URLs"):
            image_refs(chain, source)


def test_records_of_a_store_name_images_of_that_store():
    fs = fsspec.filesystem("memory")
    for name in ("/shop/in.png", "/shop/data/in.png", "/shop/data/a//b.png", "/elsewhere/x.png"):
        fs.pipe(name, png("red"))
    source = Source(path="memory://shop/data/a.jsonl")
    for name in ("in.png", "../in.png", "memory://shop/in.png", "memory://shop/data/x/../in.png", "a//b.png"):
        assert image_refs(name, source)[0].source == png("red"), name
    outside = [
        "../../elsewhere/x.png", "memory://shop/../elsewhere/x.png", "memory://shop/%2e%2e/elsewhere/x.png",
        "%2e%2e/%252e%252e/x.png", "..\\..\\elsewhere\\x.png", "x.png::y", "/etc/passwd",
    ]  # fmt: skip
    for name in outside:
        with pytest.raises(RecordError, match="is outside of"):
            image_refs(name, source)
    cached = Source(path="simplecache::memory://shop/data/a.jsonl")
    assert image_refs("in.png", cached)[0].source == png("red")


def test_the_store_of_a_hub_dataset_is_its_repository():
    source = Source(path="hf://datasets/ORG/NAME/data/a.parquet")
    assert resolve_image("../images/x.png", source) == "hf://datasets/ORG/NAME/images/x.png"
    for name in ("../../OTHER/x.png", "hf://datasets/ORG/OTHER/x.png"):
        with pytest.raises(RecordError, match=r"allow_"):
            resolve_image(name, source)


def test_files_that_a_url_may_name_are_regular_ones_too(tmp_path):
    (tmp_path / "a.png").write_bytes(png("red"))
    source = Source(path=str(tmp_path / "x.jsonl"), allow_urls=("file",))
    [ref] = image_refs(f"file://{tmp_path}/a.png", source)
    assert ref.source == tmp_path / "a.png"  # decoded as any other file, see `read_image_file`


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
        "224.0.0.1", "::1", "::", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::",
        "64:ff9b::7f00:1", "127.1", "2130706433", "0x7f.1", "0177.0.0.1",
    ],
)  # fmt: skip
def test_private_addresses_are_never_asked(host):
    with pytest.raises(RecordError, match=r"private address|cannot be found"):
        check_public(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700:4700::1111"])
def test_public_addresses_are(host):
    assert check_public(host) == [host]


@pytest.mark.parametrize("url", ["http://169.254.169.254/latest/meta-data", "https://[::1]/x.png", "ftp://127.0.0.1/x"])
def test_a_listed_scheme_does_not_reach_a_private_address(url):
    source = Source(path="x.jsonl", allow_urls=("http", "https", "ftp"))
    with pytest.raises(RecordError, match="private address"):
        image_refs(url, source)


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "x/" * 3000, "a" * 300 + ".png"])
def test_names_that_are_no_files_are_bad_records(tmp_path, name):
    for kind in ("json", "store"):
        with pytest.raises(RecordError) as raised:
            source = write(tmp_path, kind, name)
            open_source(source).example(0, Random(0))
            raise RecordError("a path, which decoding refuses")  # of a local file that is not looked at yet
        assert len(str(raised.value)) < 1500


PIECES = [
    "..",
    ".",
    "/",
    "\\",
    "%2e",
    "a",
    "b.png",
    "://",
    "::",
    "file",
    "http",
    "memory",
    "shop",
    "@",
    "?",
    "#",
    "~",
    "\0",
]


@given(
    name=st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    folder=st.sampled_from(["memory://shop/data", "/data/images", "data"]),
    kind=st.sampled_from(["tar", "parquet"]),
)
def test_whatever_a_downloaded_record_names_is_in_its_folder_or_store(name, folder, kind):
    try:
        found = resolve_image(name, Source(path=f"/data/a.{kind}", images=folder))
    except (RecordError, ValueError):
        return
    if "://" in folder:
        assert found.startswith("memory://shop/") and ".." not in found.partition("?")[0].partition("#")[0].split("/")
        assert "::" not in found
    else:
        root = os.path.realpath(folder)
        assert os.path.commonpath([root, os.path.realpath(found)]) == root


@pytest.mark.parametrize("name", ["dataset:someone/data.json", "dataset:data.csv"])
def test_a_dataset_that_is_called_like_a_text_file_is_not_trusted(name):
    with pytest.raises(RecordError, match="is outside of"):
        resolve_image("/etc/hostname", Source(path=name, images="/data"))


def test_columns_of_images_in_a_hub_dataset_do_not_read_the_machine(tmp_path):
    """As a parquet of the Hub may have them: a path without bytes."""
    row = {"img": {"bytes": None, "path": "/etc/hostname"}, "positive": "x"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    source = Source(path=str(tmp_path / "a.parquet"), format="pairs", columns=Columns(query_image="img"))
    with pytest.raises(CafeError, match="is outside of"):
        open_source(source).example(0, Random(0))
