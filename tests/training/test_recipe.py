"""Recipes: every shipped one builds, and an error names the key that is wrong with its nearest or its new name."""

import json
import math
import re
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import ANY_JSON
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from cafe.checkpoint import resolve_checkpoint
from cafe.data.batch import MicroBatchSize
from cafe.data.source import Source
from cafe.errors import RecipeError
from cafe.lvlm.adapters import LoraSettings
from cafe.lvlm.architectures import load_config, meta_model
from cafe.lvlm.prompts import Prompts
from cafe.training.optimizer import configure_trainable_parameters, summarize_trainable
from cafe.training.recipe import DataConfig, EvaluationConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, Recipe
from cafe.training.recipe_io import OLD_NAMES, Sweep, read_recipe, read_source, read_sweep
from cafe.training.run_directory import as_json

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SCENES = Path(__file__).parents[2] / "recipes" / "scenes.yaml"


@dataclass(frozen=True)
class Geometry:
    """The published sizes of a base model; `total` in billions, as the Hub states it."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    total: float
    vision: int = 1152
    vision_layers: int = 26
    vision_intermediate: int = 4304
    patch: int = 14
    side: int = 384


HUB = {
    "llava-hf/llava-onevision-qwen2-0.5b-si-hf": Geometry(896, 24, 14, 2, 4864, 152000, True, 0.9),
    "llava-hf/llava-onevision-qwen2-7b-si-hf": Geometry(3584, 28, 28, 4, 18944, 152128, False, 8.0),
}


def hub_model(geometry: Geometry) -> LlavaOnevisionForConditionalGeneration:
    """The model without its weights."""
    vision = SiglipVisionConfig(
        hidden_size=geometry.vision,
        intermediate_size=geometry.vision_intermediate,
        num_hidden_layers=geometry.vision_layers,
        num_attention_heads=16,
        image_size=geometry.side,
        patch_size=geometry.patch,
        vision_use_head=False,
    )
    text = Qwen2Config(
        hidden_size=geometry.hidden,
        intermediate_size=geometry.intermediate,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        vocab_size=geometry.vocabulary,
        tie_word_embeddings=geometry.tied,
    )
    config = LlavaOnevisionConfig(vision_config=vision, text_config=text, tie_word_embeddings=geometry.tied)
    with torch.device("meta"):
        return LlavaOnevisionForConditionalGeneration(config)


def parameters(of: Geometry) -> dict[str, int]:
    """Parameters by part, counted from the sizes."""
    d, m, h = of.vision, of.vision_intermediate, of.hidden
    norm, kv = 2 * d, of.hidden // of.heads * of.kv_heads
    patches = (of.side // of.patch) ** 2
    block = 4 * (d * d + d) + 2 * d * m + d + m + 2 * norm
    layer = 2 * h * h + h + 2 * (h * kv + kv) + 3 * h * of.intermediate + 2 * h
    return {
        "vision tower": 3 * of.patch**2 * d + d + patches * d + of.vision_layers * block + norm,
        "projector": d * h + h + h * h + h + h,
        "language model": of.vocabulary * h * (1 if of.tied else 2) + of.layers * layer + h,
    }


def adapter_size(adapter: LoraSettings, config: PreTrainedConfig) -> int:
    """Numbers in the two matrices beside each of a language model's: rank times its rows and columns."""
    text = config.get_text_config()
    width, inner = text.hidden_size, text.intermediate_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries, keys = head * text.num_attention_heads, head * text.num_key_value_heads
    sides = 2 * (width + queries) + 2 * (width + keys) + 3 * (width + inner)
    return text.num_hidden_layers * adapter.rank * sides


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_and_summarizes_what_it_trains(path):
    recipe = read_recipe(path)
    assert recipe.data.sources
    if recipe.model.adapter:
        model = meta_model(load_config(recipe.model.base))
        configure_trainable_parameters(model, recipe.model)
        trained = re.search(r"language model ([0-9.]+)M", summarize_trainable(model))
        assert float(trained[1]) == pytest.approx(adapter_size(recipe.model.adapter, model.config) / 1e6, abs=0.01)
        return
    if recipe.model.base not in HUB:
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(resolve_checkpoint(recipe.model.base))
        assert sum(parameter.numel() for parameter in model.parameters()) <= 3e6
        assert summarize_trainable(model).startswith("Training vision tower")
        return
    geometry = HUB[recipe.model.base]
    counts = parameters(geometry)
    summary = summarize_trainable(hub_model(geometry)).removeprefix("Training ")
    stated = {part: float(count) for part, count in re.findall(r"([a-z ]+[a-z]) ([0-9.]+)M", summary)}
    assert {part.strip(): count for part, count in stated.items()} == {
        part: pytest.approx(count / 1e6, abs=0.01) for part, count in counts.items()
    }
    assert sum(counts.values()) / 1e9 == pytest.approx(geometry.total, abs=0.05)


