"""The joint step against the plain computation: one graph, every branch by itself, dense losses, in float64."""

from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from flops import ATTENTION
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from cafe.content import Content, Dialogue, Example, Pair, Turn
from cafe.data.dataset import (
    ContrastiveBatchDataset,
    EncodedExample,
    MicroBatchSize,
    encode_example,
    split_micro_batches,
)
from cafe.data.records import Source, open_source
from cafe.errors import CafeError
from cafe.losses import ContrastiveConfig, info_nce
from cafe.lvlm.prompts import Prompts
from cafe.model import Cafe
from cafe.packing import Branch, PackedBatch, PackingConfig
from cafe.training.optimizer import freeze
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep, has_dropout

PAIRS = 6


@pytest.fixture
def model(random_base: Path) -> Cafe:
    return load(random_base, torch.float64)


def load(base: Path, dtype: torch.dtype) -> Cafe:
    """The model, with norms in its own precision: Qwen's are in float32 whatever that is."""
    model = Cafe.load(base, Prompts(), dtype)
    for name, module in list(model.lvlm.named_modules()):
        if type(module).__name__ == "Qwen2RMSNorm":
            norm = nn.RMSNorm(module.weight.shape, module.variance_epsilon, dtype=dtype)
            norm.weight = module.weight
            model.lvlm.set_submodule(name, norm)
    return model


def batches(model: Cafe, scenes: Path, **options) -> ContrastiveBatchDataset:
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    return ContrastiveBatchDataset([source], model.chat_processor, PAIRS, seed=0, **options)


def encoded(model: Cafe, scenes: Path) -> list[EncodedExample]:
    """The examples of the first batch."""
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    places = batches(model, scenes).order(0).records[:PAIRS].tolist()
    return [encode_example(source.example(place, Random(f"0 0 {place}")), model.chat_processor) for place in places]


