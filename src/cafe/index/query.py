"""What is searched for: words, images, or a weighted sum of both."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from cafe.content import Content
from cafe.errors import CafeError
from cafe.index.walk import IMAGE_SUFFIXES
from cafe.model import Cafe
from cafe.utils.text import shorten

_PATH_BEGINNINGS = ("./", "../", "/", "~/")  # of terms that are paths whatever follows
_URL_BEGINNINGS = ("http://", "https://")
# Not "10:30" or "16:9", which are words.
_WEIGHTED = re.compile(r"(\d+\.?\d*|\.\d+):(?!\d)(.+)", re.DOTALL)
_SIGNS = {"+": 1.0, "-": -1.0}
_MIN_NORM = 1e-3  # of the sum of terms, relative to their weights; below is what rounding leaves of nothing


class EmptyQueryError(CafeError):
    """Report a query that searches for nothing."""


@dataclass(frozen=True)
class Term:
    """Hold one part of a query, and its weight in the sum, which is negative for what is not wanted."""

    content: Content
    weight: float = 1.0


@dataclass(frozen=True)
class Query:
    """Hold the terms of a query, at least one."""

    terms: tuple[Term, ...]

    @classmethod
    def of(cls, value: Any) -> "Query":
        """Make a query of whatever `Content.of` takes: a string is words, a `Path` is an image.

        Raises:
            EmptyQueryError: nothing is searched for.
        """
        if isinstance(value, Query):
            return value
        content = Content.of(value)
        if not content.images and not content.text.strip():
            raise EmptyQueryError("There is nothing to search for: give words or an image.")
        return cls((Term(content),))

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Query":
        """Parse the words of a command line.

        Terms are joined by "+" and "-", each a word by itself. A term is the path of an image or words, and may begin
        with its weight and a colon: `./boat.jpg + "at night" - 0.5:people`. A colon between digits, as in "16:9", is
        part of the words.

        Raises:
            CafeError: a term is empty, or an image does not exist.
        """
        # The words of each term, with its sign.
        groups: list[tuple[float, list[str]]] = [(1.0, [])]
        for word in words:
            if word in _SIGNS:
                groups.append((_SIGNS[word], []))
            else:
                groups[-1][1].append(word)
        # A query may begin with a sign.
        if not groups[0][1] and len(groups) > 1:
            del groups[0]
        return cls(tuple(_parse_term(" ".join(group), sign) for sign, group in groups))

    @property
    def words(self) -> str:
        """Return the words of a query that is words alone and excludes nothing; otherwise none."""
        if any(term.content.images or term.weight < 0 for term in self.terms):
            return ""
        return " ".join(term.content.text for term in self.terms)

    @property
    def has_words(self) -> bool:
        """Return whether any term has words."""
        return any(term.content.text for term in self.terms)

    def embed(self, model: Cafe) -> Float32[np.ndarray, " dim"]:
        """Embed the terms, and return their weighted sum as a unit vector.

        Raises:
            EmptyQueryError: the terms cancel out.
            RecordError: an image cannot be read.
        """
        # Unit vectors, so that weights mean the same for words and images.
        vectors = model.embed([term.content for term in self.terms])
        weights = np.array([term.weight for term in self.terms], np.float32)
        total = weights @ vectors
        norm = float(np.linalg.norm(total))
        if not norm > _MIN_NORM * np.abs(weights).sum():
            raise EmptyQueryError("The terms of the query cancel out, so that nothing is searched for.")
        unit: Float32[np.ndarray, " dim"] = total / norm
        return unit


def _parse_term(text: str, sign: float) -> Term:
    """Parse one term."""
    weighted = _WEIGHTED.fullmatch(text)
    weight = 1.0
    if weighted:
        weight, text = float(weighted[1]), weighted[2]
    if not text.strip():
        raise CafeError("A term of the query is empty: write words or the path of an image beside each + and -.")
    return Term(Content.of(_parse_path(text) or text), sign * weight)


def _parse_path(text: str) -> Path | None:
    """Return the path of an image that a term is; None if it is words.

    Raises:
        CafeError: the image does not exist.
    """
    path = Path(os.path.expanduser(text))
    is_image = path.suffix.lower() in IMAGE_SUFFIXES
    if text.startswith(_URL_BEGINNINGS) and is_image:
        raise CafeError(f"The image {shorten(text)} is not on this machine: download it first.")
    if text.startswith(_PATH_BEGINNINGS):
        if os.path.isdir(path):
            raise CafeError(f"{shorten(text)} is a folder: search by an image in it.")
        if not os.path.exists(path):
            raise CafeError(f"The image {shorten(text)} does not exist.")
        return path
    # The name of a file in this folder, which need not begin with ./
    return path if is_image and os.path.isfile(path) else None
