"""A caption's words in other orders, as ARO has them (arXiv 2210.01936).

| order | what changes places |
|---|---|
| `nouns_and_adjectives` | nouns with nouns, adjectives with adjectives |
| `other_words` | all words but nouns and adjectives |
| `within_trigrams` | words within each three that follow one another |
| `trigrams` | these threes, each whole |

A caption's orders follow from its words and the seed alone. Chance may leave the words as they were, and a caption may
be too short for another order: such an order is no candidate.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from random import Random

from cafe.errors import CafeError

MODEL = "en_core_web_sm"
NOUNS, ADJECTIVES = ("NN", "NNS", "NNP", "NNPS"), ("JJ", "JJR", "JJS")  # the Penn Treebank's tags
MAX_NEW_TOKENS = 30  # words of a candidate

Word = tuple[str, str]  # a word or a mark of punctuation, and its tag
Tagger = Callable[[Sequence[str]], list[list[Word]]]


def candidates(tagged: Sequence[Word], seed: int = 0) -> list[str]:
    """The caption, then its other orders, each once.

    All are joined from the same words: nothing but the order tells the caption apart.
    """
    words = [word for word, _ in tagged]
    return list(dict.fromkeys(plain(some) for some in (words, *orders(tagged, seed).values())))


def orders(tagged: Sequence[Word], seed: int = 0) -> dict[str, list[str]]:
    """The words in each of the four orders, by its name."""
    words = [word for word, _ in tagged]
    rng = Random(f"{seed} {' '.join(words)}")
    places = range(len(words))
    nouns = [place for place in places if tagged[place][1] in NOUNS]
    adjectives = [place for place in places if tagged[place][1] in ADJECTIVES]
    others = [place for place in places if place not in {*nouns, *adjectives}]
    threes = [places[start : start + 3] for start in places[::3]]
    return {
        "nouns_and_adjectives": _mixed(words, [nouns, adjectives], rng),
        "other_words": _mixed(words, [others], rng),
        "within_trigrams": _mixed(words, threes, rng),
        "trigrams": [words[place] for three in rng.sample(threes, len(threes)) for place in three],
    }


def _mixed(words: Sequence[str], groups: Iterable[Sequence[int]], rng: Random) -> list[str]:
    """The words, those at each group of places among themselves in an order by lot."""
    mixed = list(words)
    for group in groups:
        for place, other in zip(group, rng.sample(group, len(group)), strict=True):
            mixed[place] = words[other]
    return mixed


def plain(words: Iterable[str]) -> str:
    """The first words as one text in lower case, without the punctuation that ARO's authors leave out."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", " ".join(words).lower()).split()[:MAX_NEW_TOKENS])


def spacy_tags(texts: Sequence[str]) -> list[list[Word]]:
    """The words and their tags by spaCy's small English model, the authors' own choice.

    Raises:
        CafeError: spaCy or the model is not installed.
    """
    if not find_spec("spacy") or not find_spec(MODEL):
        raise CafeError(
            f"The order of words needs the package spaCy and its model {MODEL}: pip install 'cafe-lvlm[aro]', then "
            f"python -m spacy download {MODEL}."
        )
    import spacy

    tagger = spacy.load(MODEL, exclude=["parser", "ner", "lemmatizer"])
    return [[(word.text, word.tag_) for word in text] for text in tagger.pipe(texts)]
