"""The joint step against the plain computation: one graph, every branch by itself, dense losses, in float64."""

from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cafe.data.formats import Source, open_source
from cafe.data.loading import Batches, MicroBatchSize, encode
from cafe.errors import CafeError
from cafe.instructions import Prompts
from cafe.model import Cafe
from cafe.objectives import matryoshka
from cafe.packing import Branch, Pack, Packing
from cafe.training.recipe import ObjectiveRecipe
from cafe.training.step import JointStep

PAIRS = 6


@pytest.fixture
def model(random_base: Path) -> Cafe:
    return Cafe.load(random_base, Prompts(), torch.float64)


def batches(model: Cafe, scenes: Path, **options) -> Batches:
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    return Batches([source], model.processing, PAIRS, seed=0, **options)


def plain(model: Cafe, scenes: Path, objective: ObjectiveRecipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses, written from the paper: no packing, no cache, the whole similarity matrix, all logits."""
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    places = batches(model, scenes).order(0).records[:PAIRS].tolist()
    examples = [encode(source.example(place, Random(f"0 0 {place}")), model.processing) for place in places]

    def forward(branch: Branch) -> torch.Tensor:
        vision = {
            name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in branch.vision.items()
        }
        return model.lvlm.model(input_ids=branch.input_ids[None], **vision).last_hidden_state[0]

    embed = lambda rows: F.normalize(torch.stack([forward(row)[-1] for row in rows]), dim=-1)  # noqa: E731
    queries, targets = embed([e.query for e in examples]), embed([e.target for e in examples])
    hard = embed([row for e in examples for row in e.negatives])
    matches = torch.arange(PAIRS)
    to_target = F.cross_entropy(queries @ torch.cat([targets, hard]).T / objective.temperature, matches)
    contrastive = (to_target + F.cross_entropy(targets @ queries.T / objective.temperature, matches)) / 2
    said, labels = [], []
    for dialogue in (e.dialogue for e in examples):
        logits = model.lvlm.lm_head(forward(dialogue))[:-1]
        said.append(logits[dialogue.supervised[1:]])
        labels.append(dialogue.input_ids[1:][dialogue.supervised[1:]])
    return F.cross_entropy(torch.cat(said), torch.cat(labels)), contrastive


def gradient(module: nn.Module) -> torch.Tensor:
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    return torch.cat([grad.flatten() for grad in grads]).double()


WAYS = {
    "one by one": {"packing": Packing(share=False)},
    "trees": {"packing": Packing(columns=200)},
    "cached": {"packing": Packing(columns=400), "size": MicroBatchSize(tokens=700)},
    "cached, one by one": {"packing": Packing(share=False), "size": MicroBatchSize(crops=10)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("measure", [False, True])
def test_the_gradient_is_the_plain_one_however_the_batch_is_cut(model, scenes, way, measure):
    objective = ObjectiveRecipe(lm_weight=0.7, contrastive_weight=1.3, temperature=0.1)
    lm, contrastive = plain(model, scenes, objective)
    (0.7 * lm + 1.3 * contrastive).backward()
    expected = gradient(model.lvlm)
    model.lvlm.zero_grad()

    batch = batches(model, scenes, **WAYS[way])[0]
    assert (len(batch.micro_batches) > 1) == ("cached" in way)
    losses = JointStep(model.lvlm, objective).double()(batch, measure=measure)
    assert losses.lm.item() == pytest.approx(lm.item(), rel=1e-9)
    assert losses.contrastive.item() == pytest.approx(contrastive.item(), rel=1e-6)
    found = gradient(model.lvlm)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_every_option_of_the_contrastive_loss_gives_the_same_gradient_however_the_batch_is_cut(model, scenes):
    options = ObjectiveRecipe(
        lm_weight=0.0, temperature=0.1, symmetric=False, hardness=2.0, margin=0.3, matryoshka=(16, 64)
    )
    order = batches(model, scenes).order(0).records[:PAIRS]
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    examples = [encode(source.example(place, Random(f"0 0 {place}")), model.processing) for place in order]

    def last(branch: Branch) -> torch.Tensor:
        vision = {name: value.double() if value.is_floating_point() else value for name, value in branch.vision.items()}
        return model.lvlm.model(input_ids=branch.input_ids[None], **vision).last_hidden_state[0, -1]

    queries = torch.stack([last(e.query) for e in examples])
    targets = torch.stack([last(e.target) for e in examples])
    hard = torch.stack([last(row) for e in examples for row in e.negatives])
    loss = matryoshka({16: 1.0, 64: 1.0}, queries, targets, 0.1, hard, symmetric=False, hardness=2.0, margin=0.3)
    loss.backward()
    expected = gradient(model.lvlm)
    assert loss.item() != pytest.approx(matryoshka({}, queries, targets, 0.1, hard).item(), rel=1e-3)
    for way in WAYS.values():
        model.lvlm.zero_grad()
        found = JointStep(model.lvlm, options).double()(batches(model, scenes, **way)[0])
        assert found.contrastive.item() == pytest.approx(loss.item(), rel=1e-6)
        assert (gradient(model.lvlm) - expected).norm() <= 1e-6 * expected.norm()


def test_a_prefix_that_no_embedding_has_is_one_sentence(model):
    with pytest.raises(CafeError, match=r"objective\.matryoshka: 1000 is not a prefix"):
        JointStep(model.lvlm, ObjectiveRecipe(matryoshka=(64, 1000)))


def test_a_temperature_that_is_given_is_taken_and_a_learned_one_comes_back_from_its_bound(model, scenes):
    batch = batches(model, scenes, language=False)[0]
    given = JointStep(model.lvlm, ObjectiveRecipe(temperature=0.005))
    assert given(batch).temperature.item() == pytest.approx(0.005)
    learned = JointStep(model.lvlm, ObjectiveRecipe(temperature=0.005, learn_temperature=True))
    assert learned(batch).temperature.item() == pytest.approx(0.01)
    assert learned.log_temperature.grad.abs() > 0


def test_dropout_draws_the_same_numbers_when_a_micro_batch_is_read_again(model, scenes):
    for layer in model.lvlm.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    model.lvlm.train()
    batch = batches(model, scenes, **WAYS["cached"])[0]
    step = JointStep(model.lvlm, ObjectiveRecipe()).double()
    seen: list[torch.Tensor] = []
    read = step.read

    def watched(pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        embedded, said = read(pack)
        seen.append(embedded.detach())
        return embedded, said

    step.read = watched
    step(batch)
    last = seen[-1]
    assert len(seen) == 2 * len(batch.micro_batches) - 1  # the others, the first, which is read once, the others again
    assert all(torch.equal(one, again) for one, again in zip(seen, reversed(seen), strict=True))
    state = torch.get_rng_state()
    step(batch)
    assert not torch.equal(seen[-1], last) and not torch.equal(state, torch.get_rng_state())


def test_the_published_scale_is_one_over_the_processes(model, scenes, monkeypatch):
    batch = batches(model, scenes, packing=Packing(columns=200))[0]
    grads = {}
    for compat in ("exact", "published"):
        model.lvlm.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr("cafe.training.step.world", lambda: 4)
            JointStep(model.lvlm, ObjectiveRecipe(lm_weight=0.0, compat=compat)).double()(batch)
        grads[compat] = gradient(model.lvlm)
    torch.testing.assert_close(grads["published"], grads["exact"] / 4)


def test_the_flops_of_a_step_are_those_of_the_formula(model, scenes):
    """Tower once a picture, layers once a token that is not shared, the head and the last layer behind attention on
    what is read; thrice for backward."""
    batch = batches(model, scenes, packing=Packing(columns=160))[0]
    joint = batch.micro_batches[0].joint
    lvlm = model.lvlm.float()
    with FlopCounterMode(display=False) as counter:
        JointStep(lvlm, ObjectiveRecipe())(batch)
    text, vision = lvlm.config.text_config, lvlm.config.vision_config
    d, kv = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    before, behind = 2 * (d * d + 2 * d * kv), 2 * (d * d + 3 * d * text.intermediate_size)  # attention, in a layer
    rows, columns = joint.inputs["input_ids"].shape
    attention = 4 * rows * columns**2 * d
    v, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    crops = joint.inputs["pixel_values"].shape[:2].numel()
    seen = crops * patches
    tower = vision.num_hidden_layers * (
        2 * seen * (4 * v * v + 2 * v * vision.intermediate_size) + 4 * seen * patches * v
    )
    stem = 2 * seen * 3 * vision.patch_size**2 * v
    projector = 2 * seen * (v * d + d * d)
    head = 2 * len(joint.labels) * d * text.vocab_size
    layers = text.num_hidden_layers * (joint.filled * (before + behind) + attention)
    layers -= (joint.filled - len(joint.labels) - len(joint.readouts)) * behind
    formula = 3 * (layers + tower + projector + head) + 2 * stem
    assert counter.get_total_flops() <= 1.05 * formula


def test_a_batch_with_nothing_to_train_on_changes_nothing(model, scenes):
    batch = batches(model, scenes, language=False).of([])
    losses = JointStep(model.lvlm, ObjectiveRecipe(lm_weight=0.0))(batch, measure=True)
    assert losses.lm == losses.contrastive == 0
    assert not gradient(model.lvlm).any()
