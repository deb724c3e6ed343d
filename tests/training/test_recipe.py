"""Recipes: every shipped one builds; a mistake is one sentence that names the key and the nearest right one."""

from pathlib import Path

import pytest

from cafe.errors import CafeError
from cafe.training.recipe import read_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SCENES = Path(__file__).parents[2] / "recipes" / "scenes.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds(path):
    recipe = read_recipe(path)
    assert recipe.data.sources and recipe.model.base


@pytest.mark.parametrize("size", ["0.5b", "7b"])
def test_the_papers_recipes_hold_the_papers_settings(size):
    recipe = read_recipe(SCENES.with_name(f"cafe-{size}.yaml"))
    assert recipe.model.base == f"llava-hf/llava-onevision-qwen2-{size}-si-hf"
    assert recipe.objective.temperature == 0.05
    assert (recipe.objective.lm_weight, recipe.objective.contrastive_weight) == (1, 1)
    assert recipe.optimizer.learning_rate == 1e-5 and recipe.optimizer.vision_tower_learning_rate == 2e-6
    assert recipe.optimizer.warm_up == 0.03 and recipe.optimizer.weight_decay == 0
    assert recipe.model.max_tokens == 32768 and recipe.model.precision == "bf16"


def test_overrides_reach_into_the_tree():
    recipe = read_recipe(SCENES, ["optimizer.learning_rate=1e-4", "seed=7", "steps=null"])
    assert recipe.optimizer.learning_rate == 1e-4 and recipe.seed == 7 and recipe.steps is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat is unknown; the nearest is optimizer.learning_rate"),
        ("sed=1", "the key sed is unknown; the nearest is seed"),
        ("seed=one", "seed should be a whole number, not 'one'"),
        ("seed=true", "seed should be a whole number, not True"),
        ("objective.temperature=hot", "objective.temperature should be a number"),
        ("model.precision=fp8", "model.precision should be one of fp32, bf16"),
        ("data.sources=[]", "data.sources should be a list"),
        ("data.sources=[{format: llava}]", r"data.sources\[0\].path is missing"),
        ("seed", "not of the form key=value"),
        ("batch_size.a=1", "batch_size, which is a value"),
    ],
)
def test_a_mistake_is_one_sentence(override, sentence):
    with pytest.raises(CafeError, match=sentence):
        read_recipe(SCENES, [override])


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(CafeError, match="does not exist"):
        read_recipe(tmp_path / "no.yaml")
