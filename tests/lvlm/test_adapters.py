"""Adapters: what is adapted, that packing and the gradient cache stay exact with one, and that it can be merged."""

import json
from dataclasses import replace

import families
import numpy as np
import pytest
import torch
from model_samples import CONTENTS, Listed, examples, gradient, make, plain_losses
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from cafe.attention.blockwise import Blocks
from cafe.attention.registration import CAFE_TREE
from cafe.cli.main import main
from cafe.data.batch import MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.errors import CafeError
from cafe.lvlm.adapters import LoraSettings, add_adapter, find_target_modules, has_adapter, merge
from cafe.lvlm.families import model_part
from cafe.model import Cafe
from cafe.training.loop import train
from cafe.training.recipe import ModelConfig, ObjectiveConfig, OptimizerConfig, Recipe
from cafe.training.step import JointStep

ALL = ("all",)
NO_PROJECTOR = {"gemma3", "ovis2"}  # theirs is a parameter by itself, or none
SOME = ["llava_onevision", "qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl", "gemma3", "glm4v"]
DORA = [("llava_onevision", True), ("qwen3_vl", True)]
CASES = [(family, False) for family in SOME] + DORA


def shake(model: Cafe) -> None:
    """Gives every matrix of an adapter weights that are felt: a fresh one changes nothing."""
    torch.manual_seed(1)
    for name, parameter in model.lvlm.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def everywhere(family: str, **options) -> LoraSettings:
    return LoraSettings(
        rank=4, language_model=ALL, vision_tower=ALL, projector=None if family in NO_PROJECTOR else ALL, **options
    )


def adapted(family: str, **options) -> Cafe:
    model = make(family)
    add_adapter(model.lvlm, everywhere(family, **options))
    shake(model)
    return model


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_adapted_layer_gets_a_gradient(family):
    model = adapted(family)
    named = dict(model.lvlm.double().named_parameters())
    trained = {name for name, parameter in named.items() if parameter.requires_grad}
    assert trained == {name for name in named if "lora_" in name}
    parts = {"vision_tower", "language_model", *([] if family in NO_PROJECTOR else ["projector"])}
    assert {model_part(name, family) for name in trained} == parts
    model.lvlm.requires_grad_(True)
    lm, contrastive = plain_losses(model, ObjectiveConfig())
    (lm + contrastive).backward()
    layers = [module for module in model.lvlm.modules() if isinstance(module, BaseTunerLayer)]
    felt = lambda parameter: parameter.grad is not None and bool(parameter.grad.any())  # noqa: E731
    for layer in layers:
        assert felt(layer.lora_A["default"].weight) == felt(layer.lora_B["default"].weight) == felt(layer.weight)
    assert sum(felt(layer.weight) for layer in layers) >= 0.7 * len(layers)  # some towers' last layers are not used


