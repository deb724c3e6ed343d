"""A caption's words in other orders, as in ARO (arXiv 2210.01936).

| order | what changes places |
|---|---|
| `nouns_and_adjectives` | nouns with nouns, adjectives with adjectives |
| `other_words` | all words but nouns and adjectives |
| `within_trigrams` | the words within each three consecutive ones |
| `trigrams` | these threes, each as a whole |

A caption's orders depend on its words and the seed alone. A shuffle may leave the words as they were, and a caption may
be too short for another order: such an order is not a candidate.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from itertools import chain
from random import Random

from cafe.errors import MissingPackageError

TAGGER_MODEL = "en_core_web_sm"
NOUNS, ADJECTIVES = ("NN", "NNS", "NNP", "NNPS"), ("JJ", "JJR", "JJS")  # the Penn Treebank's tags
MAX_WORDS = 30  # of a candidate

Word = tuple[str, str]  # a word or a punctuation mark, and its tag
Tagger = Callable[[Sequence[str]], list[list[Word]]]


def candidates(tagged: Sequence[Word], seed: int = 0) -> list[str]:
    """List the caption, then its other orders, each once.

    All are joined from the same words: only the order distinguishes the caption.

    Args:
        tagged: the caption's words with their tags.
        seed: of the shuffles.
    """
    words = [word for word, _ in tagged]
    texts = [plain(order) for order in (words, *orders(tagged, seed).values())]
    return list(dict.fromkeys(texts))


def orders(tagged: Sequence[Word], seed: int = 0) -> dict[str, list[str]]:
    """Shuffle the words in each of the four ways, by name.

    Args:
        tagged: the caption's words with their tags.
        seed: of the shuffles.
    """
    words = [word for word, _ in tagged]
    # Seeded by the words, so that a caption's orders do not depend on the captions before it.
    rng = Random(f"{seed} {' '.join(words)}")
    positions = range(len(words))
    nouns = [position for position in positions if tagged[position][1] in NOUNS]
    adjectives = [position for position in positions if tagged[position][1] in ADJECTIVES]
    others = sorted(set(positions) - {*nouns, *adjectives})
    trigrams = [positions[start : start + 3] for start in positions[::3]]
    # The generator is shared, so the four are always shuffled in this order.
    return {
        "nouns_and_adjectives": _shuffle_within(words, [nouns, adjectives], rng),
        "other_words": _shuffle_within(words, [others], rng),
        "within_trigrams": _shuffle_within(words, trigrams, rng),
        "trigrams": [words[position] for position in chain(*rng.sample(trigrams, len(trigrams)))],
    }


def _shuffle_within(words: Sequence[str], groups: Iterable[Sequence[int]], rng: Random) -> list[str]:
    """Shuffle the words at each group of positions among themselves."""
    # The groups do not overlap; words outside them stay.
    shuffled = list(words)
    for group in groups:
        for position, source in zip(group, rng.sample(group, len(group)), strict=True):
            shuffled[position] = words[source]
    return shuffled


def plain(words: Iterable[str]) -> str:
    """Join the first words as one text in lower case, without the punctuation that ARO's authors remove."""
    text = re.sub(r'[.!"()*#:;~]', " ", " ".join(words).lower())
    return " ".join(text.split()[:MAX_WORDS])


def spacy_tags(texts: Sequence[str]) -> list[list[Word]]:
    """Tag the words of texts by spaCy's small English model, as the authors do.

    Raises:
        MissingPackageError: spaCy or the model is not installed.
    """
    # spaCy installs a model as a package.
    if not all(map(find_spec, ("spacy", TAGGER_MODEL))):
        raise MissingPackageError(
            f"The order of words needs the package spaCy and its model {TAGGER_MODEL}: "
            f"pip install 'cafe-lvlm[aro]', then python -m spacy download {TAGGER_MODEL}."
        )
    import spacy

    tagger = spacy.load(TAGGER_MODEL, exclude=["parser", "ner", "lemmatizer"])
    return [[(word.text, word.tag_) for word in text] for text in tagger.pipe(texts)]
