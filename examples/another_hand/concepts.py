"""Choose the concepts that are drawn, and match the drawings and words of every package to them."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from another_hand.packages import DRAWINGS, WORDS, read_json

GROUPS = {
    "Animals & Nature": "animals and plants",
    "Food & Drink": "food and drink",
    "Travel & Places": "travel and places",
    "Activities": "activities",
    "Objects": "objects",
}
LIST = Path(__file__).parent / "concepts.txt"
UNSEEN = 0.15  # of each subgroup
TRAINING_HANDS = ("twemoji", "fluent", "emojione-v1", "fxemoji")
DEVELOPMENT_HAND = "noto-v1"  # and noto is of the same house, so neither is in training
TEST_HANDS = ("openmoji", "emojione")
LANGUAGES = ("de", "fr", "es", "it", "nl", "pl", "tr", "id", "sw", "fi")  # in Latin letters
# Sets whose chars.json is empty are matched by name, and a name may be older than Unicode's present one.
OLD_NAMES = {
    "eggplant": "aubergine",
    "ewe": "sheep",
    "leopard": "leopardside",
    "locked": "lock",
    "sun": "sunrays",
    "wrapped gift": "present",
}


@dataclass(frozen=True)
class Concept:
    """Hold what is known of a concept: its words, and which hands drew it."""

    emoji: str
    name: str  # English, as CLDR names it
    group: str
    subgroup: str
    keywords: tuple[str, ...]  # English, without the words of the name
    foreign: dict[str, str] = field(hash=False)  # by language, the name
    icons: dict[str, str] = field(hash=False)  # by hand, the name of its drawing in the hand's package
    seen: bool  # whether training shows it


def read_concepts(packages: Path) -> list[Concept]:
    """Read the concepts of the list, with the words and drawings that are matched to them."""
    emojis, read = _reader(packages)
    concepts = []
    for subgroup, names in read_list().items():
        unseen = draw_unseen(subgroup, names)
        concepts += [read(emojis[name], subgroup, name not in unseen) for name in names]
    return concepts


def read_others(packages: Path, concepts: Iterable[Concept]) -> list[Concept]:
    """Read every other concept of the five groups that three training hands drew: more drawings for the vision tower.

    None shares a word with an unseen concept ("brown mushroom" with "mushroom"), and clock faces are left out.
    """
    concepts = list(concepts)
    listed = {concept.name for concept in concepts}
    kept_apart = {word for concept in concepts if not concept.seen for word in concept.name.split()}
    emojis, read = _reader(packages)
    others = []
    for name, emoji in emojis.items():
        words = set(name.replace("-", " ").split())
        if name in listed or words & {*kept_apart, "o’clock", "thirty"}:
            continue
        concept = read(emoji, "", True)
        if len([hand for hand in TRAINING_HANDS if hand in concept.icons]) >= 3:
            others.append(concept)
    return others


def _reader(packages: Path) -> tuple[dict[str, str], Callable[[str, str, bool], Concept]]:
    """Read the tables of words; return the emojis of the five groups by name, and what makes a concept of one."""
    facts = read_json(packages, WORDS["groups"], "data-by-emoji.json")
    words = read_json(packages, WORDS["names"], "annotations/en/annotations.json")["annotations"]["annotations"]
    more = read_json(packages, WORDS["keywords"], "dist/emoji-en-US.json")
    foreign = {language: _names_in(packages, language) for language in LANGUAGES}
    matchers = {hand: Matcher(packages, hand) for hand in DRAWINGS}

    def read(emoji: str, subgroup: str, seen: bool) -> Concept:
        """Make the concept of an emoji."""
        key = plain(emoji)
        name = words[key]["tts"][0]
        icons = {hand: matcher.find(emoji, name, facts[emoji]["name"]) for hand, matcher in matchers.items()}
        given = [*words[key]["default"], *(word.replace("_", " ") for word in more.get(emoji, []))]
        return Concept(
            emoji=key,
            name=name,
            group=GROUPS[facts[emoji]["group"]],
            subgroup=subgroup,
            keywords=tuple(without_words_of(name, given)),
            foreign={language: names[key] for language, names in foreign.items() if key in names},
            icons={hand: icon for hand, icon in icons.items() if icon},
            seen=seen,
        )

    emojis = {}
    for emoji, fact in facts.items():
        if fact["group"] in GROUPS and plain(emoji) in words:
            emojis[words[plain(emoji)]["tts"][0]] = emoji
    return emojis, read


def read_list() -> dict[str, list[str]]:
    """Read the names of each subgroup."""
    lines = [line for line in LIST.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    parts = [line.partition(": ") for line in lines]
    return {subgroup: names.split(", ") for subgroup, _, names in parts}


def draw_unseen(subgroup: str, names: list[str]) -> set[str]:
    """Draw the concepts of a subgroup that no training image shows; fork and knife stays, for it goes with pizza."""
    candidates = [name for name in names if name not in ("fork and knife", "pizza")]
    return set(Random(f"unseen {subgroup}").sample(candidates, max(1, round(UNSEEN * len(names)))))


def training_hands(concepts: Iterable[Concept]) -> dict[str, list[str]]:
    """Return the training hands that drew each seen concept, by its name."""
    return {c.name: [hand for hand in TRAINING_HANDS if hand in c.icons] for c in concepts if c.seen}


def _names_in(packages: Path, language: str) -> dict[str, str]:
    """Read the names in another language, by emoji."""
    path = f"annotations/{language}/annotations.json"
    entries = read_json(packages, WORDS["names"], path)["annotations"]["annotations"]
    return {emoji: entry["tts"][0] for emoji, entry in entries.items() if "tts" in entry}


def plain(emoji: str) -> str:
    """Remove the variation selector, which some files write and others do not."""
    return emoji.replace("\ufe0f", "")


def slug(name: str) -> str:
    """Write a name as the packages name files: lower case, with hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def without_words_of(name: str, keywords: Iterable[str]) -> list[str]:
    """Keep the keywords that share no word with a name, nor a part of one ("foxes" for fox, "bee" for honeybee)."""
    own = _long_words(name)
    kept = []
    for keyword in map(str.lower, keywords):
        is_part = any(_stem(word) in other for word in _long_words(keyword) for other in own)
        if not is_part and not any(_stem(word) in keyword for word in own):
            kept.append(keyword)
    return list(dict.fromkeys(kept))