@pytest.mark.parametrize("size", ["0.5b", "7b"])
def test_the_papers_recipes_hold_the_papers_settings(size):
    recipe = read_recipe(SCENES.with_name(f"cafe-{size}.yaml"))
    assert recipe.model.base == f"llava-hf/llava-onevision-qwen2-{size}-si-hf"
    assert recipe.objective.temperature == 0.05
    assert (recipe.objective.lm_weight, recipe.objective.contrastive_weight) == (1, 1)
    assert recipe.optimizer.learning_rate == 1e-5 and recipe.optimizer.vision_tower_learning_rate == 2e-6
    assert recipe.optimizer.warmup_ratio == 0.03 and recipe.optimizer.weight_decay == 0
    assert recipe.model.max_length == 32768 and recipe.model.precision == "bf16"


def test_overrides_reach_into_the_tree():
    recipe = read_recipe(SCENES, ["optimizer.learning_rate=1e-4", "seed=7", "max_steps=null", "model.precision=fp16"])
    assert recipe.model.precision == "fp16"
    assert recipe.optimizer.learning_rate == 1e-4 and recipe.seed == 7 and recipe.max_steps is None


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optimizer.learning_rat=1", "optimizer.learning_rat is unknown; the nearest is optimizer.learning_rate"),
        ("sed=1", "the key sed is unknown; the nearest is seed"),
        ("seed=one", "seed should be a whole number, not 'one'"),
        ("seed=true", "seed should be a whole number, not True"),
        ("objective.temperature=hot", "objective.temperature should be a number"),
        ("model.precision=fp8", "model.precision should be one of fp32, bf16"),
        ("data.sources=[]", "data.sources is empty"),
        ("data.sources=a.json", "data.sources should be a list, not 'a.json'"),
        ("data.sources=[{format: llava}]", r"data.sources\[0\].path is missing"),
        ("seed", "not of the form key=value"),
        ("data.sources=[{path: a.json}", "is not valid YAML: while parsing a flow sequence"),
        ("batch_size.a=1", "batch_size, which is a value"),
        ("model.adapter={rnk: 8}", "model.adapter.rnk is unknown; the nearest is model.adapter.rank"),
        ("optimizer.name=adam", "optimizer.name should be one of adamw, adafactor"),
        ("objective.hardness_weight=-1", "objective.hardness_weight should be 0 or more"),
        ("objective.matryoshka_weights=[1]", "one weight for each of objective.matryoshka_dims"),
        ("objective.temperature=0", "objective.temperature should be above 0, not 0"),
        ("objective.temperature=.nan", "objective.temperature should be above 0, not nan"),
        ("objective={lm_weight: 0, contrastive_weight: 0}", "are both 0: nothing is learned"),
        ("optimizer.gradient_accumulation_steps=0", "optimizer.gradient_accumulation_steps should be above 0, not 0"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate should be 0 or more"),
        ("model.freeze=[vision_tower, projector, language_model]", "model.freeze names every part"),
        ("model.max_length=0", "model.max_length should be above 0"),
        ("data.num_workers=-1", "data.num_workers should be 0 or more"),
        ("evaluation.limit=0", "evaluation.limit should be above 0"),
        ("micro_batch.tokens=0", "micro_batch.tokens should be above 0"),
        ("batch_size=0", "batch_size should be above 0, not 0"),
        ("logging_steps=-1", "logging_steps should be 0 or more"),
        ("seed=4294967296", "seed should be below 4,294,967,296"),
        ("optimizer.warmup_ratio=100", "optimizer.warmup_ratio should be between 0 and 1, not 100"),
        ("optimizer.beta1=1", "optimizer.beta1 should be 0 or more and below 1, not 1"),
        ("data.max_bad_fraction=5", "data.max_bad_fraction should be between 0 and 1, not 5"),
        (
            "data.sources=[{path: a.json, shuffle_window: 0}]",
            r"data.sources\[0\].shuffle_window should be above 0, not 0",
        ),
        ("evaluation.sources=[{path: a.json, max_frames: 0}]", r"evaluation.sources\[0\].max_frames should be above 0"),
        ("model.adapter.rank=0", "model.adapter.rank should be above 0, not 0"),
        ("model.adapter.dropout=2", "model.adapter.dropout should be 0 or more and below 1, not 2"),
        (
            "objective={matryoshka_dims: [64], matryoshka_weights: [-1]}",
            "objective.matryoshka_weights should be 0 or more",
        ),
    ],
)
def test_an_error_names_the_key_and_what_it_should_be(override, sentence):
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(SCENES, [override])