@pytest.mark.parametrize(("family", "dora"), [(family, False) for family in families.FAMILIES] + DORA)
def test_losses_and_gradients_are_the_plain_ones_in_any_micro_batches(family, dora):
    model = adapted(family, dora=dora)
    model.lvlm.double()
    objective = ObjectiveConfig(lm_weight=0.7, contrastive_weight=1.3, temperature=0.1)
    lm, contrastive = plain_losses(model, objective)
    (0.7 * lm + 1.3 * contrastive).backward()
    expected = gradient(model)
    assert expected.norm() > 0
    for size in (MicroBatchSize(), MicroBatchSize(tokens=400)):
        model.lvlm.zero_grad()
        batch = ContrastiveBatchDataset(
            [Listed(examples())], model.chat_processor, 4, seed=0, packing=model.packing, micro_batch_size=size
        )[0]
        assert (len(batch.micro_batches) > 1) == (size.tokens is not None)
        losses = JointStep(model.lvlm, objective).double().forward_backward(batch)
        assert losses.lm.item() == pytest.approx(lm.item(), rel=1e-5)
        assert losses.contrastive.item() == pytest.approx(contrastive.item(), rel=1e-5)
        assert (gradient(model) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_gradient_cache_with_dropout_has_the_gradient_of_one_graph(family):
    model = adapted(family, dropout=0.3)
    model.lvlm.double().train()
    objective = ObjectiveConfig(temperature=0.1)
    size = MicroBatchSize(tokens=400)
    batch = ContrastiveBatchDataset(
        [Listed(examples())], model.chat_processor, 4, seed=0, packing=model.packing, micro_batch_size=size
    )[0]
    step = JointStep(model.lvlm, objective).double()
    torch.manual_seed(7)
    reads = [step.packed_forward(micro_batch.joint) for micro_batch in reversed(batch.micro_batches)][
        ::-1
    ]  # first one last
    assert len(reads) > 1
    vectors = torch.cat([embedded for embedded, _ in reads])
    slots = torch.cat([micro_batch.embedding_slots for micro_batch in batch.micro_batches])
    contrastive, _ = step.contrastive_loss(
        torch.empty_like(vectors).index_copy(0, slots, vectors), batch, torch.tensor(0.1), False
    )
    (contrastive + torch.stack([said for _, said in reads]).sum() / batch.num_supervised).backward()
    expected = gradient(model)
    model.lvlm.zero_grad()
    torch.manual_seed(7)
    assert step.forward_backward(batch).contrastive.item() == pytest.approx(contrastive.item(), rel=1e-6)
    assert (gradient(model) - expected).norm() <= 1e-6 * expected.norm()
    model.lvlm.zero_grad()
    step.forward_backward(batch)  # draws anew
    assert (gradient(model) - expected).norm() > 1e-2 * expected.norm()


@pytest.mark.parametrize(("family", "dora"), CASES)
def test_a_saved_adapter_loads_and_merges_into_the_same_model(family, dora, tmp_path):
    make(family).save(tmp_path / "base")
    model = Cafe.load(tmp_path / "base", dtype=torch.float64)
    contents = list(CONTENTS.values())
    before = model.embed(contents)
    add_adapter(model.lvlm, everywhere(family, dora=dora))
    np.testing.assert_allclose(model.embed(contents), before, atol=1e-7)  # a fresh one changes nothing
    shake(model)
    expected = model.embed(contents)
    assert np.abs(expected - before).max() > 0.01
    model.save(tmp_path / "adapter", temperature=0.05)
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "cafe.json"} <= files and "config.json" not in files

    again = Cafe.load(tmp_path / "adapter", dtype=torch.float64)
    assert type(again.lvlm) is type(model.lvlm) and again.metadata["temperature"] == 0.05
    np.testing.assert_allclose(again.embed(contents), expected, atol=1e-7)
    theirs = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base", dtype=torch.float64), tmp_path / "adapter"
    )
    again.lvlm = theirs.merge_and_unload().eval()
    np.testing.assert_allclose(again.embed(contents), expected, atol=1e-7)

    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = Cafe.load(tmp_path / "merged")
    assert not has_adapter(merged.lvlm) and type(merged.lvlm) is type(model.lvlm)
    np.testing.assert_allclose(merged.embed(contents), expected, atol=1e-4)


def test_a_truncated_adapter_file_is_reported(random_base, tmp_path):
    model = Cafe.load(random_base)
    add_adapter(model.lvlm, LoraSettings())
    model.save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CafeError, match="No adapter can be loaded from"):
        Cafe.load(tmp_path)


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    adapter = LoraSettings(rank=4, vision_tower=("q_proj", "v_proj"), dropout=0.1)
    optimizer = OptimizerConfig(learning_rate=1e-2, vision_tower_learning_rate=None)
    return replace(recipe, model=replace(recipe.model, adapter=adapter), optimizer=optimizer, max_steps=3)


def test_training_an_adapter_changes_no_other_weights_and_reports_its_size(recipe, tmp_path):
    said = []
    checkpoint = train(recipe, report=said.append)
    assert "Training vision tower 0." in said[0]
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["lm_loss"] < log[0]["lm_loss"]
    model = Cafe.load(checkpoint)
    assert has_adapter(model.lvlm) and model.metadata["recipe"]["model"]["adapter"]["rank"] == 4
    base = dict(Cafe.load(recipe.model.base).lvlm.named_parameters())
    for name, parameter in model.lvlm.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, base[name.replace(".base_layer", "")])
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    image = Image.new("RGB", (64, 64), "red")
    np.testing.assert_allclose(Cafe.load(tmp_path / "merged").embed([image]), model.embed([image]), atol=1e-5)


