"""COCO's annotations of objects in images, and the words of a text that name objects.

CHAIR and THRONE judge descriptions by these. `coco_synonyms.txt` has our words for COCO's 80 classes: what a class is
commonly called, in the singular, one class per line, its name first. CHAIR's authors keep a longer list in the same
format (github.com/LisaAnne/Hallucination, data/synonyms.txt), which replaces ours as `annotations/synonyms.txt`.
`coco_words.json` has irregular plurals and the compounds that CHAIR treats specially.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from cafe.content import Content, ImageRef
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import find_image, find_one

_TABLES = files("cafe.evaluation.suites")
_WORDS = json.loads(_TABLES.joinpath("coco_words.json").read_text(encoding="utf-8"))
SYNONYMS = _TABLES.joinpath("coco_synonyms.txt").read_text(encoding="utf-8")

MAX_TERM_WORDS = 3
# CHAIR's special cases. A compound holds no object, or another one than its words say; and before an animal or a
# vehicle, "baby", "adult" and "passenger" are not a person.
COMPOUNDS: dict[str, str | None] = _WORDS["compounds"]
ANIMALS: list[str] = _WORDS["animals"]
QUALIFIERS = {
    **{animal: _WORDS["ages"] for animal in ANIMALS},
    **{vehicle: ["passenger"] for vehicle in ("jet", "train")},
}


@dataclass(frozen=True)
class Vocabulary:
    """Know which words name which class.

    Attributes:
        classes: the names of the classes.
        words: maps terms of one or more words to the class they name; None for a term that only looks like an object.
    """

    classes: tuple[str, ...]
    words: dict[str, str | None]

    def mentions(self, text: str) -> list[str]:
        """List the class of each mention of an object in a text, in order; the longest matching term wins."""
        words = re.findall(r"[a-z0-9]+", text.lower().replace("'s ", " "))
        classes: list[str] = []
        position = 0
        while position < len(words):
            term = self._longest_term(words[position : position + MAX_TERM_WORDS])
            name = self.words.get(term)
            # A special case of CHAIR: "the seat of the toilet" is not a chair.
            is_toilet_seat = term in ("seat", "seats") and "toilet" in words
            if name and not is_toilet_seat:
                classes.append(name)
            position += len(term.split())  # words of one term are not read again
        return classes

    def _longest_term(self, words: list[str]) -> str:
        """Find the longest known term that these words begin with; the first word if there is none."""
        # "hot dog" is tried before "hot".
        for length in range(len(words), 1, -1):
            term = " ".join(words[:length])
            if term in self.words:
                return term
        return words[0]


def vocabulary(classes: Iterable[str], synonyms: str = SYNONYMS) -> Vocabulary:
    """Collect the words for some classes, in the singular and the plural.

    Args:
        classes: names; a class that begins no line of the synonyms is named by its name alone.
        synonyms: lines of comma-separated words, of which the first is the class's name.
    """
    # 1. Each class's own terms; of two classes with the same term, the later one has it.
    names = tuple(classes)
    synonyms_of = _parse_synonyms(synonyms)
    words: dict[str, str | None] = {}
    for name in names:
        terms = synonyms_of.get(name.lower(), [name.lower()])
        words |= dict.fromkeys(filter(None, terms), name)
    # 2. Compounds and plurals, which do not replace a term of the list.
    for compound, head in COMPOUNDS.items():
        words.setdefault(compound, words.get(head) if head else None)
    for term in list(words):
        words.setdefault(plural(term), words[term])
    # 3. Last, so that "baby elephant" is the elephant even where a list of words says otherwise.
    for head, qualifiers in QUALIFIERS.items():
        for form, qualifier in product((head, plural(head)), qualifiers):
            words[f"{qualifier} {form}"] = words.get(form)
    return Vocabulary(names, words)


def _parse_synonyms(synonyms: str) -> dict[str, list[str]]:
    """Map the name that begins each line to all words of the line."""
    synonyms_of = {}
    for line in synonyms.lower().splitlines():
        terms = [term.strip() for term in line.split(",")]
        synonyms_of[terms[0]] = terms
    return synonyms_of


def plural(term: str) -> str:
    """Form the plural of a term's last word, by rule or, for COCO's irregular words, from the table.

    It is only compared with words of texts, so a plural that nobody writes ("sheeps") does no harm.
    """
    head, _, word = term.rpartition(" ")
    irregular = _WORDS["irregular_plurals"].get(word)
    if irregular:
        form = irregular
    elif re.search(r"(s|x|z|ch|sh)$", word):  # buses
        form = word + "es"
    elif re.search(r"[^aeiou]y$", word):  # teddies, but not toys
        form = word[:-1] + "ies"
    else:
        form = word + "s"
    return f"{head} {form}".strip()


@dataclass(frozen=True)
class AnnotatedImages:
    """Hold images of which all objects are known.

    Attributes:
        source: the annotation file.
        names: the images' file names, by id.
        objects: the classes that each image shows, by id.
        vocabulary: all classes, and the words for them.
        prompt: the file's own request for a description; empty if it has none.
    """

    source: Path
    names: dict[int, str]
    objects: dict[int, set[str]]
    vocabulary: Vocabulary
    prompt: str


def find_instances(data: Path, year: str) -> list[Path]:
    """Find the annotation file of a year, such as "val2014", or else the only one there is.

    Raises:
        CafeError: there are several, of other years.
    """
    # A file of your own, or the annotations of another year, may have any name.
    return find_one(data, f"annotations/instances_{year}.json") or find_one(data, "annotations/instances_*.json")


def read_instances(path: Path, limit: int | None = None) -> AnnotatedImages:
    """Read COCO's `instances_*.json`: the first `limit` images and the classes that each shows.

    `annotations/synonyms.txt`, if it exists, says which words name which class.

    Args:
        path: the file.
        limit: the number of images; all of them if None.

    Raises:
        CafeError: the file does not have COCO's format.
    """
    try:
        parsed: dict[str, Any] = json.loads(path.read_text())
        classes = {row["id"]: row["name"] for row in parsed["categories"]}
        names = {row["id"]: row["file_name"] for row in parsed["images"][:limit]}
        # An image without annotations shows nothing. Annotations of images beyond the limit are left out.
        objects: dict[int, set[str]] = {number: set() for number in names}
        for row in parsed["annotations"]:
            if row["image_id"] in objects:
                objects[row["image_id"]].add(classes[row["category_id"]])
    except (ValueError, KeyError, TypeError) as error:
        raise CafeError(f"The evaluation file {path} is not a COCO instances file: {error!r}.") from None
    if not names or not classes:
        raise CafeError(f"The evaluation file {path} holds no image or no category.")
    words = vocabulary(classes.values(), _read_synonyms(path.with_name("synonyms.txt")))
    # "prompt" is not COCO's: a file of your own may say how to ask for a description.
    info = parsed.get("info") or {}
    return AnnotatedImages(path, names, objects, words, info.get("prompt", ""))


def _read_synonyms(path: Path) -> str:
    """Read a file's own list of words, or take ours."""
    return path.read_text() if path.is_file() else SYNONYMS


