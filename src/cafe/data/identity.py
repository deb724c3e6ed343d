"""What identifies the data that a run reads, so that a change is noticed when the run is resumed."""

import hashlib
import os
from collections.abc import Sequence

from cafe.data.files import file_errors, file_version, is_url
from cafe.data.readers.base import InMemoryRows, Rows, UnreadableFile
from cafe.data.readers.delimited import DelimitedRows
from cafe.data.readers.hf_datasets import HFDataset
from cafe.data.readers.json_lines import JsonLines
from cafe.data.records import OpenedSource

NUM_SAMPLES, SAMPLE_SIZE = 16, 2**16  # blocks of a large file that are hashed, and their bytes
Identity = dict[str, dict[str, int | str]]
"""For each file of a source by its name, the number of its records and a digest of its content."""


def identify_source(opened: OpenedSource) -> Identity:
    """Return what identifies a source: a copy of its files is the same, and so is one that was touched.

    Images that records name by path are not part of it.

    Raises:
        CafeError: a file cannot be read any more.
    """
    return {file.name: {"records": sum(file.chunks), "digest": _digest(file)} for file in opened.files}


def diff_identities(old: Sequence[Identity], new: Sequence[Identity]) -> list[str]:
    """List what differs between the sources of a run then and now, each as half a sentence."""
    differences = []
    for before, after in zip(old, new, strict=True):
        differences += [f"{name} is gone" for name in before if name not in after]
        differences += [f"{name} is new" for name in after if name not in before]
        for name in filter(after.__contains__, before):
            was, now = before[name], after[name]
            if was["records"] != now["records"]:
                differences.append(f"{name} had {was['records']} records and has {now['records']}")
            elif was != now:
                differences.append(f"{name} has other content")
    return differences


def _digest(file: Rows) -> str:
    """Hash the content of a file, or a sample of it where reading all would take long."""
    if isinstance(file, UnreadableFile):
        return "unreadable"
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(file, HFDataset):
        for index in _spread(sum(file.chunks)):
            digest.update(repr(file[index]).encode(errors="surrogatepass"))
        return digest.hexdigest()
    # Its time of change or, better, a hash that the store has made.
    if is_url(file.name):
        return hashlib.blake2b(file_version(file.name).encode(), digest_size=16).hexdigest()
    with file_errors(file.name), open(file.name, "rb") as handle:
        # Opening these kinds has read all of the file already, so that it is cheap to read again.
        if isinstance(file, InMemoryRows | DelimitedRows | JsonLines):
            return hashlib.file_digest(handle, lambda: digest).hexdigest()
        size = os.fstat(handle.fileno()).st_size
        digest.update(str(size).encode())
        for block in _spread(-(-size // SAMPLE_SIZE)):
            handle.seek(block * SAMPLE_SIZE)
            digest.update(handle.read(SAMPLE_SIZE))
    return digest.hexdigest()


def _spread(count: int) -> Sequence[int]:
    """Return at most `NUM_SAMPLES` of so many numbers, evenly spaced, the first and the last among them."""
    if count <= NUM_SAMPLES:
        return range(count)
    return [number * (count - 1) // (NUM_SAMPLES - 1) for number in range(NUM_SAMPLES)]