def test_image_grids_hold_with_an_adapter_and_merged(recipe, tmp_path, capsys):
    limited = replace(recipe, model=replace(recipe.model, image_grids=((1, 1),)), max_steps=1)
    checkpoint = train(limited, report=lambda line: None)
    assert main(["merge", str(checkpoint), str(tmp_path / "merged")]) == 0
    image = Image.new("RGB", (64, 64), "red")
    found = [Cafe.load(path).embed([image]) for path in (checkpoint, tmp_path / "merged")]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["image_grid_pinpoints"] == [[32, 32]]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "keep.txt").touch()
    for output, sentence in (
        (tmp_path / "home", "not a checkpoint of cafe"),
        (checkpoint, "take the place of the adapter"),
    ):
        assert main(["merge", str(checkpoint), str(output)]) == 1
        assert sentence in capsys.readouterr().err
    assert (tmp_path / "home" / "keep.txt").exists() and (checkpoint / "adapter_config.json").exists()


@pytest.fixture(scope="module")
def even_base(random_base, tmp_path_factory):
    """A base whose text has multiples of 64 everywhere, as bitsandbytes wants on CPUs with AVX-512 for bfloat16."""
    base = Cafe.load(random_base)
    text = base.lvlm.config.text_config
    text.hidden_size, text.intermediate_size, text.num_key_value_heads = 128, 512, text.num_attention_heads
    lvlm = AutoModelForImageTextToText.from_config(base.lvlm.config)
    directory = tmp_path_factory.mktemp("base") / "even"
    replace(base, lvlm=lvlm).save(directory)
    return directory


@pytest.mark.parametrize(
    ("precision", "weights"), [("bf16", "bf16"), ("bf16", "4bit"), ("fp16", "fp16"), ("fp16", "4bit")]
)
def test_adapter_stays_float32_beside_frozen_weights_of_fewer_bits(recipe, even_base, precision, weights):
    half = replace(recipe.model, base=str(even_base), precision=precision, frozen_weights_dtype=weights)
    checkpoint = train(replace(recipe, model=half, max_steps=1, batch_size=2), report=lambda line: None)
    weights_of = load_file(checkpoint / "adapter_model.safetensors")
    assert weights_of and all(tensor.dtype == torch.float32 for tensor in weights_of.values())
    vectors = Cafe.load(checkpoint, four_bit=weights == "4bit").embed(["a red circle"])
    assert np.linalg.norm(vectors) == pytest.approx(1, abs=1e-5)


def test_4bit_weights_are_the_language_models_layers_alone(random_base):
    lvlm = Cafe.load(random_base, four_bit=True, dtype=torch.bfloat16).lvlm
    kinds = {name: parameter.dtype for name, parameter in lvlm.named_parameters()}
    assert {model_part(name, "llava_onevision") for name, kind in kinds.items() if kind == torch.uint8} == {
        "language_model"
    }
    assert lvlm.lm_head.weight.dtype == torch.bfloat16
    assert all(type(layer.self_attn.q_proj).__name__ == "Linear4bit" for layer in lvlm.model.language_model.layers)


@pytest.mark.parametrize("four_bit", [False, True])
def test_adapted_merged_and_4bit_models_attend_along_trees(even_base, tmp_path, monkeypatch, four_bit):
    attend, columns = Blocks.attend, []
    monkeypatch.setattr(Blocks, "attend", lambda *args: columns.append(args[1].shape[2]) or attend(*args))

    def assert_uses_trees(model):
        columns.clear()
        vectors = model.embed(["a red circle", "a red square"])
        assert len(columns) == model.lvlm.config.get_text_config().num_hidden_layers
        assert model.lvlm.config.get_text_config()._attn_implementation == CAFE_TREE
        return vectors

    model = Cafe.load(even_base, four_bit=four_bit)
    assert_uses_trees(model)
    add_adapter(model.lvlm, LoraSettings(rank=2))
    shake(model)
    vectors = assert_uses_trees(model)
    model.save(tmp_path / "adapter")
    model = Cafe.load(tmp_path / "adapter", four_bit=four_bit)
    np.testing.assert_allclose(assert_uses_trees(model), vectors, atol=1e-5)
    if not four_bit:  # which cannot be merged
        merge(model.lvlm)
        np.testing.assert_allclose(assert_uses_trees(model), vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"language_model": ("q_prj",)},
            "model.adapter.language_model: no linear layer is called 'q_prj'; there are .*q_proj",
        ),
        ({"language_model": None}, "names no layer"),
    ],
)
def test_an_unknown_adapter_layer_is_reported(random_base, change, sentence):
    with pytest.raises(CafeError, match=sentence):
        find_target_modules(Cafe.load(random_base).lvlm, LoraSettings(**change))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"frozen_weights_dtype": "bf16"}, "goes with model.precision: bf16"),
        ({"frozen_weights_dtype": "bf16", "precision": "fp16"}, "bf16 goes with model.precision: bf16"),
        ({"frozen_weights_dtype": "4bit"}, "goes with model.precision: bf16 or fp16"),
        ({"frozen_weights_dtype": "bf16", "precision": "bf16", "shard": True}, "goes without model.shard"),
        ({"frozen_weights_dtype": "4bit", "precision": "bf16"}, "4bit needs model.adapter"),
        ({"adapter": LoraSettings(), "freeze": ("projector",)}, "freezes every part itself"),
    ],
)
def test_conflicting_adapter_settings_are_reported(fields, sentence):
    with pytest.raises(CafeError, match=sentence):
        ModelConfig(base="scenes", **fields)


