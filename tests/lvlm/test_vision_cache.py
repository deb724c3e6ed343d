"""A frozen tower encodes each crop once per step, or once ever with a directory, and nothing else changes."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from threading import Barrier

import pytest
import torch
from families import FAMILIES, WIDTH
from model_samples import SMALL, TALL, WIDE, Listed, examples, make
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import LlavaConfig, PixtralVisionConfig, PixtralVisionModel

from cafe.content import Content
from cafe.data.batch import Batch, MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.lvlm import vision_cache
from cafe.lvlm.families import find_vision_tower
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.prompts import Prompts
from cafe.lvlm.vision_cache import VisionCache, hash_patched_images, hash_rows
from cafe.model import Cafe
from cafe.packing import PackingConfig, pack
from cafe.training.optimizer import freeze
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep

PAIRS = 6
CROPS = 5  # of an image: a thumbnail and four


@pytest.fixture
def model(random_base) -> Cafe:
    model = Cafe.load(random_base, Prompts(), torch.float32)
    freeze(model.lvlm, ["vision_tower"])
    return model


@pytest.fixture
def batch(model, scenes) -> Batch:
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    size = MicroBatchSize(tokens=700)
    batch = ContrastiveBatchDataset(
        [source], model.chat_processor, PAIRS, 0, packing=PackingConfig(max_row_tokens=160), micro_batch_size=size
    )[0]
    assert len(batch.micro_batches) > 1
    return batch


class Counted:
    """Counts the crops that a tower is given."""

    def __init__(self, tower: torch.nn.Module) -> None:
        self.crops, self.read = 0, tower.forward
        tower.forward = self

    def __call__(self, *crops: Tensor, **named: object) -> object:
        self.crops += len(crops[0] if crops else named["pixel_values"])
        return self.read(*crops, **named)


def follow(model: Cafe, batch: Batch, vision: VisionCache | None) -> tuple[float, Tensor]:
    model.lvlm.zero_grad()
    losses = JointStep(model.lvlm, ObjectiveConfig(), vision=vision).forward_backward(batch)
    grads = [p.grad.flatten() for p in model.lvlm.parameters() if p.grad is not None]
    return losses.lm.item() + losses.contrastive.item(), torch.cat(grads)


def test_the_tower_encodes_an_image_twice_trained_once_frozen_never_cached(model, batch, tmp_path):
    """Twice but for those of one micro-batch, whose graph is kept."""
    tower = find_vision_tower(model.lvlm)
    counted = Counted(tower)
    loss, gradient = follow(model, batch, None)
    kept = batch.micro_batches[0].joint.inputs["pixel_values"].shape[:2].numel()
    assert counted.crops == 2 * PAIRS * CROPS - kept
    for cache, times in ((None, 1), (tmp_path, 1), (tmp_path, 0)):
        counted.crops = 0
        again, same = follow(model, batch, VisionCache(tower, model.lvlm.config, cache))
        assert counted.crops == times * PAIRS * CROPS
        assert again == pytest.approx(loss, rel=1e-5)
        assert (same - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "gemma4"])
def test_images_of_their_own_sizes_are_encoded_once_too(family, tmp_path):
    model = make(family)
    freeze(model.lvlm, ["vision_tower", "projector"])
    size = MicroBatchSize(tokens=400)
    batch = ContrastiveBatchDataset(
        [Listed(examples())], model.chat_processor, 4, seed=0, packing=model.packing, micro_batch_size=size
    )[0]
    patches = sum(
        len(model.chat_processor.process_images([each]).inputs["pixel_values"]) for each in (SMALL, WIDE, TALL)
    )
    tower = find_vision_tower(model.lvlm)
    counted = Counted(tower)
    loss, gradient = follow(model, batch, None)
    assert counted.crops > 2 * patches  # some are in several contents
    for cache, times in ((None, 1), (tmp_path, 1), (tmp_path, 0)):
        counted.crops = 0
        again, same = follow(model, batch, VisionCache(tower, model.lvlm.config, cache))
        assert counted.crops == times * patches
        assert again == pytest.approx(loss, rel=1e-5)
        assert (same - gradient).norm() <= 1e-5 * gradient.norm()


def test_images_of_the_same_patches_in_another_grid_hash_differently():
    patches, other = torch.randn(12, 6), torch.randn(4, 6)
    grids = torch.tensor([[1, 3, 4], [1, 2, 2]])
    keys = hash_patched_images(torch.cat([patches, other]), grids)
    turned = hash_patched_images(torch.cat([other, patches]), torch.tensor([[1, 2, 2], [1, 4, 3]]))
    assert turned[0] == keys[1] and turned[1] != keys[0] != keys[1]


@pytest.mark.parametrize("told", [True, False])
def test_a_packed_tower_encodes_each_image_once(told, tmp_path):
    size = {"image_size": 32, "patch_size": 8, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlavaConfig(vision_config=PixtralVisionConfig(num_attention_heads=2, **size), vision_feature_layer=-1)
    tower, crops = PixtralVisionModel(config.vision_config).eval(), torch.rand(3, 3, 32, 32)
    sizes = torch.tensor([[32, 32], [16, 32], [32, 16]])
    crops[2, :, :, :16] = crops[1, :, :16].reshape(3, 32, 16)  # the same numbers in another shape: another image
    counted = Counted(tower)

    def read_some(*which: int) -> Tensor:
        named = {"image_sizes": sizes[list(which)]} if told else {}
        return tower(crops[list(which)], **named, output_hidden_states=True).hidden_states[-1]

    calls = [(0,), (1, 2), (2, 0, 1)]
    with torch.no_grad():
        expected = [read_some(*which) for which in calls]
        for times in (1, 0):
            counted.crops = 0
            with VisionCache(tower, config, tmp_path / str(told)).enabled():
                for which, whole in zip(calls, expected, strict=True):
                    torch.testing.assert_close(read_some(*which), whole)
            assert counted.crops == times * len(crops)


def test_vision_cache_of_other_weights_is_not_used(model, batch, tmp_path):
    tower = find_vision_tower(model.lvlm)
    follow(model, batch, VisionCache(tower, model.lvlm.config, tmp_path))
    with torch.no_grad():
        next(tower.parameters()).add_(1)
    counted = Counted(tower)
    follow(model, batch, VisionCache(tower, model.lvlm.config, tmp_path))
    assert counted.crops == PAIRS * CROPS


def test_processes_can_fill_a_vision_cache_directory_at_once(model, tmp_path, monkeypatch):
    """Each writes the same image before either renames its file."""
    save, both = vision_cache.save_output, Barrier(2, timeout=60)
    monkeypatch.setattr(vision_cache, "save_output", lambda made, file: (save(made, file), both.wait()))
    crops = torch.randn(1, 3, 32, 32)

    def fill(tower: torch.nn.Module) -> Tensor:
        with VisionCache(tower, model.lvlm.config, tmp_path).enabled():
            return tower(crops).last_hidden_state

    tower = find_vision_tower(model.lvlm)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(fill, [tower, deepcopy(tower)])
    assert torch.equal(one, other) and [file.suffix for file in tmp_path.rglob("*.*")] == [".safetensors"]


class Runs:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (self.mark.touch, ())


def damage(file: Path, how: str) -> None:
    """Damage a file of features."""
    with safe_open(file, "pt") as saved:
        metadata = saved.metadata()
    tensors = load(file.read_bytes())
    first = next(iter(tensors))
    match how:
        case "pickle":
            torch.save(Runs(file.parent / "ran"), file)
        case "cut":
            file.write_bytes(file.read_bytes()[:-7])
        case "empty":
            file.write_bytes(b"")
        case "integers":
            save_file(tensors | {first: tensors[first].long()}, file, metadata)
        case "rows":
            save_file({name: tensor.repeat_interleave(3, 0) for name, tensor in tensors.items()}, file, metadata)
        case "narrow":
            save_file({name: tensor[..., :-1].contiguous() for name, tensor in tensors.items()}, file, metadata)
        case "fields":
            save_file(tensors, file, metadata | {"fields": json.dumps({"os": ["tuple", 3]})})
        case "class":
            save_file(tensors, file, metadata | {"class": "Popen"})
        case _:
            save_file(tensors, file)


KINDS_OF_DAMAGE = ["pickle", "cut", "empty", "integers", "rows", "narrow", "fields", "class", "no metadata"]


@pytest.mark.parametrize("how", KINDS_OF_DAMAGE)
def test_damaged_features_are_made_again_and_run_nothing(model, tmp_path, caplog, how):
    tower = find_vision_tower(model.lvlm)
    crops = torch.randn(3, 3, 32, 32)

    def encode() -> Tensor:
        with VisionCache(tower, model.lvlm.config, tmp_path).enabled(), torch.no_grad():
            return tower(crops).last_hidden_state

    expected = encode()
    files = sorted(tmp_path.rglob("*.safetensors"))
    whole = [load(file.read_bytes()) for file in files]
    damage(files[1], how)
    counted = Counted(tower)
    torch.testing.assert_close(encode(), expected)
    assert counted.crops in (1, 3) and "made again" in caplog.text and not list(tmp_path.rglob("ran"))
    torch.testing.assert_close([load(file.read_bytes()) for file in files], whole)
    counted.crops = 0
    torch.testing.assert_close(encode(), expected)
    assert counted.crops == 0 and sorted(tmp_path.rglob("*.*")) == files


def test_a_pipe_in_the_place_of_features_is_not_waited_for(model, tmp_path):
    tower = find_vision_tower(model.lvlm)
    for _ in range(2):
        with VisionCache(tower, model.lvlm.config, tmp_path).enabled(), torch.no_grad():
            tower(torch.ones(1, 3, 32, 32))
        [file] = tmp_path.rglob("*.safetensors")
        file.unlink()
        os.mkfifo(file)


@pytest.mark.parametrize("every", [False, True])  # hidden states, which older versions of transformers return
@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llava", -2),
        ("llava_next", [-2, 2]),
        ("llava_onevision", -1),
        ("internvl", -1),
        ("internvl", -2),
        ("gemma3", None),
        ("paligemma", None),
    ],
)
def test_vision_cache_keeps_only_the_outputs_that_the_model_reads(family, layers, every, tmp_path):
    model = FAMILIES[family]()
    tower = find_vision_tower(model.lvlm)
    count = len(layers) if isinstance(layers, list) else 1
    if layers is not None:
        model.lvlm.config.vision_feature_layer = layers
    if count > 1:
        model.lvlm.model.multi_modal_projector.linear_1 = torch.nn.Linear(count * WIDTH, WIDTH)
    done = pack([[model.encode_embedding(Content.of(Image.new("RGB", (64, 64), "red")))]], [[]], model.packing)
    plain = tower.forward
    with torch.no_grad():
        expected = forward_packed(model.lvlm, done)[0]
        if every and layers is not None:
            tower.forward = lambda *rows, **named: plain(*rows, **named | {"output_hidden_states": True})
        for _ in range(2):
            vision = VisionCache(tower, model.lvlm.config, tmp_path)
            with vision.enabled():
                for _ in range(2):
                    torch.testing.assert_close(forward_packed(model.lvlm, done)[0], expected)
                for made in vision.cached.values():
                    assert sum(leaf.ndim == 3 for leaf in tree_leaves(made) if leaf is not None) == count
            tower.forward = None  # the second time from disk


@pytest.mark.parametrize("family", ["llava_onevision", "gemma3"])
def test_vision_cache_of_one_micro_batch_holds_views_of_the_output(family):
    model = FAMILIES[family]()
    tower = find_vision_tower(model.lvlm)
    crops = torch.randn(3, 3, 32, 32)
    vision = VisionCache(tower, model.lvlm.config)
    with vision.enabled():
        made = tower(crops, output_hidden_states=-1 if family == "llava_onevision" else None)
        kept, returned = (
            {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(of) if leaf is not None}
            for of in (list(vision.cached.values()), made)
        )
        assert kept and kept <= returned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hash_of_a_crop_does_not_depend_on_its_neighbors(dtype):
    crops = torch.randn(5, 3, 8, 8).to(dtype)
    keys = hash_rows(crops)
    assert len(set(keys.tolist())) == 5
    assert torch.equal(hash_rows(crops[[3, 1]]), keys[[3, 1]])
    crops[0, 0, 0, 0] += 1
    assert hash_rows(crops)[0] != keys[0]