def read_captions(path: Path, images: AnnotatedImages) -> dict[int, set[str]]:
    """Read COCO's `captions_*.json`: the classes that the captions of each image mention.

    Args:
        path: the file.
        images: the images whose captions are read, with the words for their classes.

    Raises:
        CafeError: the file does not have COCO's format.
    """
    # People mention objects that have no box; CHAIR counts them as present.
    mentioned: dict[int, set[str]] = {number: set() for number in images.names}
    try:
        for row in json.loads(path.read_text())["annotations"]:
            if row["image_id"] in mentioned:
                mentioned[row["image_id"]].update(images.vocabulary.mentions(row["caption"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CafeError(f"The evaluation file {path} is not a COCO captions file: {error!r}.") from None
    return mentioned


def describe_images(
    model: CachedModel, data: Path, images: AnnotatedImages, folder: str, prompt: str, max_new_tokens: int
) -> Iterator[tuple[int, Path, str]]:
    """Ask for a description of each image.

    Args:
        model: the model.
        data: the folder of evaluation files.
        images: the images; their file's own prompt comes before `prompt`.
        folder: where the images may be, besides the usual places.
        prompt: the protocol's request for a description.
        max_new_tokens: the length of a description.

    Returns:
        the id, the path relative to `data` and the description of each image.
    """
    # All images are looked up before the model starts: a missing one should not cost hours.
    paths = [find_image(name, data, images.source, folder) for name in images.names.values()]
    request = images.prompt or prompt
    contents = [Content((ImageRef(data / path), request)) for path in paths]
    return zip(images.names, paths, model.generate(contents, max_new_tokens), strict=True)
