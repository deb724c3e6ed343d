"""Lessons ask evenly, the tower starts with whitened patches, and a training that was interrupted ends the same."""

from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from torch import nn

from another_hand.base import MODEL, PROMPTS, BaseConfig, Lessons, _add_noise, ask, draw_scene, train_base
from another_hand.concepts import read_list
from another_hand.scenes import CELL
from another_hand.tower import Batches, Teacher, train_teacher, train_tower, whiten
from another_hand.world import World
from cafe.lvlm.processing import ChatProcessor
from cafe.scenes.tiny_llava import make_model, make_processor

CONCEPTS = ["tiger", "cow", "rose", "tulip", "lemon", "pear", "bus", "train", "key", "door", "watch", "star"]
TINY = replace(MODEL, width=32, vision_layers=1, text_layers=1)


@pytest.fixture(scope="module")
def world() -> World:
    """Make a world of noise: twelve concepts in pairs of subgroups, by one hand."""
    rng = np.random.default_rng(0)
    pairs = dict(zip(CONCEPTS[::2], CONCEPTS[1::2], strict=True))
    return World(
        concepts=CONCEPTS,
        subgroups={name: [name, other] for one, two in pairs.items() for name, other in ((one, two), (two, one))},
        groups=dict.fromkeys(CONCEPTS, "objects"),
        partners={"tiger": "key", "key": "tiger"},
        hands={name: ["noise"] for name in CONCEPTS},
        drawings={("noise", name): rng.integers(0, 256, (3, CELL, CELL, 4), dtype=np.uint8) for name in CONCEPTS},
        variants=2,
    )


def test_questions_about_presence_are_balanced_and_true(world):
    answers, asked_present, asked_absent = Counter(), Counter(), Counter()
    for number in range(600):
        rng = Random(number)
        scene = draw_scene(world, rng, f"scene {number}", 0.3)
        for dialogue in ask(scene, world, rng):
            question, answer = dialogue[-1]
            if not question.startswith("Does the image show"):
                continue
            (concept,) = [name for name in CONCEPTS if question.endswith((f" {name}?",))]
            assert answer == ("yes" if concept in scene.concepts else "no")
            answers[answer] += 1
            (asked_present if answer == "yes" else asked_absent)[concept] += 1
    assert answers["yes"] == answers["no"]
    # No concept is mostly there or mostly absent when it is asked for, except for partners, which are shown more often.
    for name in set(CONCEPTS) - {"tiger", "key"}:
        assert 0.3 < asked_present[name] / (asked_present[name] + asked_absent[name]) < 0.7, name


def test_few_concepts_keep_to_themselves(world):
    few = world.few(6, seed=0)
    assert len(few.concepts) == 6
    assert all(set(few.subgroups[name]) <= set(few.concepts) for name in few.concepts)
    assert world.few(6, seed=0).concepts == few.concepts


def test_whitened_patches_are_uncorrelated():
    torch.manual_seed(0)
    # Smooth images, whose pixels are alike.
    images = nn.functional.interpolate(torch.randn(200, 3, 6, 6), size=CELL, mode="bilinear")
    embedding = nn.Conv2d(3, 8, kernel_size=16, stride=16)
    whiten(embedding, images)
    embedded = embedding(images).flatten(2).transpose(1, 2).flatten(0, 1).detach().numpy().astype(np.float64)
    covariance = np.cov(embedded.T)
    correlation = covariance / np.sqrt(np.outer(covariance.diagonal(), covariance.diagonal()))
    assert np.abs(correlation - np.eye(8)).max() < 0.02


COLORS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], dtype=torch.uint8)


def draw_colors(size: int) -> Batches:
    """Make batches of drawings of one color each, which are as many classes."""
    drawings = torch.full((len(COLORS), 1, 4, CELL, CELL), 255, dtype=torch.uint8)
    drawings[:, 0, :3] = COLORS[:, :, None, None]
    return Batches(drawings, torch.arange(len(COLORS)), size, seed=0)


def test_mixtures_are_labeled_by_the_shares_of_what_is_in_them():
    images, shares = draw_colors(200).draw_mixed(classes=5)
    colors = (images.double().mean(dim=(2, 3)) + 1) / 2
    # The fifth class is never drawn. Yellow is red and green, so that shares are compared by their color.
    expected = shares[:, :4].double() @ (COLORS.double() / 255)
    assert (shares[:, 4] == 0).all()
    assert torch.allclose(colors, expected, atol=1e-5)
    mixed = ((shares > 0).sum(dim=1) == 2).double().mean()
    assert 0.4 < mixed < 0.75  # four in five are mixed, a quarter of these with their own class


def test_the_tower_learns_what_the_teacher_sees():
    torch.manual_seed(0)
    batches = draw_colors(16)
    teacher = train_teacher(batches, classes=4, steps=20)
    images, labels = batches.draw()
    assert (teacher(images).argmax(dim=1) == labels).float().mean() > 0.9

    model = make_model(make_processor(["tiger"], TINY), TINY)
    tower = model.model.vision_tower
    train_tower(tower, teacher, batches, steps=40)
    tokens = tower(pixel_values=images).last_hidden_state.mean(dim=1).detach()
    centers = torch.stack([tokens[labels == label].mean(dim=0) for label in range(4)])
    assert (torch.cdist(tokens, centers).argmin(dim=1) == labels).float().mean() > 0.9


def test_teacher_sees_a_place_for_each_eight_pixels():
    teacher = Teacher(classes=5)
    assert teacher.body(torch.zeros(1, 3, CELL, CELL)).shape == (1, 128, 6, 6)


def test_noise_has_its_amount_in_standard_deviations():
    torch.manual_seed(0)
    features = 3 * torch.randn(400, 9, 8) + 5
    (noisy,) = _add_noise(0.5, nn.Identity(), (features,))
    amounts = (noisy - features).std(dim=(1, 2)) / 3
    assert abs(amounts.mean().item() - 0.5) < 0.05
    assert amounts.min() < 0.1 and 0.9 < amounts.max() < 1.2


def test_an_interrupted_training_ends_with_the_same_weights(world, tmp_path, monkeypatch):
    monkeypatch.setattr("another_hand.base.SAVE_EVERY", 2)
    config = BaseConfig(model=TINY, steps=4, batch=3, few_at_first=())

    def train(directory, fail_at=None):
        """Train from the same weights, and fail at a step if one is given."""
        (directory / "stages").mkdir(parents=True, exist_ok=True)
        processor = make_processor([*CONCEPTS, *read_list()] * 5, TINY)
        torch.manual_seed(0)
        model = make_model(processor, TINY)
        lessons = Lessons.__getitem__

        def fail(self, step):
            """Fail at the step."""
            if step == fail_at:
                raise KeyboardInterrupt
            return lessons(self, step)

        monkeypatch.setattr(Lessons, "__getitem__", fail)
        try:
            train_base(model, ChatProcessor(processor, PROMPTS), world, config, directory, workers=0)
        finally:
            monkeypatch.setattr(Lessons, "__getitem__", lessons)
        return model.state_dict()

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", fail_at=3)
    resumed = train(tmp_path / "broken")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