@pytest.mark.parametrize(
    ("field", "written", "values"),
    [
        ("objective.temperature", "0.05, 1e-1,1", ["0.05", "1e-1", "1"]),
        ("model.precision", "fp32,bf16", ["fp32", "bf16"]),
        ("max_steps", "null,20", ["null", "20"]),
        ("model.freeze", "[],[vision_tower, projector]", ["[]", "[vision_tower, projector]"]),
        ("output", "runs/a,'runs/b,c',runs/d=e", ["runs/a", "'runs/b,c'", "runs/d=e"]),
        ("data.sources", "[{path: a, weight: 2}],[{path: b}]", ["[{path: a, weight: 2}]", "[{path: b}]"]),
    ],
)
def test_a_sweeps_values_are_read_as_overrides_are(field, written, values):
    overrides = ["seed=7", f"{field}={values[0]}"]
    expected = {value: read_recipe(SCENES, [*overrides, f"{field}={value}"]) for value in values}
    assert read_sweep(SCENES, overrides, f"{field}={written}") == Sweep(field, expected)
    assert list(expected) == values and len(set(map(repr, expected.values()))) == len(values)


@pytest.mark.parametrize(
    ("sweep", "sentence"),
    [
        ("objective.temperatur=0.1,1", "objective.temperatur is unknown; the nearest is objective.temperature"),
        ("objective.temperature=0.1,hot", "objective.temperature should be a number, not 'hot'"),
        ("objective.temperature=0.1,-1", "objective.temperature should be above 0, not -1"),
        ("objective.temperature", "'objective.temperature' is not of the form key=a,b,c"),
        ("objective.temperature=", "'objective.temperature=' is not of the form key=a,b,c"),
        ("objective.temperature=1,,2", "'objective.temperature=1,,2' is not valid YAML"),
        ("objective.temperature=1] #,2", "'objective.temperature=1. #,2' is not of the form key=a,b,c"),
        ("model.freeze=[vision_tower,[]", r"'model.freeze=\[vision_tower,\[\]' is not valid YAML"),
    ],
)
def test_a_mistake_in_a_sweep_is_one_sentence(sweep, sentence):
    with pytest.raises(RecipeError, match=sentence) as error:
        read_sweep(SCENES, [], sweep)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_in_a_checkpoint_can_be_read_again(path, tmp_path):
    recipe, file = read_recipe(path), tmp_path / "recorded.yaml"
    file.write_text(json.dumps(as_json(recipe)))
    assert read_recipe(file) == recipe


def test_an_override_with_an_empty_list_clears_the_recipes_list():
    recipe = read_recipe(SCENES, ["model.freeze=[vision_tower]", "model.freeze=[]", "trackers=[]"])
    assert recipe.model.freeze == () and recipe.trackers == ()


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match="does not exist"):
        read_recipe(tmp_path / "no.yaml")