def test_a_missing_package_is_named(random_base, tmp_path, monkeypatch, capsys):
    model = Cafe.load(random_base)
    add_adapter(model.lvlm, LoraSettings(rank=2))
    with pytest.raises(CafeError, match="has an adapter already"):
        add_adapter(model.lvlm, LoraSettings(rank=2))
    model.save(tmp_path / "adapter")
    model = Cafe.load(random_base)
    monkeypatch.setattr("cafe.lvlm.adapters.find_spec", lambda name: None)
    monkeypatch.setattr("cafe.lvlm.quantization.find_spec", lambda name: None)
    for act in (lambda: add_adapter(model.lvlm, LoraSettings()), lambda: Cafe.load(tmp_path / "adapter")):
        with pytest.raises(CafeError, match="needs the package peft"):
            act()
    with pytest.raises(CafeError, match="need the package bitsandbytes"):
        Cafe.load(random_base, four_bit=True)
    assert main(["merge", str(random_base), str(tmp_path / "merged")]) == 1
    assert "has no adapter to merge" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
def test_merging_into_a_bfloat16_base_keeps_float32_and_says_what_16_bits_would_lose(
    random_base, tmp_path, capsys, scale
):
    """A small learning rate teaches less than bfloat16 can tell from the base's weight."""
    Cafe.load(random_base, dtype=torch.bfloat16).save(tmp_path / "base")
    model = Cafe.load(tmp_path / "base", dtype=torch.bfloat16)
    add_adapter(model.lvlm, LoraSettings(rank=4))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.lvlm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=scale)
    model.save(tmp_path / "adapter")

    # The weights and their change by the formula, in float64.
    settings, matrices = LoraSettings(rank=4), load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights, changes = {}, {}
    for key, a in matrices.items():
        if key.endswith("lora_A.weight"):
            b = matrices[key.replace("lora_A", "lora_B")]
            layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            weights[layer] = model.lvlm.get_submodule(layer).get_base_layer().weight.detach().double()
            changes[layer] = settings.alpha / settings.rank * b.double() @ a.double()

    def merged_by(*options: str) -> tuple[dict[str, torch.Tensor], str]:
        output = tmp_path / f"merged{len(options)}"
        assert main(["merge", str(tmp_path / "adapter"), str(output), *options]) == 0
        lvlm = AutoModelForImageTextToText.from_pretrained(output, dtype="auto")
        return {layer: lvlm.get_submodule(layer).weight.detach() for layer in weights}, capsys.readouterr().out

    found, said = merged_by()
    assert "Rounded to float32, 100.0% of the adapter's change is kept." in said
    for layer, weight in found.items():
        assert weight.dtype == torch.float32
        assert torch.allclose(weight.double(), weights[layer] + changes[layer], atol=1e-7)

    found, said = merged_by("--dtype", "bfloat16")
    kept = total = 0.0
    for layer, weight in found.items():
        assert weight.dtype == torch.bfloat16
        rounded = (weights[layer] + changes[layer]).float().bfloat16()
        assert (weight == rounded).double().mean() > 0.999  # but for ties that float32 and float64 break otherwise
        kept += float(((rounded.double() - weights[layer]) * changes[layer]).sum())
        total += float(changes[layer].square().sum())
    assert f"Rounded to bfloat16, {kept / total:.1%} of the adapter's change is kept." in said
    assert kept / total < 0.9 if scale < 1e-3 else kept / total > 0.9
