"""ARO's order of words: what each order may change, by brute force; the suite on scenes, with their words tagged."""

import itertools
import json
import re
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cafe import Cafe
from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suites import aro, word_order
from cafe.evaluation.suites.choices import METHODS
from cafe.evaluation.suites.word_order import TAGGER_MODEL, candidates, orders, plain, spacy_tags
from cafe.scenes.world import COLORS, KINDS, SIZES

CAPTION = "A small red circle, left of a large blue star."


def scene_tags(texts):
    """The tags of the scenes' closed vocabulary; all that is no thing, color or size is some other word."""
    kinds = dict.fromkeys(KINDS, "NN") | dict.fromkeys((*COLORS, *SIZES), "JJ")
    return [[(word, kinds.get(word, "IN")) for word in re.findall(r"\w+|[^\w\s]", text)] for text in texts]


def tagged(tags):
    """Words that name their places, so that each can be told where it came from."""
    return [(f"w{place}", tag) for place, tag in enumerate(tags)]


def threes(words):
    return [tuple(words[start : start + 3]) for start in range(0, len(words), 3)]


@given(
    st.lists(st.sampled_from(["NN", "NNS", "NNP", "NNPS", "JJ", "JJR", "JJS", "IN", "DT", "VBZ", "."])), st.integers()
)
def test_each_order_changes_only_what_it_may(tags, seed):
    caption = tagged(tags)
    words, of = [word for word, _ in caption], dict(caption)
    found = orders(caption, seed)
    assert found == orders(caption, seed)
    assert all(Counter(order) == Counter(words) for order in found.values())
    for before, after, tag in zip(words, found["nouns_and_adjectives"], tags, strict=True):
        assert of[after][:2] == tag[:2] if tag[:2] in ("NN", "JJ") else after == before
    for before, after, tag in zip(words, found["other_words"], tags, strict=True):
        assert after == before if tag[:2] in ("NN", "JJ") else of[after][:2] not in ("NN", "JJ")
    assert list(map(set, threes(found["within_trigrams"]))) == list(map(set, threes(words)))
    assert len(words) > 12 or tuple(found["trigrams"]) in {
        tuple(itertools.chain(*some)) for some in itertools.permutations(threes(words))
    }


@pytest.mark.parametrize(
    ("order", "tags"),
    [
        ("nouns_and_adjectives", ["NN", "IN", "NNS", "DT", "NNP"]),
        ("other_words", ["DT", "NN", "IN", "JJ", "VBZ"]),
        ("within_trigrams", ["DT"] * 3),
        ("trigrams", ["DT"] * 9),
    ],
)
def test_each_of_the_possible_orders_comes_equally_often(order, tags):
    counts = Counter(tuple(orders(tagged(tags), seed)[order]) for seed in range(6000))
    assert len(counts) == 6 and all(abs(count - 1000) < 5 * np.sqrt(6000 * 5 / 36) for count in counts.values())


def test_the_caption_comes_first_and_its_own_order_is_not_a_candidate():
    [caption] = scene_tags([CAPTION])
    for seed in range(50):
        first, *others = candidates(caption, seed)
        assert first == "a small red circle , left of a large blue star" and others
        assert {first, *others} == {plain(words) for words in orders(caption, seed).values()} | {first}
        assert len({first, *others}) == 1 + len(others) <= 5
    for short in ("Circle.", "red red", ""):
        assert len(candidates(*scene_tags([short]))) == 1


def test_a_text_is_cleaned_by_the_authors_rules():
    assert plain(['A "Big"', "dog;", "(brown),", "it's", "#1: ~ *. !"]) == "a big dog brown , it's 1"
    assert plain(map(str, range(40))).split() == [str(number) for number in range(30)]


class Reads:
    """Knows whole captions by heart, or only the words of them."""

    def __init__(self, captions, in_order: bool) -> None:
        self.in_order, self.asked = in_order, 0
        self.known = set(captions)

    def _fits(self, text: str) -> float:
        return float(not self.in_order or text in self.known)

    def embed(self, contents, batch_size=32):
        self.asked += 1
        rows = [[self._fits(one), 1 - self._fits(one)] if isinstance(one, str) else [1, 0] for one in contents]
        return np.array(rows, np.float32)

    def score_batch(self, contents, answers, batch_size=16):
        return [
            np.array([self._fits(text) if not isinstance(content, str) else 0.0 for text in said])
            for content, said in zip(contents, answers, strict=True)
        ]


