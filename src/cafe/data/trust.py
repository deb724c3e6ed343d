"""Which images a record may name.

A recipe is trusted, and so are the sources that it names; what their records name is not:

- A local JSON, JSON-lines, CSV or TSV file may name files by absolute paths, as people write them, and files in its
  folder of images, but does not leave that folder by `..`.
- Everything else may come from a stranger: a tar, a parquet file, a dataset, whatever is on an object store. Its
  records name images in the source's folder of images alone, links resolved, or in the store that this folder is on.
- `Source.allow_outside` lifts both. Other URLs need their scheme in `Source.allow_urls`, and a private address, as of
  the machine itself, a cluster or a cloud's metadata, is never asked.
"""

import ipaddress
import os
import posixpath
import re
import socket
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cafe.data.files import is_url, is_web, local_path
from cafe.data.source import Source
from cafe.errors import RecordError
from cafe.utils.paths import is_within
from cafe.utils.text import shorten

TRUSTED_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")  # of local files whose absolute paths are followed
_STORE_DEPTH = {"hf": 3}  # folders that name a store where the first alone does not: hf://datasets/ORG/NAME
# Schemes whose first part names a bucket, which is no host that could be a private one.
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "hf", "memory")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses within IPv6, which Python counts as public


def resolve_image(name: str, source: Source) -> str:
    """Return the path or URL that a record's name of an image stands for.

    Args:
        name: a path, relative to the source's folder of images or absolute, or a URL.
        source: the source; its `path` is the file of the record.

    Raises:
        RecordError: the record may not name it.
    """
    _check_characters(name)
    folder = local_path(source.folder)
    if is_url(name):
        return _resolve_url(name, source)
    if folder is not None or Path(name).is_absolute():
        return _resolve_path(name, source)
    return _resolve_in_store(f"{source.folder.rstrip('/')}/{name}", name, source)


def is_in_store(name: str, source: Source) -> bool:
    """Return whether a URL is on the store that the source's images are on."""
    folder = source.folder
    return is_url(folder) and _is_below(name, _store_of(folder))


def check_inside(path: str | Path, source: Source) -> None:
    """Make sure that a local file that a record leads to is in the source's folder of images, links resolved.

    Raises:
        RecordError: it is not, and `Source.allow_outside` does not allow that.
    """
    if source.allow_outside:
        return
    folder = local_path(source.folder)
    if folder is None or not is_within(path, folder):
        raise _outside(str(path), source)


def is_trusted(source: Source) -> bool:
    """Return whether absolute paths in a source's records are followed: those of a local file that is plain text."""
    path = local_path(source.path)
    if path is None or path.suffix.lower() not in TRUSTED_SUFFIXES:
        return False
    # A dataset may be called so, or a folder.
    return not source.path.startswith("dataset:") and not os.path.isdir(path)


def check_public(host: str, port: int | None = None) -> list[str]:
    """Return the addresses of a host, all of them public.

    Raises:
        RecordError: one of them is private, or there is none.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RecordError(f"the host {host} cannot be found: {error}.") from None
    addresses = [str(address[0]) for *_, address in found]
    for address in addresses:
        if not _is_public(address):
            raise RecordError(f"the host {host} is at the private address {address}, which records may never name.")
    return addresses


def _is_public(address: str) -> bool:
    """Return whether an IP address is one of the Internet, also where it holds another one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is not None:
            return _is_public(str(inner))
        if ip in _NAT64:
            return False
    return ip.is_global and not ip.is_multicast


def _check_characters(name: str) -> None:
    """Raise `RecordError` unless a name can be a file's."""
    if "\0" in name:
        raise RecordError(f"the image {shorten(name)!r} has a NUL character in its name.")
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        raise RecordError(f"the image {shorten(name)!a} has half a character in its name.") from None


def _resolve_path(name: str, source: Source) -> str:
    """Return the local path that a name stands for."""
    folder = local_path(source.folder)
    path = Path(name) if folder is None else folder / name
    # A stranger who writes such a file can say no more in it than by an absolute path, so links are not looked at.
    stays = Path(name).is_absolute() or ".." not in Path(name).parts
    if not (is_trusted(source) and stays):
        check_inside(path, source)
    return str(path)


def _resolve_in_store(url: str, name: str, source: Source) -> str:
    """Return the URL that a name on the source's own store stands for, without `..`.

    Args:
        url: the name with the folder before it.
        name: the name as the record has it, for the error.
        source: the source.
    """
    store = _store_of(source.folder)
    path, mark, query = re.fullmatch(r"([^?#]*)([?#]?)(.*)", url[len(store) :], re.DOTALL).groups()  # type: ignore[union-attr]
    # Only where it has to be, because a store may tell a//b from a/b. What leaves the store still begins with `..`.
    if ".." in path.split("/"):
        path = "/" + posixpath.normpath(path.lstrip("/"))
    hidden = unquote(unquote(path)).replace("\\", "/").split("/")
    if (".." in hidden or "::" in name) and not source.allow_outside:
        raise _outside(name, source)
    return f"{store}{path}{mark}{query}"


def _resolve_url(name: str, source: Source) -> str:
    """Return a URL as it is to be read; one of a local file becomes its path."""
    if is_in_store(name, source):
        return _resolve_in_store(name, name, source)
    scheme = name.partition("://")[0].lower()
    # An address of the web may have colons: [::1].
    if "::" in name and not is_web(name):
        raise RecordError(f"the image {shorten(name)} is a chain of URLs, which records may not name.")
    if scheme not in map(str.lower, source.allow_urls):
        raise RecordError(
            f"the image {shorten(name)} is a URL, which records may name only if the source lists its scheme: "
            f"allow_urls: [{scheme}]."
        )
    path = local_path(name)
    if path is not None:
        return str(path)
    if scheme not in _BUCKETS:
        check_public(urlsplit(name).hostname or "")
    return name


def _store_of(folder: str) -> str:
    """Return the beginning of a URL that names its store: the scheme with the bucket, host or repository."""
    scheme, _, path = folder.rpartition("://")
    depth = _STORE_DEPTH.get(scheme.rpartition("::")[2], 1)
    return f"{scheme}://" + "/".join(path.split("/")[:depth])


def _is_below(url: str, store: str) -> bool:
    """Return whether a URL names something on a store."""
    return url.startswith(f"{store}/")


def _outside(name: str, source: Source) -> RecordError:
    """Return the error for an image that a record may not name."""
    return RecordError(
        f"the image {shorten(name)} is outside of {source.folder}, where the source's images are: set the source's "
        "images, or allow_outside: true if its records are trusted."
    )
