"""COCO's annotations of objects in images, and the words of a text that name objects.

CHAIR and THRONE judge descriptions by these. The words are those of CHAIR's authors (github.com/LisaAnne/Hallucination,
BSD 2-Clause): `coco_synonyms.txt` is their `data/synonyms.txt`, each word once; a list of one's own replaces it as
`annotations/synonyms.txt`. `coco_words.json` has the special cases of their `utils/chair.py`, and irregular plurals.

A text is read in their steps: split into words, each in the singular; pairs that belong together are joined ("home
plate"); each word or pair is looked up. Their code never finds four words of their list, by the way it is written
("motor bike", "cheesecake", "iphone", "stove top oven"), and a package that makes wrong singulars of a few others
("bus"); all of these are found here.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import product
from pathlib import Path

from cafe.content import Content, ImageRef
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.io import find_image, find_one, load_json, read_text

_TABLES = files("cafe.evaluation.suites")
_WORDS = json.loads(_TABLES.joinpath("coco_words.json").read_text(encoding="utf-8"))
SYNONYMS = _TABLES.joinpath("coco_synonyms.txt").read_text(encoding="utf-8")

# A hyphen makes one word of two ("man-made" names nobody), and punctuation keeps two apart ("at home, plates").
_TOKEN = re.compile(r"\w+(?:[-/]\w+)*|[^\w\s]")
# CHAIR's special cases: what two words mean together, where that is not what either means. Before an animal or a
# vehicle, "baby", "adult" and "passenger" are not a person.
ANIMALS: list[str] = _WORDS["animals"]
COMPOUNDS: dict[str, str] = (
    {compound: compound for compound in _WORDS["compounds"]}
    | {f"{age} {animal}": animal for age, animal in product(_WORDS["ages"], ANIMALS)}
    | {f"passenger {vehicle}": vehicle for vehicle in _WORDS["vehicles"]}
    | _WORDS["heads"]
)


@dataclass(frozen=True)
class Vocabulary:
    """Know which words name which class.

    Attributes:
        classes: the names of the classes.
        words: maps terms of one or more words, in the singular, to the class they name; None for a term that only looks
            like an object.
        singulars: maps plurals of the terms' words to their singular.
    """

    classes: tuple[str, ...]
    words: dict[str, str | None]
    singulars: dict[str, str]

    @cached_property
    def _longest(self) -> int:
        """The number of words of the longest term."""
        return max((len(term.split()) for term in self.words), default=1)

    def mentions(self, text: str) -> list[str]:
        """List the class of each mention of an object in a text, in order; the longest matching term wins."""
        tokens = [self.singulars.get(token, token) for token in _TOKEN.findall(text.lower())]
        terms = self._join(tokens)
        # A special case of CHAIR: "the seat of the toilet" is not a chair.
        if "toilet" in map(COMPOUNDS.get, terms, terms):
            terms = [term for term in terms if term != "seat"]
        classes = map(self.words.get, terms)
        return [name for name in classes if name is not None]

    def _join(self, tokens: list[str]) -> list[str]:
        """Join words that are one term, the longest first; words of one term are not read again."""
        terms: list[str] = []
        position = 0
        while position < len(tokens):
            # "hot dog" is tried before "hot", which need not be a term.
            for length in range(self._longest, 0, -1):
                term = " ".join(tokens[position : position + length])
                if length == 1 or term in self.words:
                    break
            terms.append(term)
            position += term.count(" ") + 1
        return terms


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
        terms = synonyms_of.get(name.lower(), [_words_of(name)])
        words |= dict.fromkeys(filter(None, terms), name)
    # 2. Compounds mean what their head means: nothing, if no class has that word. Most are their own head.
    words |= {compound: words.get(head) for compound, head in COMPOUNDS.items()}
    # 3. The plurals of all words in these terms; a word that is in a term itself stays as it is.
    singles = dict.fromkeys(word for term in words for word in term.split())
    singulars = {form: word for word in singles for form in plurals(word) if form not in singles}
    return Vocabulary(names, words, singulars)


def _parse_synonyms(synonyms: str) -> dict[str, list[str]]:
    """Map the name that begins each line to all words of the line."""
    synonyms_of = {}
    for line in synonyms.lower().splitlines():
        name, *_ = terms = line.split(",")
        synonyms_of[name.strip()] = list(map(_words_of, terms))
    return synonyms_of


def _words_of(term: str) -> str:
    """Write a term as its words are found in a text, joined by single spaces."""
    return " ".join(_TOKEN.findall(term.lower()))


def plurals(word: str) -> list[str]:
    """Form the plurals of a word: by rule, and the irregular one of its ending ("policeman", "grandchild").

    They are only compared with words of texts, so a plural that nobody writes ("sheeps") does no harm.
    """
    if re.search(r"(s|x|z|ch|sh)$", word):  # buses
        forms = [word + "es"]
    elif re.search(r"[^aeiou]y$", word):  # puppies, but not toys
        forms = [word[:-1] + "ies"]
    elif word.endswith("o"):  # buffalos, buffaloes
        forms = [word + "s", word + "es"]
    else:
        forms = [word + "s"]
    for ending, irregular in _WORDS["irregular_plurals"].items():
        if word.endswith(ending):
            forms.append(word.removesuffix(ending) + irregular)
    return forms


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
    parsed = load_json(path, "a COCO instances file")
    try:
        classes = {row["id"]: row["name"] for row in parsed["categories"]}
        names = {row["id"]: row["file_name"] for row in parsed["images"][:limit]}
        # An image without annotations shows nothing. Annotations of images beyond the limit are left out.
        objects: dict[int, set[str]] = {number: set() for number in names}
        for row in parsed["annotations"]:
            if row["image_id"] in objects:
                objects[row["image_id"]].add(classes[row["category_id"]])
        # "prompt" is not COCO's: a file of your own may say how to ask for a description.
        prompt = (parsed.get("info") or {}).get("prompt", "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CafeError(f"The evaluation file {path} is not a COCO instances file: {error!r}.") from None
    if not names or not classes:
        raise CafeError(f"The evaluation file {path} holds no image or no category.")
    for text in (*names.values(), *classes.values(), prompt or " "):
        if not isinstance(text, str) or not text:
            raise CafeError(f"A name or the prompt in the evaluation file {path} is not text, but {text!r:.40}.")
    words = vocabulary(classes.values(), _read_synonyms(path.with_name("synonyms.txt")))
    return AnnotatedImages(path, names, objects, words, prompt)


def _read_synonyms(path: Path) -> str:
    """Read a file's own list of words, or take ours."""
    return read_text(path) if path.is_file() else SYNONYMS


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
    parsed = load_json(path, "a COCO captions file")
    try:
        for row in parsed["annotations"]:
            if row["image_id"] in mentioned:
                mentioned[row["image_id"]].update(images.vocabulary.mentions(row["caption"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
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