def _long_words(text: str) -> list[str]:
    """List the words of a text that have more than two letters."""
    return [word for word in re.findall(r"[a-z]+", text.lower()) if len(word) > 2]


def _stem(word: str) -> str:
    """Drop the ending of a plural."""
    return word[:-1] if word.endswith("s") and len(word) > 3 else word


class Matcher:
    """Find a concept's drawing in one hand's package: by character where the package tells it, otherwise by name."""

    def __init__(self, packages: Path, hand: str) -> None:
        icons = read_json(packages, DRAWINGS[hand], "icons.json")
        self.names = set(icons["icons"]) | set(icons.get("aliases", {}))
        # An empty chars.json is a list.
        chars: Any = read_json(packages, DRAWINGS[hand], "chars.json") or {}
        self.by_character = {code.replace("-fe0f", ""): name for code, name in chars.items()}
        self.joins_words = hand == "fxemoji"

    def find(self, emoji: str, *names: str) -> str | None:
        """Return the name of the drawing, or None."""
        code = "-".join(f"{ord(character):x}" for character in plain(emoji))
        if self.by_character:
            return self.by_character.get(code)
        for name in [*names, OLD_NAMES.get(names[0], "")]:
            candidate = slug(name).replace("-", "") if self.joins_words else slug(name)
            if candidate in self.names:
                return candidate
        return None
