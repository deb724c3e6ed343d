"""What is written holds what was trained: every weight, finite, in its own precision."""

import json
import subprocess
import sys
from dataclasses import replace

import families
import pytest
import torch
from model_samples import make
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from cafe.attention.registration import CAFE_TREE
from cafe.errors import CheckpointError
from cafe.lvlm.adapters import LoraSettings, add_adapter
from cafe.lvlm.families import model_part
from cafe.lvlm.saving import save_lvlm, unsaved_weights
from cafe.model import Cafe
from cafe.training.optimizer import configure_trainable_parameters
from cafe.training.recipe import ModelConfig


def nudge_trained(model: Cafe) -> dict[str, torch.Tensor]:
    """Change every weight that is trained, as training does; return them by name."""
    torch.manual_seed(3)
    trained = {name: p for name, p in model.lvlm.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return trained


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"freeze": ("vision_tower",), "precision": "bf16", "frozen_weights_dtype": "bf16"},
        {"freeze": ("language_model",), "precision": "bf16", "frozen_weights_dtype": "bf16"},
        {"freeze": ("projector", "vision_tower")},
        {"adapter": LoraSettings(rank=2)},
        {"adapter": LoraSettings(rank=2, dora=True, vision_tower=("all",), projector=("all",))},
    ],
    ids=["full", "language", "vision", "language-fp32", "lora", "dora"],
)
def test_every_trained_weight_is_in_the_files_bit_for_bit(random_base, tmp_path, setting, four_bit):
    frozen = "language_model" in setting.get("freeze", ()) or "adapter" in setting
    if four_bit and not frozen:
        pytest.skip("quantized weights are not trained")
    model = Cafe.load(random_base, four_bit=four_bit)
    if four_bit:
        setting = {**setting, "frozen_weights_dtype": "4bit", "precision": "bf16"}
    configure_trainable_parameters(model.lvlm, ModelConfig(base=str(random_base), **setting))
    trained = nudge_trained(model)
    model.save(tmp_path / "saved")
    again = dict(Cafe.load(tmp_path / "saved", four_bit=four_bit and "adapter" in setting).lvlm.named_parameters())
    assert trained and all(torch.equal(again[name], parameter) for name, parameter in trained.items())


def test_transformers_loads_trained_float32_beside_frozen_bfloat16_in_full(random_base, tmp_path):
    """It takes the dtype that the configuration names: that of the first weight, which here is frozen in 16 bits."""
    model = Cafe.load(random_base)
    setting = ModelConfig(
        base=str(random_base), freeze=("vision_tower", "projector"), precision="bf16", frozen_weights_dtype="bf16"
    )
    configure_trainable_parameters(model.lvlm, setting)
    trained = nudge_trained(model)
    assert model.lvlm.dtype == torch.bfloat16 and {p.dtype for p in trained.values()} == {torch.float32}
    model.save(tmp_path / "saved")
    theirs = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype="auto").named_parameters())
    assert all(torch.equal(theirs[name], parameter) for name, parameter in trained.items())


def test_a_file_without_a_trained_weight_is_noticed(random_base, tmp_path):
    model = Cafe.load(random_base)
    model.lvlm.save_pretrained(tmp_path)
    assert unsaved_weights(model.lvlm, tmp_path) == []
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["language_model.model.layers.1.mlp.up_proj.weight"], tensors["image_newline"]
    save_file(tensors, file, metadata={"format": "pt"})
    lost = ["model.image_newline", "model.language_model.layers.1.mlp.up_proj.weight"]
    assert sorted(unsaved_weights(model.lvlm, tmp_path)) == lost
    model.lvlm.model.image_newline.requires_grad_(False)  # the base model's
    assert unsaved_weights(model.lvlm, tmp_path) == lost[1:]


def test_a_model_with_an_adapter_is_not_saved_if_its_own_weights_were_trained(random_base, tmp_path):
    model = Cafe.load(random_base)
    add_adapter(model.lvlm, LoraSettings(rank=2))
    projector = [n for n, _ in model.lvlm.named_parameters() if model_part(n, "llava_onevision") == "projector"]
    model.lvlm.model.multi_modal_projector.requires_grad_(True)
    with pytest.raises(CheckpointError, match=rf"lack weights that were trained, {projector[1]} and 3 others"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_modules_that_an_adapter_holds_as_a_whole_are_loaded_merged_and_saved(random_base, tmp_path):
    base = AutoModelForImageTextToText.from_pretrained(random_base)
    targets = r".*language_model.*q_proj"
    peft = get_peft_model(base, LoraConfig(r=2, target_modules=targets, modules_to_save=["multi_modal_projector"]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    peft.save_pretrained(tmp_path / "adapter")
    expected = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(random_base), tmp_path / "adapter"
    ).merge_and_unload()

    from cafe.lvlm.adapters import merge

    model = Cafe.load(tmp_path / "adapter")  # without processor files: it takes the base's
    assert merge(model.lvlm) == 1
    save_lvlm(model.lvlm.requires_grad_(True), tmp_path / "merged")
    found = dict(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").named_parameters())
    for name, parameter in expected.named_parameters():
        assert torch.allclose(found[name], parameter, atol=1e-6), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("adapter", [False, True])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(random_base, tmp_path, value, adapter):
    model = Cafe.load(random_base)
    if adapter:
        add_adapter(model.lvlm, LoraSettings(rank=2))
    model.save(tmp_path / "good")
    name, parameter = [item for item in model.lvlm.named_parameters() if not adapter or "lora_B" in item[0]][-1]
    with torch.no_grad():
        parameter.view(-1)[0] = value
    with pytest.raises(CheckpointError, match=f"The weight {name} holds values that are not finite"):
        model.save(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()

    file = tmp_path / "good" / ("adapter_model.safetensors" if adapter else "model.safetensors")
    tensors = load_file(file)
    key = next(key for key in tensors if adapter or "layers.1.mlp.up_proj" in key)
    tensors[key].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"The weight \S+ of {tmp_path}/good holds values that are not finite"):
        Cafe.load(tmp_path / "good")


def test_the_configuration_names_the_dtype_of_weights_of_one_kind(random_base, tmp_path):
    model = replace(Cafe.load(random_base, dtype=torch.bfloat16))
    model.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", families.FAMILIES)
def test_no_file_of_a_checkpoint_names_our_attention(family, tmp_path):
    model = make(family)
    assert (CAFE_TREE in str(vars(model.lvlm.config.get_text_config()))) == (family != "paligemma2")
    model.save(tmp_path / "saved")
    for file in (tmp_path / "saved").rglob("*.*"):
        assert CAFE_TREE.encode() not in file.read_bytes(), file


LOAD_ELSEWHERE = """
import sys, torch
from transformers import AutoModelForImageTextToText
path, ids, logits = sys.argv[1:]
lvlm = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64)
torch.save(lvlm(input_ids=torch.load(ids)).logits.detach(), logits)
assert lvlm.config.get_text_config()._attn_implementation == "sdpa"
assert "cafe" not in sys.modules
"""


def test_transformers_loads_a_checkpoint_in_a_process_that_never_imports_this_package(random_base, tmp_path):
    model = Cafe.load(random_base, dtype=torch.float64)
    model.save(tmp_path / "saved")
    input_ids = torch.arange(10, 30)[None]
    torch.save(input_ids, tmp_path / "ids.pt")
    paths = [str(tmp_path / name) for name in ("saved", "ids.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, *paths], check=True)
    with torch.no_grad():
        expected = model.lvlm(input_ids=input_ids).logits
    torch.testing.assert_close(torch.load(paths[2]), expected, rtol=1e-10, atol=1e-10)
