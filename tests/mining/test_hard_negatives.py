"""Mined negatives are close, are no matches, and come back as a source."""

import json
from dataclasses import replace
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from samples import png

from cafe.cli.main import main
from cafe.content import Content
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import Source, open_source
from cafe.errors import CafeError
from cafe.mining.hard_negatives import (
    EmbeddedPairs,
    Examples,
    MiningConfig,
    candidates,
    embed_pairs,
    filter_by_judge,
    max_negative_similarity,
    mine,
    questions,
    yes_probability,
)
from cafe.model import Cafe
from cafe.search import search, search_blocks


@pytest.fixture(scope="module")
def model(random_base):
    return Cafe.load(random_base)


def unit(rows, dim, seed):
    drawn = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_a_source_is_not_overwritten_by_what_is_mined_from_it(model, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"query": "a", "positive": "b"}) + "\n")
    sources, before = [open_source(Source(path=str(path), format="pairs"))], path.read_bytes()
    with pytest.raises(CafeError, match=r"would take the place of .*records.jsonl, which is mined"):
        mine(model, sources, tmp_path, MiningConfig())
    assert path.read_bytes() == before


@pytest.mark.parametrize("way", ["faiss", "blocks"])
def test_search_is_exact(way):
    queries, corpus = unit(37, 8, 0), unit(101, 8, 1)
    scores, places = search(queries, corpus, 9) if way == "faiss" else search_blocks(queries, corpus, 9, block=16)
    exact = queries.astype(np.float64) @ corpus.T.astype(np.float64)
    expected = np.argsort(-exact, axis=1)[:, :9]
    assert (places == expected).all()
    np.testing.assert_allclose(scores, np.take_along_axis(exact, expected, 1), atol=1e-6)


def test_limits_are_nv_retrievers():
    assert max_negative_similarity(0.8, MiningConfig(max_positive_ratio=0.95)) == pytest.approx(0.76)
    assert max_negative_similarity(0.8, MiningConfig(max_positive_ratio=None, margin=0.1)) == pytest.approx(0.7)
    assert max_negative_similarity(0.8, MiningConfig(max_positive_ratio=0.5, margin=0.1)) == pytest.approx(0.4)
    assert max_negative_similarity(-0.5, MiningConfig(max_positive_ratio=0.95)) == -0.5  # never above the positive
    assert max_negative_similarity(0.8, MiningConfig(max_positive_ratio=None)) == float("inf")


def test_candidates_are_the_closest_that_are_no_match_and_not_too_close():
    queries, targets = unit(40, 6, 0), unit(40, 6, 1)
    query_ids, target_ids = np.arange(40), np.arange(40)
    query_ids[1] = query_ids[0]  # one picture with two captions
    target_ids[5], targets[5] = target_ids[4], targets[4]  # one caption of two pictures
    embedded = EmbeddedPairs([(0, n) for n in range(40)], queries, targets, query_ids, target_ids, {})
    for mining in (
        MiningConfig(top=64, max_positive_ratio=None),
        MiningConfig(top=5, max_positive_ratio=0.9),
        MiningConfig(top=7, max_positive_ratio=None, margin=0.2),
    ):
        found = candidates(embedded, mining)
        for number in range(40):
            own = {int(t) for q, t in zip(query_ids, target_ids, strict=True) if q == query_ids[number]}
            positive = float(queries[number] @ targets[number])
            scores = {int(target_ids[other]): float(queries[number] @ targets[other]) for other in range(40)}
            closest = sorted(scores, key=lambda target: -scores[target])[: mining.top + 2]  # two may be its own
            allowed = [
                target
                for target in closest
                if target not in own and scores[target] < max_negative_similarity(positive, mining)
            ]
            expected = allowed[: mining.top]
            assert [int(target_ids[other]) for other in found[number]] == expected


def test_embeddings_are_the_models_and_bad_records_are_named(model, scenes, tmp_path):
    rows = json.loads((scenes / "llava_train.json").read_text())[:6]
    rows[2]["image"] = "missing.png"
    (tmp_path / "a.json").write_text(json.dumps(rows))
    records = open_source(Source(path=str(tmp_path / "a.json"), images=str(scenes)))
    places = [(0, index) for index in range(6)]
    embedded = embed_pairs(model, Examples([records], 0), places, MiningConfig(batch_size=4, workers=0))
    assert embedded.places == [(0, 0), (0, 1), (0, 3), (0, 4), (0, 5)] and "record 2" in embedded.bad[0, 2]
    pairs = [records.example(index, Random(0)).pair for _, index in embedded.places]
    np.testing.assert_allclose(embedded.queries, model.embed([pair.query for pair in pairs]), atol=1e-5)
    np.testing.assert_allclose(embedded.targets, model.embed([pair.target for pair in pairs]), atol=1e-5)