def plain(model: Cafe, scenes: Path, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Both losses, written from the paper: no packing, no cache, the whole similarity matrix, all logits."""
    examples = encoded(model, scenes)

    def forward(branch: Branch) -> torch.Tensor:
        vision = {
            name: tensor.double() if tensor.is_floating_point() else tensor
            for name, tensor in branch.image_inputs.items()
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
        said.append(logits[dialogue.loss_mask[1:]])
        labels.append(dialogue.input_ids[1:][dialogue.loss_mask[1:]])
    return F.cross_entropy(torch.cat(said), torch.cat(labels)), contrastive


def gradient(module: nn.Module) -> torch.Tensor:
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    return torch.cat([grad.flatten() for grad in grads]).double()


WAYS = {
    "one by one": {"packing": PackingConfig(share_prefixes=False)},
    "trees": {"packing": PackingConfig(max_row_tokens=200)},
    "cached": {"packing": PackingConfig(max_row_tokens=400), "size": MicroBatchSize(tokens=700)},
    "cached, one by one": {"packing": PackingConfig(share_prefixes=False), "size": MicroBatchSize(crops=10)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("measure", [False, True])
def test_the_gradient_is_the_plain_one_however_the_batch_is_cut(model, scenes, way, measure):
    objective = ObjectiveConfig(lm_weight=0.7, contrastive_weight=1.3, temperature=0.1)
    lm, contrastive = plain(model, scenes, objective)
    (0.7 * lm + 1.3 * contrastive).backward()
    expected = gradient(model.lvlm)
    model.lvlm.zero_grad()

    batch = batches(model, scenes, **WAYS[way])[0]
    assert (len(batch.micro_batches) > 1) == ("cached" in way)
    losses = JointStep(model.lvlm, objective)(batch, measure=measure)
    assert losses.lm.item() == pytest.approx(lm.item(), rel=1e-12)
    assert losses.contrastive.item() == pytest.approx(contrastive.item(), rel=1e-12)
    assert (gradient(model.lvlm) - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("way", WAYS)
def test_in_float32_the_gradient_is_that_of_float64_but_for_rounding(random_base, model, scenes, way):
    objective = ObjectiveConfig(lm_weight=0.7, contrastive_weight=1.3, temperature=0.1)
    lm, contrastive = plain(model, scenes, objective)
    (0.7 * lm + 1.3 * contrastive).backward()
    expected, single = gradient(model.lvlm), Cafe.load(random_base, Prompts(), torch.float32)
    losses = JointStep(single.lvlm, objective)(batches(single, scenes, **WAYS[way])[0])
    assert losses.lm.item() == pytest.approx(lm.item(), rel=1e-6)
    assert losses.contrastive.item() == pytest.approx(contrastive.item(), rel=1e-6)
    assert (gradient(single.lvlm) - expected).norm() <= 1e-5 * expected.norm()


def test_every_option_of_the_contrastive_loss_gives_the_same_gradient_however_the_batch_is_cut(model, scenes):
    options = ObjectiveConfig(
        lm_weight=0.0,
        temperature=0.1,
        symmetric=False,
        hardness_weight=2.0,
        false_negative_margin=0.3,
        matryoshka_dims=(16, 64),
    )
    examples = encoded(model, scenes)

    def last(branch: Branch) -> torch.Tensor:
        vision = {
            name: value.double() if value.is_floating_point() else value for name, value in branch.image_inputs.items()
        }
        return model.lvlm.model(input_ids=branch.input_ids[None], **vision).last_hidden_state[0, -1]

    queries = torch.stack([last(e.query) for e in examples])
    targets = torch.stack([last(e.target) for e in examples])
    hard = torch.stack([last(row) for e in examples for row in e.negatives])
    config = ContrastiveConfig(
        symmetric=False, hardness_weight=2.0, false_negative_margin=0.3, dim_weights={16: 1.0, 64: 1.0}
    )
    loss = info_nce(queries, targets, 0.1, hard, config=config)
    loss.backward()
    expected = gradient(model.lvlm)
    assert loss.item() != pytest.approx(info_nce(queries, targets, 0.1, hard).item(), rel=1e-3)
    for way in WAYS.values():
        model.lvlm.zero_grad()
        found = JointStep(model.lvlm, options)(batches(model, scenes, **way)[0])
        assert found.contrastive.item() == pytest.approx(loss.item(), rel=1e-12)
        assert (gradient(model.lvlm) - expected).norm() <= 1e-10 * expected.norm()


def test_a_prefix_that_no_embedding_has_is_one_sentence(model):
    with pytest.raises(CafeError, match=r"objective\.matryoshka: 1000 is not a prefix"):
        JointStep(model.lvlm, ObjectiveConfig(matryoshka_dims=(64, 1000)))


def test_a_temperature_that_is_given_is_taken_and_a_learned_one_comes_back_from_its_bound(model, scenes):
    batch = batches(model, scenes, language=False)[0]
    given = JointStep(model.lvlm, ObjectiveConfig(temperature=0.005))
    assert given(batch).temperature.item() == pytest.approx(0.005)
    learned = JointStep(model.lvlm, ObjectiveConfig(temperature=0.005, learn_temperature=True))
    assert learned(batch).temperature.item() == pytest.approx(0.01)
    assert learned.log_temperature.grad.abs() > 0


def test_dropout_draws_the_same_numbers_when_a_micro_batch_is_read_again(model, scenes):
    for layer in model.lvlm.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    model.lvlm.train()
    batch = batches(model, scenes, **WAYS["cached"])[0]
    step = JointStep(model.lvlm, ObjectiveConfig())
    seen: list[torch.Tensor] = []
    read = step.read

    def watched(pack: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
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


def test_language_alone_is_read_once_however_the_batch_is_cut(model, scenes):
    grads, read = [], []
    step = JointStep(model.lvlm, ObjectiveConfig(contrastive_weight=0.0))
    step.reading.register_forward_hook(lambda *_: read.append(torch.is_grad_enabled()))
    for size in (MicroBatchSize(), MicroBatchSize(tokens=200)):
        step.zero_grad()
        read.clear()
        batch = batches(model, scenes, contrast=False, size=size)[0]
        step(batch)
        assert read == [True] * len(batch.micro_batches)
        grads.append(gradient(step))
    assert len(read) > 1 and (grads[1] - grads[0]).norm() <= 1e-10 * grads[0].norm()


def test_dropout_is_found_in_every_part(model):
    lvlm = model.lvlm
    tower = next(part for part in lvlm.model.vision_tower.modules() if hasattr(part, "dropout"))
    layer = lvlm.model.language_model.layers[0].self_attn
    assert not has_dropout(lvlm) and not has_dropout(nn.Dropout(0.0)) and has_dropout(nn.Dropout(0.1))
    for part, name in ((tower, "dropout"), (layer, "attention_dropout")):
        setattr(part, name, 0.3)
        assert has_dropout(lvlm)
        setattr(part, name, 0.0)


def test_the_published_scale_is_one_over_the_processes(model, scenes, monkeypatch):
    batch = batches(model, scenes, packing=PackingConfig(max_row_tokens=200))[0]
    grads = {}
    for compat in ("exact", "published"):
        model.lvlm.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr("cafe.training.step.world_size", lambda: 4)
            JointStep(model.lvlm, ObjectiveConfig(lm_weight=0.0, gradient_scaling=compat))(batch)
        grads[compat] = gradient(model.lvlm)
    torch.testing.assert_close(grads["published"], grads["exact"] / 4)


def trie_size(branches: list[Branch]) -> int:
    """The tokens of some branches with every common prefix once, pictures compared by identity."""
    root, size = {}, 0
    for branch in branches:
        node = root
        for token, shown in zip(branch.input_ids.tolist(), branch.image_mask.tolist(), strict=True):
            key = (token, id(branch.image_inputs)) if shown else token
            size += key not in node
            node = node.setdefault(key, {})
    return size


def formula(lvlm: PreTrainedModel, pack: PackedBatch, branches: list[Branch], gradient: bool) -> float:
    """FLOPs of a pass over some branches: tower once a picture, layers once a token that is not shared but for what
    all share, which is there once a row; the head, and the last layer behind attention, on what is read."""
    text, vision = lvlm.config.text_config, lvlm.config.vision_config
    d, kv = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    before, behind = 2 * (d * d + 2 * d * kv), 2 * (d * d + 3 * d * text.intermediate_size)  # attention, in a layer
    rows, columns = pack.inputs["input_ids"].shape
    same = [len(set(tokens)) == 1 for tokens in zip(*(branch.input_ids.tolist() for branch in branches), strict=False)]
    tokens = trie_size(branches) + (rows - 1) * [*same, False].index(False)
    v, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    pictures = {
        id(branch.image_inputs): branch.image_inputs["pixel_values"] for branch in branches if branch.image_inputs
    }
    seen = sum(crops.shape[:2].numel() for crops in pictures.values()) * patches
    tower = vision.num_hidden_layers * 2 * seen * (4 * v * v + 2 * v * vision.intermediate_size)
    projector = 2 * seen * (v * d + d * d)
    head = 2 * len(pack.labels) * d * text.vocab_size
    layers = text.num_hidden_layers * tokens * (before + behind)
    layers -= (tokens - len(pack.labels) - len(pack.embedding_index)) * behind
    attention = 4 * (text.num_hidden_layers * rows * columns**2 * d + vision.num_hidden_layers * seen * patches * v)
    stem = 2 * seen * 3 * vision.patch_size**2 * v
    if not gradient:
        return layers + tower + projector + head + attention + stem
    # Attention makes its weights again for its backward pass, and pictures have no gradient.
    return 3 * (layers + tower + projector + head) + 3.5 * attention + 2 * stem


@pytest.mark.parametrize("size", [MicroBatchSize(), MicroBatchSize(tokens=700)], ids=["one pass", "cached"])
def test_the_flops_of_a_step_are_those_of_the_formula(model, scenes, size):
    """What the cache reads twice, it reads without the dialogues first."""
    batch, lvlm = batches(model, scenes, packing=model.packing, size=size)[0], model.lvlm.float()
    examples = encoded(model, scenes)
    embedded = [[one.query, one.target, *one.negatives] for one in examples]
    expected = 0.0
    cuts = split_micro_batches(embedded, [[one.dialogue] for one in examples], size)
    for micro_batch, part in zip(batch.micro_batches, cuts, strict=True):
        expected += formula(lvlm, micro_batch.joint, [branch for one in examples[part] for branch in one.all], True)
        if part.start:
            first = [branch for branches in embedded[part] for branch in branches]
            expected += formula(lvlm, micro_batch.embedding_only, first, False)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        JointStep(lvlm, ObjectiveConfig())(batch)
    assert (len(batch.micro_batches) > 1) == (size.tokens is not None)
    assert 0.95 * expected <= counter.get_total_flops() <= 1.05 * expected


def test_a_batch_with_nothing_to_train_on_changes_nothing(model, scenes):
    batch = batches(model, scenes, language=False).collate([])
    losses = JointStep(model.lvlm, ObjectiveConfig(lm_weight=0.0))(batch, measure=True)
    assert losses.lm == losses.contrastive == 0
    assert losses.measured == {"accuracy": 0.0, "grad_norm_contrastive": 0.0}
    assert not gradient(model.lvlm).any()


@pytest.mark.parametrize("measure", [False, True])
def test_a_micro_batch_of_texts_alone_adds_nothing_where_only_the_projector_is_trained(model, scenes, measure):
    freeze(model.lvlm, ["vision_tower", "language_model"])
    said = Dialogue((Turn("user", Content.of("Which?")), Turn("assistant", Content.of("the left one"))))
    texts = encode_example(Example(Pair(Content.of("a circle"), Content.of("a square")), said), model.chat_processor)
    found = []
    for size in (MicroBatchSize(), MicroBatchSize(tokens=1)):
        model.lvlm.zero_grad()
        batch = batches(model, scenes, size=size).collate([encoded(model, scenes)[0], texts])
        found.append((JointStep(model.lvlm, ObjectiveConfig())(batch, measure=measure), gradient(model.lvlm)))
    (whole, expected), (cut_up, grad) = found
    assert (cut_up.lm.item(), cut_up.contrastive.item()) == pytest.approx((whole.lm.item(), whole.contrastive.item()))
    assert expected.norm() > 0 and (grad - expected).norm() <= 1e-10 * expected.norm()
    assert cut_up.measured == pytest.approx(whole.measured)
