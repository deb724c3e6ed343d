"""Mined negatives are close, are no matches, and come back as a source."""

import json
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import png, unit

from cafe.cli.main import main
from cafe.content import Content
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import CafeError
from cafe.mining.config import MiningConfig
from cafe.mining.embed import EmbeddedPairs
from cafe.mining.hard_negatives import find_candidates, max_negative_similarity, mine
from cafe.model import Cafe


def test_mining_does_not_overwrite_its_source(model, tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps({"query": "a", "positive": "b"}) + "\n")
    sources, before = [open_source(Source(path=str(path), format="pairs"))], path.read_bytes()
    with pytest.raises(CafeError, match=r"would overwrite .*records.jsonl, which is mined"):
        mine(model, sources, tmp_path, MiningConfig())
    assert path.read_bytes() == before


def test_limits_are_those_of_nv_retriever():
    assert max_negative_similarity(0.8, MiningConfig(max_positive_ratio=0.95)) == pytest.approx(0.76)
    assert max_negative_similarity(0.8, MiningConfig(max_positive_ratio=None, margin=0.1)) == pytest.approx(0.7)
    assert max_negative_similarity(0.8, MiningConfig(max_positive_ratio=0.5, margin=0.1)) == pytest.approx(0.4)
    assert max_negative_similarity(-0.5, MiningConfig(max_positive_ratio=0.95)) == -0.5  # never above the positive
    assert max_negative_similarity(0.8, MiningConfig(max_positive_ratio=None)) == float("inf")


def test_candidates_are_the_nearest_that_are_no_match_and_within_limits():
    queries, targets = unit(40, 6, 0), unit(40, 6, 1)
    query_ids, target_ids = np.arange(40), np.arange(40)
    query_ids[1] = query_ids[0]  # one image with two captions
    target_ids[5], targets[5] = target_ids[4], targets[4]  # one caption of two images
    embedded = EmbeddedPairs([(0, n) for n in range(40)], queries, targets, query_ids, target_ids, {})
    for mining in (
        MiningConfig(top=64, max_positive_ratio=None),
        MiningConfig(top=5, max_positive_ratio=0.9),
        MiningConfig(top=7, max_positive_ratio=None, margin=0.2),
    ):
        candidates = find_candidates(embedded, mining)
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
            assert [int(target_ids[other]) for other in candidates[number]] == expected


def test_the_new_source_holds_the_old_records_with_mined_negatives(model, scenes, tmp_path):
    records = open_source(Source(path=str(scenes / "llava_train.json")))
    lines: list[str] = []
    mining = MiningConfig(negatives=3, top=10, max_positive_ratio=None, margin=0.0, workers=0)
    path = mine(model, [records], tmp_path / "mined", mining, report=lines.append)
    mined = open_source(Source(path=str(path), format="pairs"))
    assert len(mined) == len(records) == 48 and "0 of 48 records are bad" in lines[0]
    old = [records.example(index, Random(0)) for index in range(48)]
    targets = {example.pair.target.text for example in old}
    queries = model.embed([example.pair.query for example in old])
    total = 0
    for index, before in enumerate(old):
        after = mined.example(index, Random(0))
        assert [str(part) for part in after.pair.query.parts] == [str(part) for part in before.pair.query.parts]
        assert after.pair.target == before.pair.target
        assert [turn.content.text for turn in after.dialogue.turns] == [t.content.text for t in before.dialogue.turns]
        assert after.dialogue.turns[0].content.images == after.pair.query.images  # one image, read once
        texts = [negative.text for negative in after.pair.negatives]
        assert set(texts) <= targets - {before.pair.target.text} and len(texts) <= 3
        vectors = model.embed([before.pair.target.text, *texts])
        scores = vectors @ queries[index]
        assert (scores[1:] < scores[0] + 1e-5).all() and (np.diff(scores[1:]) < 1e-5).all()
        total += len(texts)
    assert total > 0
    batch = ContrastiveBatchDataset([mined], model.chat_processor, batch_size=48, seed=0, packing=model.packing)[0]
    assert len(batch.negative_owner) == total and batch.bad_records == []


def test_images_without_a_file_get_one(model, tmp_path):
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
        first, image, last = example.pair.query.parts
        assert (first, last) == ("what is ", "?") and image.source.read_bytes() == row["query_image"]
        assert example.pair.negatives == (Content.of(rows[1 - index]["positive"]),)
        assert example.dialogue.turns[0].content == example.pair.query
    assert "the query is empty" in (tmp_path / "mined" / "quarantine.jsonl").read_text()
    with pytest.raises(CafeError, match="nothing to mine"):
        text = tmp_path / "text.json"
        said = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]
        text.write_text(json.dumps([{"conversations": said}]))
        mine(model, [open_source(Source(path=str(text)))], tmp_path / "none", MiningConfig(workers=0))


def test_a_damaged_image_of_a_dialogue_alone_is_quarantined(model, tmp_path):
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
    rows = [{"query": color, "positive": f"{color} it is", "image": None} for color in ("red", "blue")]
    rows.append({"query": None, "positive": None, "image": png("red")[:40], "conversations": said})
    pq.write_table(pa.Table.from_pylist(rows[::-1]), tmp_path / "a.parquet")
    source = Source(path=str(tmp_path / "a.parquet"), format="pairs")
    lines: list[str] = []
    path = mine(
        model,
        [open_source(source)],
        tmp_path / "mined",
        MiningConfig(workers=0, max_positive_ratio=None),
        report=lines.append,
    )
    assert len(open_source(Source(path=str(path), format="pairs"))) == 2 and "1 of 3 records are bad" in lines[0]
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
        f"output: x\nmodel: {{base: {random_base}}}\ndata: {{num_workers: 0, sources: [{source}]}}\n"
        "prompts: {mode: multimodal}\n"
    )
    output = tmp_path / "mined"
    assert main(["mine", str(recipe), "--output", str(output), "--max-positive-ratio", "0", "--judge", "1.1"]) == 0
    assert "hard negatives for" in capsys.readouterr().out
    mined = open_source(Source(path=str(output / "records.jsonl"), format="pairs"))
    pair = mined.example(0, Random(0)).pair
    assert len(pair.negatives) == 4 and all(negative.images for negative in pair.negatives)
    assert isinstance(pair.query, Content) and pair.negatives[0].text == pair.target.text

    soft = ["mine", str(recipe), "--output", str(output), "--max-positive-ratio", "0", "--judge", "0.0", "--soft"]
    assert main(soft) == 0
    mined = open_source(Source(path=str(output / "records.jsonl"), format="pairs"))
    batch = ContrastiveBatchDataset([mined], Cafe.load(random_base).chat_processor, batch_size=5, seed=0)[0]
    assert len(batch.negative_match_prob) == len(batch.negative_owner) == 20 and (batch.negative_match_prob > 0).all()
    assert batch.negative_owner.bincount().tolist() == [4] * 5