def test_the_judge_keeps_what_the_model_says_no_to(model, scenes):
    records = open_source(Source(path=str(scenes / "llava_train.json")))
    places, examples = [(0, index) for index in range(5)], Examples([records], 0)
    mining = MiningConfig(batch_size=8, workers=0)
    embedded = embed_pairs(model, examples, places, mining)
    found = [[1, 2, 3], [], [0, 4], [4], [0]]
    chances = {}
    for number, row in enumerate(found):
        for other in row:  # one plain forward each
            query, target = examples[places[number]].pair.query, examples[places[other]].pair.target
            [branch] = questions(query, [target], model.chat_processor, mining.question)
            with torch.no_grad():
                logits = model.lvlm(**model.chat_processor.collate([branch])).logits[0, -1].double()
            words = {}
            for word in ("yes", "no"):
                forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
                words[word] = {model.chat_processor.tokenizer(form)["input_ids"][0] for form in forms}
            positive, negative = words["yes"] - words["no"], words["no"] - words["yes"]
            weights = logits.softmax(0)
            yes_probability, no = weights[list(positive)].sum(), weights[list(negative)].sum()
            chances[number, other] = float(yes_probability / (yes_probability + no))
    ordered = sorted(chances.values())
    threshold = (ordered[3] + ordered[4]) / 2
    kept = filter_by_judge(model, examples, embedded, found, mining, threshold)
    says_no = [{other: 0.0 for other in row if chances[n, other] < threshold} for n, row in enumerate(found)]
    assert kept == says_no and sum(map(len, kept)) == 4
    soft = filter_by_judge(model, examples, embedded, found, replace(mining, soft=True), threshold)
    for number, row in enumerate(found):
        scores = [chances[number, other] * (chances[number, other] >= threshold) for other in row]
        assert list(soft[number]) == row and list(soft[number].values()) == pytest.approx(scores, abs=1e-5)


def test_the_judge_caps_its_logits_as_its_model_does(model, monkeypatch):
    config = model.lvlm.config.get_text_config()
    hidden = 1e6 * torch.randn(8, config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert ((yes_probability(model, hidden) < 1e-3) | (yes_probability(model, hidden) > 1 - 1e-3)).all()
    monkeypatch.setattr(config, "final_logit_softcapping", 1.0, raising=False)
    assert ((yes_probability(model, hidden) > 0.01) & (yes_probability(model, hidden) < 0.99)).all()


def test_the_new_source_holds_the_old_records_with_mined_negatives(model, scenes, tmp_path):
    records = open_source(Source(path=str(scenes / "llava_train.json")))
    said: list[str] = []
    mining = MiningConfig(negatives=3, top=10, max_positive_ratio=None, margin=0.0, workers=0)
    path = mine(model, [records], tmp_path / "mined", mining, report=said.append)
    mined = open_source(Source(path=str(path), format="pairs"))
    assert len(mined) == len(records) == 48 and "0 of 48 records are bad" in said[0]
    old = [records.example(index, Random(0)) for index in range(48)]
    targets = {example.pair.target.text for example in old}
    queries = model.embed([example.pair.query for example in old])
    total = 0
    for index, before in enumerate(old):
        after = mined.example(index, Random(0))
        assert [str(part) for part in after.pair.query.parts] == [str(part) for part in before.pair.query.parts]
        assert after.pair.target == before.pair.target
        assert [turn.content.text for turn in after.dialogue.turns] == [t.content.text for t in before.dialogue.turns]
        assert after.dialogue.turns[0].content.images == after.pair.query.images  # one picture, read once
        texts = [negative.text for negative in after.pair.negatives]
        assert set(texts) <= targets - {before.pair.target.text} and len(texts) <= 3
        vectors = model.embed([before.pair.target.text, *texts])
        scores = vectors @ queries[index]
        assert (scores[1:] < scores[0] + 1e-5).all() and (np.diff(scores[1:]) < 1e-5).all()
        total += len(texts)
    assert total > 0
    batch = ContrastiveBatchDataset([mined], model.chat_processor, batch_size=48, seed=0, packing=model.packing)[0]
    assert len(batch.negative_owner) == total and batch.bad_records == []


def test_pictures_without_a_file_get_one(model, tmp_path):
    rows = [{"query": "what is <image>?", "query_image": png(color), "positive": color} for color in ("red", "blue")]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"query": "", "query_image": None, "positive": "x"}]), tmp_path / "a.parquet"
    )
    source = Source(path=str(tmp_path / "a.parquet"), format="pairs", answer_prompt="")
    path = mine(
        model,
        [open_source(source)],
        tmp_path / "mined",
        MiningConfig(workers=0, max_positive_ratio=None),
        report=lambda line: None,
    )
    mined = open_source(Source(path=str(path), format="pairs"))
    assert len(mined) == 2 and len(list((tmp_path / "mined" / "images").iterdir())) == 2
    for index, row in enumerate(rows):
        example = mined.example(index, Random(0))
        first, picture, last = example.pair.query.parts
        assert (first, last) == ("what is ", "?") and picture.source.read_bytes() == row["query_image"]
        assert example.pair.negatives == (Content.of(rows[1 - index]["positive"]),)
        assert example.dialogue.turns[0].content == example.pair.query
    assert "the query is empty" in (tmp_path / "mined" / "quarantine.jsonl").read_text()
    with pytest.raises(CafeError, match="nothing to mine"):
        text = tmp_path / "text.json"
        said = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
        text.write_text(json.dumps([{"conversations": said}]))
        mine(model, [open_source(Source(path=str(text)))], tmp_path / "none", MiningConfig(workers=0))


