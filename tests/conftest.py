"""Shared parts: a tiny random model in the real LLaVA-OneVision classes, and a few scenes on disk."""

import inspect
import os

# The tests run in several processes, and so do the runs that they start: threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings
from transformers import AttentionInterface

# The same examples each time; `make fuzz` draws many, and others each time.
settings.register_profile("tests", derandomize=True, deadline=None)
settings.register_profile("fuzz", max_examples=300, deadline=None, print_blob=True)
settings.load_profile("tests")

# Check the annotations of these packages, shapes included, at run time: before the first import of cafe.
SHAPE_CHECKED = ["cafe.packing", "cafe.losses", "cafe.attention", "cafe.lvlm.forward"]
INT_IS_FLOAT = "beartype.BeartypeConf(is_pep484_tower=True)"
jaxtyping.install_import_hook(SHAPE_CHECKED, f"beartype.beartype(conf={INT_IS_FLOAT})")

from cafe.attention import blockwise, flex, paths, registration  # noqa: E402
from cafe.data.source import Source  # noqa: E402
from cafe.lvlm.processing import ChatProcessor  # noqa: E402
from cafe.lvlm.prompts import Prompts  # noqa: E402
from cafe.scenes.base import MODEL, corpus  # noqa: E402
from cafe.scenes.tiny_llava import make_model, make_processor  # noqa: E402
from cafe.scenes.write import write_scenes  # noqa: E402
from cafe.training.recipe import DataConfig, ModelConfig, OptimizerConfig, Recipe  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # a plugin may have imported torch before


@pytest.fixture
def compilable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the checks of shapes away from what compiled layers call: `torch.compile` does not trace them."""
    for module in (registration, paths, blockwise, flex):
        owners = [module, *(each for each in vars(module).values() if isinstance(each, type))]
        for owner in owners:
            for name, function in list(vars(owner).items()):
                if inspect.isfunction(function) and function.__module__.startswith("cafe.attention."):
                    monkeypatch.setattr(owner, name, inspect.unwrap(function))
    for name in (registration.CAFE_TREE, registration.CAFE_TREE_FLEX):
        monkeypatch.setitem(AttentionInterface._global_mapping, name, registration.attend)


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of an untrained base model."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    processor = make_processor(corpus(0, 100), MODEL)
    model = make_model(processor, MODEL)
    # Few layers, for speed: two of each kind, and the language model's last, which is a kind of its own.
    text, vision = model.model.language_model, model.model.vision_tower.encoder
    text.layers, vision.layers = text.layers[:3], vision.layers[:2]
    model.config.text_config.num_hidden_layers, model.config.vision_config.num_hidden_layers = 3, 2
    model.config.text_config.layer_types = model.config.text_config.layer_types[:3]
    for parameter in model.parameters():
        if not parameter.any():  # layers that begin by passing on what they are given would hide what attention does
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    ChatProcessor(processor, Prompts()).save(directory)
    return directory


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the synthetic dataset at its smallest: 48 training and 24 test images in every format."""
    directory = tmp_path_factory.mktemp("scenes")
    write_scenes(directory, train=48, test=24, report=lambda line: None)
    return directory


@pytest.fixture
def recipe(random_base: Path, scenes: Path, tmp_path: Path) -> Recipe:
    """A short run on the untrained base and the smallest dataset."""
    return Recipe(
        output=str(tmp_path / "run"),
        model=ModelConfig(base=str(random_base)),
        data=DataConfig(sources=(Source(path=str(scenes / "llava_train.json")),), num_workers=0),
        optimizer=OptimizerConfig(learning_rate=1e-3, vision_tower_learning_rate=1e-4),
        batch_size=8,
        max_steps=4,
        logging_steps=1,
    )
