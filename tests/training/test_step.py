"""The joint step against the plain computation: one graph, every branch by itself, dense losses, in float64."""

from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cafe.data.formats import Source, open_source
from cafe.data.loading import Batches, MicroBatchSize, encode
from cafe.instructions import Prompts
from cafe.model import Cafe
from cafe.packing import Branch, Packing
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
    source, places = open_source(Source(path=str(scenes / "llava_train.json"))), batches(model, scenes).order(0)[:PAIRS]
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