def test_a_recipe_that_is_not_utf_8_text_is_named(tmp_path):
    file = tmp_path / "latin.yaml"
    file.write_bytes("output: café".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"The recipe .*latin.yaml is not UTF-8 text"):
        read_recipe(file)


SECTIONS = {  # where a recipe has each class, and YAML with a key of it
    Recipe: ("", "{key}=1"),
    ModelConfig: ("model.", "model.{key}=1"),
    DataConfig: ("data.", "data.{key}=1"),
    Source: ("data.sources[0].", "data.sources=[{{path: a.json, {key}: 1}}]"),
    Prompts: ("prompts.", "prompts.{key}=1"),
    ObjectiveConfig: ("objective.", "objective.{key}=1"),
    OptimizerConfig: ("optimizer.", "optimizer.{key}=1"),
    EvaluationConfig: ("evaluation.", "evaluation.{key}=1"),
}
RENAMED = [(cls, old, new) for cls, names in OLD_NAMES.items() for old, new in names.items()]


@pytest.mark.parametrize(("cls", "old", "new"), RENAMED, ids=lambda value: getattr(value, "__name__", value))
def test_an_old_name_is_answered_with_the_new_one(cls, old, new):
    section, override = SECTIONS[cls]
    names = {field.name for field in fields(cls)}
    assert new in names and old not in names
    with pytest.raises(RecipeError) as error:
        read_recipe(SCENES, [override.format(key=old)])
    assert str(error.value) == f"{SCENES}: {section}{old} is now called {section}{new}."


def test_a_source_on_the_command_line_is_checked_as_in_a_recipe():
    assert read_source("a.json", ["format=pairs", "max_frames=4"]) == Source(
        path="a.json", format="pairs", max_frames=4
    )
    for override, sentence in (
        ("frames=4", "The command line: frames is now called max_frames."),
        ("max_frames=0", "max_frames should be above 0, not 0."),
        ("formt=pairs", "The command line: the key formt is unknown; the nearest is format."),
    ):
        with pytest.raises(RecipeError) as error:
            read_source("a.json", [override])
        assert str(error.value) == sentence


SOURCE = Source(path="a.json")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: OptimizerConfig(max_grad_norm=-1), "optimizer.max_grad_norm should be above 0, not -1."),
        (lambda: ModelConfig(base="a", max_length=0), "model.max_length should be above 0, not 0."),
        (
            lambda: ModelConfig(base="a", adapter=LoraSettings(dropout=1)),
            "model.adapter.dropout should be 0 or more and below 1, not 1.",
        ),
        (
            lambda: DataConfig(sources=(SOURCE, replace(SOURCE, shuffle_window=0))),
            "data.sources[1].shuffle_window should be above 0, not 0.",
        ),
        (
            lambda: ObjectiveConfig(matryoshka_dims=(8, 16), matryoshka_weights=(1, -2)),
            "objective.matryoshka_weights should be 0 or more, not -2.",
        ),
        (
            lambda: EvaluationConfig(sources=(replace(SOURCE, max_frames=-1),)),
            "evaluation.sources[0].max_frames should be above 0, not -1.",
        ),
        (
            lambda: Recipe(
                output="a",
                model=ModelConfig(base="a"),
                data=DataConfig(sources=(SOURCE,)),
                micro_batch=MicroBatchSize(crops=0),
            ),
            "micro_batch.crops should be above 0, not 0.",
        ),
    ],
)
def test_a_config_made_in_python_is_checked_against_its_ranges(make, sentence):
    with pytest.raises(RecipeError) as error:
        make()
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "cls",
    [Recipe, ModelConfig, DataConfig, ObjectiveConfig, OptimizerConfig, EvaluationConfig],
    ids=lambda c: c.__name__,
)
def test_every_field_of_the_recipe_is_documented_in_order(cls):
    documented = re.findall(r"^        (\w+): ", cls.__doc__.partition("Attributes:\n")[2], re.M)
    assert documented == [field.name for field in fields(cls)]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: ModelConfig(base="a", precision="fp8"),
            "model.precision should be one of fp32, bf16, fp16, not 'fp8'.",
        ),
        (lambda: ModelConfig(base="a", freeze=("tower",)), "model.freeze[0] should be one of vision_tower, projector,"),
        (lambda: OptimizerConfig(name="adam"), "optimizer.name should be one of adamw, adafactor, muon,"),
        (lambda: OptimizerConfig(learning_rate=math.inf), "optimizer.learning_rate should be finite, not inf."),
        (lambda: OptimizerConfig(learning_rate="1e-5"), "optimizer.learning_rate should be a number, not '1e-5'."),
        (lambda: EvaluationConfig(data=5), "evaluation.data should be text, not 5."),
        (
            lambda: DataConfig(sources=(replace(SOURCE, format="LLaVA"),)),
            "data.sources[0].format should be one of llava, karpathy, mmeb, pairs, not 'LLaVA'.",
        ),
    ],
)
def test_a_config_made_in_python_is_checked_against_its_words_and_types(make, sentence):
    """`precision="fp8"` trained in float32."""
    with pytest.raises(RecipeError) as error:
        make()
    assert str(error.value).startswith(sentence)


