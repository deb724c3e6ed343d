"""Drop from encoded images what stands beside the pixels and would make Pillow refuse them."""

import re
from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
# Texts and color profiles, of which Pillow takes only so much. These texts may hold an EXIF orientation.
_SKIPPED_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


def drop_metadata(data: bytes) -> bytes:
    """Return an encoded image without the texts and color profile of a PNG; any other is returned unchanged."""
    if not data.startswith(_PNG):
        return data
    if not any(kind in data for kind in _SKIPPED_CHUNKS):
        return data
    return _PNG + b"".join(chunk for chunk in _png_chunks(data) if not _is_skipped(chunk))


def hide_exif(data: bytes) -> bytes:
    """Return an encoded AVIF without what is called EXIF data, because libavif refuses an image for damaged ones."""
    return re.sub(rb"(infe.{8})Exif", rb"\1free", data, flags=re.DOTALL)


def _png_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the chunks of a PNG: each its length, its kind, its content and a checksum."""
    start = len(_PNG)
    while start < len(data):
        stop = start + 12 + int.from_bytes(data[start : start + 4])
        yield data[start:stop]
        start = stop


def _is_skipped(chunk: bytes) -> bool:
    """Return whether a chunk of a PNG says nothing that decoding needs."""
    return chunk[4:8] in _SKIPPED_CHUNKS and not chunk[8:].startswith(_ORIENTATION_TEXTS)
