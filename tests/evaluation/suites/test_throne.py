"""THRONE's scores against scikit-learn and brute force; its judges against rules and real tiny language models."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import fbeta_score, precision_score, recall_score
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from cafe.errors import CafeError
from cafe.evaluation.cached_model import CachedModel
from cafe.evaluation.suite import aggregate
from cafe.evaluation.suites.coco import vocabulary
from cafe.evaluation.suites.judges import QUESTIONS, LanguageModel, ask, exact, phrase, votes
from cafe.evaluation.suites.throne import agreement, class_scores, contributions, run

CLASSES = ("dog", "cat", "ox")


def test_only_unanimous_pairs_are_stated_and_only_split_ones_are_left_out():
    cast = np.array([[[1, 1, 0, 0]], [[1, 0, 1, 0]]], bool)
    stated, split = agreement(cast)
    assert stated.tolist() == [[True, False, False, False]] and split.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("seed", range(6))
def test_class_and_overall_scores_agree_with_scikit_learn(seed):
    random = np.random.default_rng(seed)
    cast = random.random((2, 30, 5)) < 0.6
    present = random.random((30, 5)) < 0.3
    present[:, 4] = False
    stated, split = agreement(cast)
    stated[:, 4] = False  # a class that is never said and never there
    results = class_scores(stated, split, present)
    scores: dict[str, list[float]] = {"precision": [], "recall": [], "F1": [], "F0.5": []}
    for column in range(4):
        counts = ~split[:, column]
        true, said = present[counts, column], stated[counts, column]
        scores["precision"] += [precision_score(true, said)] if said.any() else []
        scores["recall"] += [recall_score(true, said)] if true.any() else []
        for name, beta in (("F1", 1), ("F0.5", 0.5)):
            scores[name] += [fbeta_score(true, said, beta=beta, zero_division=0)] if (true | said).any() else []
    for name, values in scores.items():
        assert results[f"throne/class/{name}"] == pytest.approx(100 * np.mean(values))

    overall = aggregate([{"marks": contributions(*row)} for row in zip(stated, split, present, strict=True)])
    true, said = present[~split], stated[~split]
    assert overall["throne/overall/precision"] == pytest.approx(100 * precision_score(true, said))
    assert overall["throne/overall/recall"] == pytest.approx(100 * recall_score(true, said))
    assert overall["throne/overall/F1"] == pytest.approx(100 * fbeta_score(true, said, beta=1))
    assert overall["throne/overall/F0.5"] == pytest.approx(100 * fbeta_score(true, said, beta=0.5))
    assert overall["throne/overall/split"] == pytest.approx(100 * split.mean())


def test_an_empty_description_has_recall_0_and_no_score_is_undefined():
    nothing, present = np.zeros((2, 3), bool), np.eye(2, 3, dtype=bool)
    assert set(class_scores(nothing, nothing, present).values()) == {0.0}
    assert set(class_scores(nothing, nothing, nothing).values()) == {0.0}
    assert set(aggregate([{"marks": contributions(nothing[0], nothing[0], present[0])}]).values()) == {0.0}


class Reader:
    """Answers a question about a text by a rule: whether the class's word is in it."""

    def __init__(self, says: str = "{}") -> None:
        self.says = says
        self.asked: list[str] = []

    def generate_batch(self, prompts, max_new_tokens=8, batch_size=64):
        self.asked += [prompt.text for prompt in prompts]
        answers = []
        for prompt in prompts:
            if prompt.images:
                answers.append("A dog and an ox.")
                continue
            text, question = prompt.text.split("\n\n")[0], prompt.text.split("\n\n")[-1]
            there = any(name in question and name in text for name in CLASSES)
            answers.append(self.says.format("Yes, it is." if there else "no"))
        return answers