def test_a_leading_tilde_is_the_home_directory_in_every_path_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    file = tmp_path / "tilde.yaml"
    file.write_text(
        "output: ~/runs/a~b\nmodel: {base: ~/base, vision_cache: ~/cache}\nevaluation: {data: ~/eval, sources: "
        "[{path: '~/held.json'}]}\ndata: {sources: [{path: '~/{0..1}.tar', images: ~/images}, {path: 's3://b/~/a.json'},"
        " {path: a/~/b.json}]}\n"
    )
    recipe = read_recipe(file)
    home = "/home/someone"
    assert (recipe.output, recipe.model.base) == (f"{home}/runs/a~b", f"{home}/base")
    assert (recipe.model.vision_cache, recipe.evaluation.data) == (f"{home}/cache", f"{home}/eval")
    assert recipe.evaluation.sources[0].path == f"{home}/held.json"
    first, second, third = recipe.data.sources
    assert (first.path, first.images) == (f"{home}/{{0..1}}.tar", f"{home}/images")
    assert (second.path, third.path) == ("s3://b/~/a.json", "a/~/b.json")  # only where a path begins
    assert replace(recipe, output="~/x").output == f"{home}/x"  # in Python, and as an override
    assert read_recipe(file, ["output=~/y"]).output == f"{home}/y"
    assert read_source("~/a.json").path == f"{home}/a.json"
    assert read_recipe(file, ["output=~nobody-of-that-name/y"]).output == "~nobody-of-that-name/y"


def recipe_fields(cls: type = Recipe, where: str = "") -> list[str]:
    """The key of every field of a recipe, as overrides name it."""
    keys = []
    for name, hint in get_type_hints(cls).items():
        keys.append(where + name)
        if is_dataclass(hint):
            keys += recipe_fields(hint, f"{where}{name}.")
    return keys


KEYS = [*recipe_fields(), "model.adapter.rank", "micro_batch.tokens", "objective.unheard"]


@given(key=st.sampled_from(KEYS), value=ANY_JSON)
def test_any_value_in_any_field_of_a_recipe_is_taken_or_refused_in_a_sentence(key, value):
    try:
        recipe = read_recipe(SCENES, [f"{key}={json.dumps(value)}"])
    except RecipeError as error:
        assert "\n" not in str(error)
    else:
        json.dumps(as_json(recipe)).encode()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: " + "[" * 100_000, "is nested too deeply"),
        ("seed: 2026-13-45", "is not valid YAML: month must be in 1..12"),
        (f"seed: {'9' * 5000}", "is not valid YAML"),
        ("prompts: {system: 5}", "prompts.system should be text, not 5"),
        ('prompts: {system: "\\ud800"}', r"prompts.system holds half of a character, or a null: '.ud800'"),
        ('output: "a\\0b"', "output holds half of a character, or a null"),
    ],
)
def test_a_recipe_that_yaml_cannot_hold_is_told_in_a_sentence(tmp_path, text, sentence):
    file = tmp_path / "odd.yaml"
    file.write_text("output: a\nmodel: {base: a}\ndata: {sources: [{path: a.json}]}\n" + text)
    with pytest.raises(RecipeError, match=sentence) as error:
        read_recipe(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