def test_a_damaged_picture_of_a_dialogue_alone_is_quarantined(model, tmp_path):
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    rows = [{"query": color, "positive": f"{color} it is", "image": None} for color in ("red", "blue")]
    rows.append({"query": None, "positive": None, "image": png("red")[:40], "conversations": said})
    pq.write_table(pa.Table.from_pylist(rows[::-1]), tmp_path / "a.parquet")
    source = Source(path=str(tmp_path / "a.parquet"), format="pairs")
    told: list[str] = []
    path = mine(
        model,
        [open_source(source)],
        tmp_path / "mined",
        MiningConfig(workers=0, max_positive_ratio=None),
        report=told.append,
    )
    assert len(open_source(Source(path=str(path), format="pairs"))) == 2 and "1 of 3 records are bad" in told[0]
    reason = json.loads((tmp_path / "mined" / "quarantine.jsonl").read_text())["reason"]
    assert "a.parquet, record 0: The image <bytes> cannot be decoded" in reason


def test_half_of_a_character_in_a_dialogue_is_written_as_it_was(model, tmp_path):
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "an é and half \ud83d"}]
    rows = [{"query": "red", "positive": "it is red", "conversations": said}, {"query": "blue", "positive": "sky"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = Source(path=str(tmp_path / "a.json"), format="pairs")
    path = mine(model, [open_source(source)], tmp_path / "mined", MiningConfig(workers=0), report=lambda line: None)
    again = open_source(Source(path=str(path), format="pairs")).example(0, Random(0))
    assert again.dialogue == open_source(source).example(0, Random(0)).dialogue
    assert "é" in path.read_text()


def test_the_command_mines_judges_and_writes(random_base, scenes, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    pq.write_table(pq.read_table(scenes / "mmeb_train" / "grounding.parquet").slice(0, 5), tmp_path / "a.parquet")
    source = f"{{path: {tmp_path}/a.parquet, format: mmeb, images: {scenes}}}"
    recipe.write_text(
        f"output: x\nmodel: {{base: {random_base}}}\ndata: {{workers: 0, sources: [{source}]}}\n"
        "prompts: {mode: multimodal}\n"
    )
    output = tmp_path / "mined"
    assert main(["mine", str(recipe), "--output", str(output), "--share", "0", "--judge", "1.1"]) == 0
    assert "hard negatives for" in capsys.readouterr().out
    mined = open_source(Source(path=str(output / "records.jsonl"), format="pairs"))
    pair = mined.example(0, Random(0)).pair
    assert len(pair.negatives) == 4 and all(negative.images for negative in pair.negatives)
    assert isinstance(pair.query, Content) and pair.negatives[0].text == pair.target.text

    soft = ["mine", str(recipe), "--output", str(output), "--share", "0", "--judge", "0.0", "--soft"]
    assert main(soft) == 0
    mined = open_source(Source(path=str(output / "records.jsonl"), format="pairs"))
    batch = ContrastiveBatchDataset([mined], Cafe.load(random_base).chat_processor, batch_size=5, seed=0)[0]
    assert len(batch.negative_match_prob) == len(batch.negative_owner) == 20 and (batch.negative_match_prob > 0).all()
    assert batch.negative_owner.bincount().tolist() == [4] * 5
