"""The base model: its lessons, its training from one seed, and what the shipped one can and cannot do."""

from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cafe.content import Content
from cafe.lvlm.loading import load_processor
from cafe.lvlm.processing import ChatProcessor
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe
from cafe.scenes import BASE
from cafe.scenes.base import Lessons, in_one_color, train_base
from cafe.scenes.draw import paint
from cafe.scenes.words import CAPTION_PROMPT, captions, name, questions
from cafe.scenes.world import draw_scene, draw_scenes, split_of

TEST = draw_scenes(0, "test", 60, distinct=True)


@pytest.fixture(scope="module")
def shipped() -> Cafe:
    return Cafe.load(BASE)


@pytest.fixture(scope="module")
def lessons() -> Lessons:
    return Lessons(ChatProcessor(load_processor(str(BASE)), Prompts()), seed=0, steps=10, batch=6)


def test_lessons_are_reproducible_and_in_order(lessons):
    again = Lessons(lessons.chat_processor, seed=0, steps=10, batch=6)
    assert [set(lessons[step]) for step in (0, 1, 2, 9)] == [{"by place"}] * 2 + [{"caption", "questions"}] * 2
    for step in (0, 4):
        for kind, pack in lessons[step].items():
            assert all(torch.equal(tensor, again[step][kind].inputs[key]) for key, tensor in pack.inputs.items())
    shown = [pack.inputs["pixel_values"] for step in range(10) for pack in lessons[step].values()]
    images = torch.cat(shown).flatten(1)
    assert len(images) == 60 == len(images.unique(dim=0))


def test_images_processed_together_are_as_processed_alone(lessons):
    images = [paint(draw_scene(0, "train", index)) for index in range(4)]
    for together, image in zip(lessons._process_images(images), images, strict=True):
        alone = lessons.chat_processor.process_images([image])
        assert together.token_runs == alone.token_runs
        assert all(torch.equal(together.inputs[key], value) for key, value in alone.inputs.items())


def test_scenes_in_one_color_are_training_scenes_with_unambiguous_names():
    changed = 0
    for scene in (draw_scene(0, "train", index, 4) for index in range(200)):
        alike = in_one_color(scene)
        changed += alike != scene
        assert split_of(alike.things) == "train" and len({name(thing) for thing in alike.things}) == len(alike.things)
        assert alike == scene or alike.things[0].color == alike.things[1].color
    assert changed > 50


def test_training_the_base_is_reproducible_and_writes_a_checkpoint(tmp_path):
    for directory in ("one", "two"):
        train_base(tmp_path / directory, steps=2, batch=4, workers=0, report=lambda line: None)
    one, two = (load_file(tmp_path / directory / "model.safetensors") for directory in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert Cafe.load(tmp_path / "one").embed(["a red circle"]).shape == (1, 160)


def test_the_shipped_base_is_small(shipped):
    assert sum(parameter.numel() for parameter in shipped.lvlm.parameters()) <= 3_000_000
    assert sum(file.stat().st_size for file in BASE.iterdir()) <= 6_000_000


def test_the_shipped_base_generates_well_and_retrieves_nothing(shipped):
    images = [paint(scene) for scene in TEST]
    texts = shipped.generate_batch([Content.of([image, CAPTION_PROMPT]) for image in images])
    assert np.mean([text in captions(scene.things) for text, scene in zip(texts, TEST, strict=True)]) >= 0.85
    asked = [(i, q) for i, scene in zip(images, TEST, strict=True) for q in questions(scene, Random(scene.name))]
    answers = shipped.generate_batch([Content.of([image, question.text]) for image, question in asked])
    assert np.mean([answer == q.answer for answer, (_, q) in zip(answers, asked, strict=True)]) >= 0.9
    words = shipped.embed([captions(scene.things)[0] for scene in TEST])
    nearest = (shipped.embed(images) @ words.T).argmax(1)
    assert np.mean(nearest == np.arange(len(TEST))) <= 0.1