def test_a_judge_is_asked_about_every_class_and_text_in_every_wording():
    judge = Reader()
    cast = ask(CachedModel(judge), ["a dog", "", "an ox and a cat"], CLASSES)
    assert cast.shape == (len(QUESTIONS), 3, 3)
    assert cast.all(axis=0).tolist() == [[True, False, False], [False, False, False], [False, True, True]]
    assert len(judge.asked) == len(set(judge.asked)) == len(QUESTIONS) * 9
    assert phrase("ox") == "an ox" and phrase("skis") == "a pair of skis"


def test_an_answer_that_is_neither_yes_nor_no_states_nothing():
    assert not ask(CachedModel(Reader("perhaps")), ["a dog"], CLASSES).any()


def word_tokenizer(path, words):
    tokens = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    word_level = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=word_level, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(path)
    return fast


@pytest.fixture(scope="module", params=["text-to-text", "causal"])
def language_model(request, tmp_path_factory):
    """A tiny random language model of a real family on disk."""
    path = tmp_path_factory.mktemp(request.param)
    tokens = word_tokenizer(path, ["yes", "no", "dog", "cat", "Text", "the", ":", "."])
    torch.manual_seed(0)
    if request.param == "causal":
        config = LlamaConfig(
            vocab_size=len(tokens), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(path)
    else:
        config = T5Config(
            vocab_size=len(tokens), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
            eos_token_id=1, decoder_start_token_id=0,
        )  # fmt: skip
        T5ForConditionalGeneration(config).save_pretrained(path)
    return path


def test_a_judges_batched_answers_are_those_of_transformers_one_by_one(language_model):
    judge = LanguageModel.load(str(language_model))
    texts = ["Text : the dog", "Text", "the cat . the dog . the cat"]
    tokens = AutoTokenizer.from_pretrained(language_model)
    expected = []
    for text in texts:
        ids = tokens(text, return_tensors="pt").input_ids
        output = judge.lm.generate(ids, max_new_tokens=4, do_sample=False)
        output = output if judge.lm.config.is_encoder_decoder else output[:, ids.shape[1] :]
        expected.append(tokens.decode(output[0], skip_special_tokens=True).strip())
    from cafe.content import Content

    assert judge.generate_batch([Content.of(text) for text in texts], max_new_tokens=4, batch_size=3) == expected


def test_several_judges_vote_together_and_a_missing_one_is_named(language_model, tmp_path):
    known = vocabulary(CLASSES)
    subject = CachedModel(Reader(), judges=["exact", "self", str(language_model)])
    cast = votes(subject, ["Dogs.", "a dog"], known)
    assert cast.shape == (1 + 2 * len(QUESTIONS), 2, 3)
    assert cast[0].tolist() == exact(["Dogs.", "a dog"], known).tolist() == [[True, False, False]] * 2
    assert not cast[1, 0].any() and cast[1, 1].tolist() == [True, False, False]  # the rule knows no plural
    with pytest.raises(CafeError, match="no-such-judge"):
        votes(CachedModel(Reader(), judges=[str(tmp_path / "no-such-judge")]), ["a"], known)


def test_the_whole_protocol_on_a_folder(tmp_path):
    (tmp_path / "annotations").mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    parsed = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES)],
        "annotations": [
            {"image_id": 1, "category_id": 0},
            {"image_id": 1, "category_id": 2},
            {"image_id": 2, "category_id": 1},
        ],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(parsed))
    for judges in ((), ("self",)):
        done = run(CachedModel(Reader(), judges=judges), tmp_path, None)  # it sees a dog and an ox in both
        assert done.results["throne/overall/precision"] == 50
        assert done.results["throne/overall/recall"] == pytest.approx(200 / 3)
        assert done.results["throne/class/precision"] == 50  # dog and ox half right, cat never said
        assert done.results["throne/class/recall"] == pytest.approx(200 / 3)
        assert done.results["throne/class/F1"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)
        assert done.outputs["throne"][1]["stated"] == ["dog", "ox"]
    reader = Reader()
    with pytest.raises(CafeError, match="no-such-judge"):
        run(CachedModel(reader, judges=[str(tmp_path / "no-such-judge")]), tmp_path, None)
    assert not reader.asked  # for descriptions that nobody would judge
