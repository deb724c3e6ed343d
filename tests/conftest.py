"""Shared parts: a tiny random model in the real LLaVA-OneVision classes, and a few scenes on disk."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # the tests run in several processes, as do those that they start

from pathlib import Path

import pytest
import torch

from cafe.data.source import Source
from cafe.instructions import Prompts
from cafe.processing import Processing
from cafe.scenes.base import corpus, make_model, make_processor
from cafe.scenes.write import write_scenes
from cafe.training.recipe import DataRecipe, ModelRecipe, OptimizerRecipe, Recipe

torch.set_num_threads(1)  # where a plugin imported torch before


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of an untrained base model."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    processor = make_processor(corpus(0, 100))
    model = make_model(processor)
    for parameter in model.parameters():
        if not parameter.any():  # layers that begin by passing on what they are given would hide what attention does
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    Processing(processor, Prompts()).save(directory)
    return directory


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world at its smallest: 48 training and 24 test pictures in every format."""
    directory = tmp_path_factory.mktemp("scenes")
    write_scenes(directory, train=48, test=24, report=lambda line: None)
    return directory


@pytest.fixture
def recipe(random_base: Path, scenes: Path, tmp_path: Path) -> Recipe:
    """A short run on the untrained base and the smallest world."""
    return Recipe(
        output=str(tmp_path / "run"),
        model=ModelRecipe(base=str(random_base)),
        data=DataRecipe(sources=(Source(path=str(scenes / "llava_train.json")),), workers=0),
        optimizer=OptimizerRecipe(learning_rate=1e-3, vision_tower_learning_rate=1e-4),
        batch_size=8,
        steps=4,
        log_every=1,
    )
