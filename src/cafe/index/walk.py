"""Find the images and PDF files in a folder."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# What Pillow reads, some of them with a plugin.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".avif", ".jp2", ".ppm", ".heic", ".heif", ".jxl"),
)
PDF_SUFFIX = ".pdf"
# Thumbnails of Synology's photo station, and files of tools; hidden files and folders are left out as well.
EXCLUDED_NAMES = ("@eaDir", "node_modules", ".git")


@dataclass(frozen=True)
class File:
    """Hold a file that was found: its path, its size in bytes and the time it was changed in nanoseconds."""

    path: str
    size: int
    mtime_ns: int

    @property
    def is_pdf(self) -> bool:
        """Return whether it is a PDF file, by its name."""
        return Path(self.path).suffix.lower() == PDF_SUFFIX


@dataclass
class Walk:
    """Hold what a walk has found.

    Attributes:
        files: the files, in order.
        unreadable: folders that could not be listed, with the reasons: what is in them is neither found nor gone.
    """

    files: list[File] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def walk(root: str, hidden: bool = False, exclude: tuple[str, ...] = ()) -> Walk:
    """Find the images and PDF files in a folder and the folders in it, links followed.

    Args:
        root: the folder, or a single file.
        hidden: whether to look at hidden files and folders.
        exclude: names of files and folders to leave out, besides those that are never photographs.
    """
    found = Walk()
    if os.path.isfile(root):
        _add_file(found, root)
        return found
    # Links may lead in circles, also by way of the folders that the root is in.
    visited = {_identity(folder) for folder in Path(os.path.realpath(root)).parents}
    folders = [root]
    while folders:
        folder = folders.pop()
        try:
            identity = _identity(folder)
            if identity in visited:
                continue
            visited.add(identity)
            entries = sorted(_entries(folder, hidden, exclude), key=lambda entry: entry.name)
        except FileNotFoundError:  # deleted while its parent was listed
            continue
        except OSError as error:
            found.unreadable[folder] = f"The folder cannot be listed: {error.strerror or error}."
            continue
        # The last one is visited first.
        folders += [entry.path for entry in reversed(entries) if _is_folder(entry)]
        for entry in entries:
            if not _is_folder(entry):
                _add_file(found, entry.path)
    return found


def is_left_out(name: str, hidden: bool, exclude: tuple[str, ...]) -> bool:
    """Return whether a walk leaves out files and folders of a name; the arguments are those of `walk`."""
    return (name.startswith(".") and not hidden) or name in EXCLUDED_NAMES or name in exclude


def _entries(folder: str, hidden: bool, exclude: tuple[str, ...]) -> Iterator["os.DirEntry[str]"]:
    """Yield what is in a folder and not left out."""
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not is_left_out(entry.name, hidden, exclude))


def _identity(folder: str | Path) -> tuple[int, int]:
    """Return what a folder is the same by, whatever its path is."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Return whether something is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


def _add_file(found: Walk, path: str) -> None:
    """Add a file if it is one that can be indexed and is still there."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in IMAGE_SUFFIXES and suffix != PDF_SUFFIX:
        return
    try:
        status = os.stat(path)
    except FileNotFoundError:  # deleted in the meantime, or a link to nothing
        return
    except OSError:
        found.files.append(File(path, -1, -1))  # reading it will say what is wrong
        return
    found.files.append(File(path, status.st_size, status.st_mtime_ns))