@pytest.fixture
def captioned(tmp_path):
    """One image in both of ARO's Karpathy files, with the captions that are asked for."""

    def write(*captions):
        Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
        rows = [{"filename": "one.png", "split": "test", "sentences": [{"raw": text} for text in captions]}]
        (tmp_path / "aro").mkdir()
        for name in ("coco", "flickr30k"):
            (tmp_path / "aro" / f"dataset_{name}.json").write_text(json.dumps({"images": rows}))
        return tmp_path

    return write


def test_a_model_that_reads_order_is_right_a_bag_of_words_never(captioned):
    texts = [CAPTION, "a big green ring over a small red heart", "Circle."]
    data = captioned(*texts)
    known = [candidates(words)[0] for words in scene_tags(texts)]
    assert [path.name for path in aro.find(data)] == ["dataset_coco.json", "dataset_flickr30k.json"]
    for in_order in (True, False):
        done = aro.run(CachedModel(Reads(known, in_order)), data, None, scene_tags)
        for part in ("coco_order", "flickr30k_order"):
            assert {done.results[f"aro/{part}/{way}"] for way in METHODS} == {100.0 * in_order}
            lengths = [len(candidates(words)) for words in scene_tags(texts[:2])]
            assert done.results[f"aro/{part}/chance"] == pytest.approx(100 * np.mean([1 / n for n in lengths]))
            assert done.results[f"aro/{part}/left_out"] == 1


def test_captions_without_another_order_are_all_left_out(captioned):
    results = aro.run(CachedModel(Reads([], True)), captioned("Circle.", "Star."), None, scene_tags).results
    assert results == {"aro/coco_order/left_out": 2, "aro/flickr30k_order/left_out": 2}


def test_a_missing_tagger_is_reported_before_anything_is_scored(captioned, monkeypatch):
    model = Reads([], True)
    for missing in ("spacy", TAGGER_MODEL):
        monkeypatch.setattr(word_order, "find_spec", lambda name, missing=missing: name != missing or None)
        with pytest.raises(CafeError, match=rf"{TAGGER_MODEL}: pip install 'cafe-lvlm\[aro\]'"):
            spacy_tags([CAPTION])
    with pytest.raises(CafeError, match="spaCy"):
        aro.run(CachedModel(model), captioned(CAPTION), None)
    assert not model.asked


@pytest.mark.skipif(not find_spec("spacy") or not find_spec(TAGGER_MODEL), reason="spaCy or its model is not installed")
def test_spacy_finds_the_nouns_and_adjectives_of_captions():
    tags = spacy_tags(["A small brown dog chases two white cats.", "People's hats are on the old table"])
    kinds = [{kind: [word for word, tag in one if tag[:2] == kind] for kind in ("NN", "JJ")} for one in tags]
    assert kinds[0] == {"NN": ["dog", "cats"], "JJ": ["small", "brown", "white"]}
    assert kinds[1] == {"NN": ["People", "hats", "table"], "JJ": ["old"]}


def test_the_scenes_karpathy_file_with_a_real_model(scenes, random_base, tmp_path):
    (tmp_path / "aro").mkdir()
    (tmp_path / "images").symlink_to(scenes / "images")
    (tmp_path / "aro" / "dataset_coco.json").write_text((scenes / "dataset_scenes.json").read_text())
    model = Cafe.load(random_base)
    done = aro.run(CachedModel(model), tmp_path, 4, scene_tags)
    [(part, rows)] = done.outputs.items()
    assert part == "aro/coco_order" and len(rows) == 8 and done.results["aro/coco_order/left_out"] == 0
    sentences = json.loads((scenes / "dataset_scenes.json").read_text())["images"]
    said = {plain(re.findall(r"\w+|[^\w\s]", text["raw"])) for row in sentences for text in row["sentences"]}
    for row in rows:
        assert row["captions"][0] in said and len({" ".join(sorted(text.split())) for text in row["captions"]}) == 1
    for way in METHODS:
        right = [row["scores"][way][0] > max(row["scores"][way][1:]) for row in rows]
        assert done.results[f"aro/coco_order/{way}"] == pytest.approx(100 * np.mean(right))
    image, *texts = (model.embed([one])[0] for one in (tmp_path / rows[0]["image"], *rows[0]["captions"]))
    np.testing.assert_allclose(rows[0]["scores"]["embedding"], [image @ text for text in texts], atol=1e-5)
