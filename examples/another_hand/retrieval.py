"""Make the texts by which single drawings are found, and MMEB's records of finding them, in both directions."""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

from another_hand.concepts import Concept
from another_hand.scenes import Scene, image_path
from cafe.lvlm.prompts import Prompts

IMAGE = "<|image_1|>"  # where an image stands in an MMEB text
KEYWORDS = 4  # of one text, at most
DRAWS = 2  # texts of each kind for one training image
PROMPTS = Prompts()


def by_keywords(concept: Concept, rng: Random) -> str | None:
    """Write some keywords of a concept, none of which shares a word with its name; None if there are none."""
    keywords = rng.sample(concept.keywords, min(KEYWORDS, len(concept.keywords)))
    return ", ".join(keywords) or None


def in_another_language(concept: Concept, rng: Random) -> str | None:
    """Name a concept in a random other language, in a word other than the English one; None if all are the same."""
    names = [name for name in concept.foreign.values() if name.lower() != concept.name.lower()]
    return rng.choice(names) if names else None


def texts(concept: Concept, rng: Random) -> list[str]:
    """List texts for the contrast: a third each are the name, keywords and names in other languages."""
    drawn = []
    for _ in range(DRAWS):
        drawn += [concept.name, by_keywords(concept, rng), in_another_language(concept, rng)]
    return [text for text in drawn if text]


def retrieval_tables(
    galleries: Sequence[Sequence[Scene]], concepts: Mapping[str, Concept]
) -> dict[str, list[dict[str, Any]]]:
    """Make MMEB-eval's tables of searching single drawings by words, and words by drawings.

    MMEB takes texts as they are, so that they contain the instructions that other embeddings get by themselves.

    Args:
        galleries: single drawings, each of another concept; what is searched is one of them as a whole.
        concepts: by name.

    Returns:
        by table, its rows, whose first candidate is the right one.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    for gallery in galleries:
        for words, found in _words(gallery, concepts).items():
            # Equal words of two concepts have two right answers.
            pairs = [(scene, text) for scene, text in found.items() if list(found.values()).count(text) == 1]
            for scene, text in pairs:
                others = [pair for pair in pairs if pair[0] != scene]
                images = [image_path(scene), *(image_path(other) for other, _ in others)]
                wordings = [_instruct(text), *(_instruct(other) for _, other in others)]
                image_text = f"{IMAGE}\n{PROMPTS.image_instruction}"
                to_text = _row(image_text, images[0], wordings, [""] * len(wordings))
                to_image = _row(wordings[0], "", [image_text] * len(images), images)
                tables.setdefault(f"{words}-image-to-text", []).append(to_text)
                tables.setdefault(f"{words}-text-to-image", []).append(to_image)
    return tables


def _words(gallery: Sequence[Scene], concepts: Mapping[str, Concept]) -> dict[str, dict[Scene, str]]:
    """Make three kinds of texts for each drawing that has them, by kind and drawing."""
    kinds: dict[str, dict[Scene, str]] = {"name": {}, "keywords": {}, "language": {}}
    for scene in gallery:
        concept = concepts[scene.concepts[0]]
        # Equal words for the same concept by two hands.
        rng = Random(f"words {concept.name}")
        drawn = (concept.name, by_keywords(concept, rng), in_another_language(concept, rng))
        for kind, text in zip(kinds, drawn, strict=True):
            if text:
                kinds[kind][scene] = text
    return kinds


def _instruct(text: str) -> str:
    """Append the instruction for texts, as it is in training."""
    return text + PROMPTS.text_instruction


def _row(query: str, image: str, candidates: list[str], images: list[str]) -> dict[str, Any]:
    """Make a row with MMEB-eval's columns."""
    return {"qry_text": query, "qry_img_path": image, "tgt_text": candidates, "tgt_img_path": images}
