"""The run directory: which recipe and process it belongs to, and whether the run is finished."""

import json
import multiprocessing
from dataclasses import replace

import pytest

from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import CafeError
from cafe.training.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe
from cafe.training.run_directory import check_data, claim_run_directory, is_finished


@pytest.fixture
def recipe(tmp_path):
    sources = (Source(path="a.json"), Source(path="b.json"))
    return Recipe(output=str(tmp_path / "run"), model=ModelConfig(base="base"), data=DataConfig(sources=sources))


def test_run_directory_keeps_its_name_and_rejects_another_recipe(recipe, tmp_path):
    claim_run_directory(recipe)
    other = replace(recipe, optimizer=OptimizerConfig(learning_rate=0.5))
    assert claim_run_directory(other)  # nothing was saved yet: there is nothing to lose
    (tmp_path / "run" / "state").mkdir()
    name = claim_run_directory(other)
    workers = replace(other.data, num_workers=7)
    assert (
        claim_run_directory(other)
        == claim_run_directory(replace(other, save_steps=3, logging_steps=1, data=workers))
        == name
    )
    with pytest.raises(CafeError, match=r"another recipe \(optimizer.learning_rate was 0.5 and is 1e-05\): set"):
        claim_run_directory(recipe)
    fewer = replace(other, data=replace(other.data, sources=other.data.sources[:1]))
    with pytest.raises(CafeError, match=r"data.sources was \[.*and is \["):
        claim_run_directory(fewer)


def test_run_directory_is_locked_by_one_process(recipe, tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        name = pool.apply(claim_run_directory, (recipe,))
        with pytest.raises(CafeError, match=rf"^Process \d+ is training into {tmp_path / 'run'}: wait until it ends"):
            claim_run_directory(recipe)
        assert pool.apply(claim_run_directory, (recipe,)) != name  # the same process may again
    assert claim_run_directory(recipe)


def test_data_that_changed_since_the_run_was_saved_is_refused_unless_allowed(recipe, tmp_path):
    file = tmp_path / "a.jsonl"
    sources = (Source(path=str(file)),)
    recipe = replace(recipe, data=DataConfig(sources=sources))
    allowed = replace(recipe, data=DataConfig(sources=sources, allow_changes=True))

    def start(recipe, text):
        file.write_text(text)
        claim_run_directory(recipe)
        check_data(recipe, [open_source(source) for source in recipe.data.sources])

    start(recipe, "1\n2\n")
    start(recipe, "1\n")  # nothing was saved yet
    (tmp_path / "run" / "state").mkdir()
    start(recipe, "1\n")
    with pytest.raises(CafeError, match=r"a\.jsonl had 1 records and has 2\).*data\.allow_changes=true"):
        start(recipe, "1\n2\n")
    with pytest.raises(CafeError, match=r"a\.jsonl has other content"):
        start(recipe, "3\n")
    start(allowed, "1\n2\n")
    start(recipe, "1\n2\n")  # which it is from now on


def test_run_is_finished_once_its_checkpoint_has_the_same_recipe(recipe, tmp_path):
    assert not is_finished(recipe)
    checkpoint = tmp_path / "run" / "checkpoint"
    checkpoint.mkdir(parents=True)
    claim_run_directory(recipe)
    written = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]
    (checkpoint / "cafe.json").write_text(json.dumps({"recipe": written}))
    assert is_finished(recipe) and is_finished(replace(recipe, save_steps=1))
    assert not is_finished(replace(recipe, seed=1))


@pytest.mark.parametrize("text", ["", "[]", '{"name": "a"}', '{"name": 5, "recipe": {}}', "[" * 100_000])
def test_a_broken_run_json_is_told_in_a_sentence(recipe, tmp_path, text):
    (tmp_path / "run" / "state").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(CafeError, match=r"run\.json is damaged.*set another output, or remove that directory") as error:
        claim_run_directory(recipe)
    assert "\n" not in str(error.value)
