"""Records are embedded as the model embeds."""

import json
from random import Random

import numpy as np

from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.mining.config import MiningConfig
from cafe.mining.embed import Examples, embed_pairs


def test_embeddings_are_the_models_and_bad_records_are_named(model, scenes, tmp_path):
    rows = json.loads((scenes / "llava_train.json").read_text())[:6]
    rows[2]["image"] = "missing.png"
    (tmp_path / "a.json").write_text(json.dumps(rows))
    records = open_source(Source(path=str(tmp_path / "a.json"), images=str(scenes)))
    keys = [(0, index) for index in range(6)]
    embedded = embed_pairs(model, Examples([records], 0), keys, MiningConfig(batch_size=4, workers=0))
    assert embedded.record_keys == [(0, 0), (0, 1), (0, 3), (0, 4), (0, 5)] and "record 2" in embedded.bad_records[0, 2]
    pairs = [records.example(index, Random(0)).pair for _, index in embedded.record_keys]
    np.testing.assert_allclose(embedded.queries, model.embed([pair.query for pair in pairs]), atol=1e-5)
    np.testing.assert_allclose(embedded.targets, model.embed([pair.target for pair in pairs]), atol=1e-5)
