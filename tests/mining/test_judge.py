"""The judge drops what the model calls a match."""

from dataclasses import replace

import pytest
import torch

from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.lvlm.generation import collate_to_device
from cafe.mining.config import MiningConfig
from cafe.mining.embed import Examples, embed_pairs
from cafe.mining.judge import filter_by_judge, judge_branches, yes_probability


def test_the_judge_keeps_what_the_model_says_no_to(model, scenes):
    records = open_source(Source(path=str(scenes / "llava_train.json")))
    keys, examples = [(0, index) for index in range(5)], Examples([records], 0)
    mining = MiningConfig(batch_size=8, workers=0)
    embedded = embed_pairs(model, examples, keys, mining)
    candidates = [[1, 2, 3], [], [0, 4], [4], [0]]
    probabilities = {}
    for number, row in enumerate(candidates):
        for other in row:  # one plain forward each
            query, target = examples[keys[number]].pair.query, examples[keys[other]].pair.target
            [branch] = judge_branches(query, [target], model.chat_processor, mining.question)
            inputs = collate_to_device(model.lvlm, model.chat_processor, [branch])
            with torch.no_grad():
                logits = model.lvlm(**inputs).logits[0, -1].double()
            words = {}
            for word in ("yes", "no"):
                forms = (word, word.capitalize(), f" {word}", f" {word.capitalize()}")
                words[word] = {model.chat_processor.tokenizer(form)["input_ids"][0] for form in forms}
            positive, negative = words["yes"] - words["no"], words["no"] - words["yes"]
            weights = logits.softmax(0)
            yes, no = weights[list(positive)].sum(), weights[list(negative)].sum()
            probabilities[number, other] = float(yes / (yes + no))
    ordered = sorted(probabilities.values())
    threshold = (ordered[3] + ordered[4]) / 2
    remaining = filter_by_judge(model, examples, embedded, candidates, mining, threshold)
    says_no = [{other: 0.0 for other in row if probabilities[n, other] < threshold} for n, row in enumerate(candidates)]
    assert remaining == says_no and sum(map(len, remaining)) == 4
    soft = filter_by_judge(model, examples, embedded, candidates, replace(mining, soft=True), threshold)
    for number, row in enumerate(candidates):
        scores = [probabilities[number, other] * (probabilities[number, other] >= threshold) for other in row]
        assert list(soft[number]) == row and list(soft[number].values()) == pytest.approx(scores, abs=1e-5)


def test_the_judge_caps_its_logits_as_its_model_does(model, monkeypatch):
    config = model.lvlm.config.get_text_config()
    hidden = 1e6 * torch.randn(8, config.hidden_size, generator=torch.Generator().manual_seed(0))
    assert ((yes_probability(model, hidden) < 1e-3) | (yes_probability(model, hidden) > 1 - 1e-3)).all()
    monkeypatch.setattr(config, "final_logit_softcapping", 1.0, raising=False)
    assert ((yes_probability(model, hidden) > 0.01) & (yes_probability(model, hidden) < 0.99)).all()
