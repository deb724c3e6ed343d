"""The joint step against the plain computation: one graph, every branch by itself, dense losses, in float64."""

import json
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from flops import ATTENTION
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from cafe.attention.masks import tree_mask
from cafe.content import Content, Dialogue, Example, Pair, Turn
from cafe.data.batch import NO_LIMIT, MicroBatchSize, split_micro_batches
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.encoding import EncodedExample, encode_example
from cafe.data.records import open_source
from cafe.data.source import Source
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
    """Load the model with norms that compute in its dtype: Qwen's always compute in float32."""
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
    """Encode the examples of the first batch."""
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    indices = batches(model, scenes).order(0).records[:PAIRS].tolist()
    return [encode_example(source.example(index, Random(f"0 0 {index}")), model.chat_processor) for index in indices]


def plain(model: Cafe, scenes: Path, objective: ObjectiveConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute both losses as the paper writes them: no packing, no cache, the whole similarity matrix, all logits."""
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
    logits, labels = [], []
    for dialogue in (e.dialogue for e in examples):
        every = model.lvlm.lm_head(forward(dialogue))[:-1]
        logits.append(every[dialogue.loss_mask[1:]])
        labels.append(dialogue.input_ids[1:][dialogue.loss_mask[1:]])
    return F.cross_entropy(torch.cat(logits), torch.cat(labels)), contrastive


def gradient(module: nn.Module) -> torch.Tensor:
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.parameters()]
    return torch.cat([grad.flatten() for grad in grads]).double()


WAYS = {
    "one by one": {"packing": PackingConfig(share_prefixes=False)},
    "trees": {"packing": PackingConfig(max_row_tokens=200)},
    "cached": {"packing": PackingConfig(max_row_tokens=400), "micro_batch_size": MicroBatchSize(tokens=700)},
    "cached, one by one": {
        "packing": PackingConfig(share_prefixes=False),
        "micro_batch_size": MicroBatchSize(crops=10),
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("log_grad_norms", [False, True])
def test_gradient_is_the_plain_one_however_the_batch_is_cut(model, scenes, way, log_grad_norms):
    objective = ObjectiveConfig(lm_weight=0.7, contrastive_weight=1.3, temperature=0.1)
    lm, contrastive = plain(model, scenes, objective)
    (0.7 * lm + 1.3 * contrastive).backward()
    expected = gradient(model.lvlm)
    model.lvlm.zero_grad()

    batch = batches(model, scenes, **WAYS[way])[0]
    assert (len(batch.micro_batches) > 1) == ("cached" in way)
    losses = JointStep(model.lvlm, objective).forward_backward(batch, log_grad_norms=log_grad_norms)
    assert losses.lm.item() == pytest.approx(lm.item(), rel=1e-12)
    assert losses.contrastive.item() == pytest.approx(contrastive.item(), rel=1e-12)
    assert (gradient(model.lvlm) - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("size", [NO_LIMIT, MicroBatchSize(crops=4)])
def test_captions_of_one_image_are_no_negatives_of_each_other(model, scenes, tmp_path, size):
    """COCO flattened, a row a caption; the formula is over the model's own embeddings."""
    images = [row["image"] for row in json.loads((scenes / "llava_train.json").read_text())[:3]]
    rows = [{"query_image": name, "positive": f"{way} caption of {name}"} for name in images for way in ("a", "one")]
    (tmp_path / "flat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(Source(path=str(tmp_path / "flat.jsonl"), format="pairs", images=str(scenes)))
    dataset = ContrastiveBatchDataset(
        [source], model.chat_processor, PAIRS, seed=0, language=False, micro_batch_size=size
    )
    batch = dataset[0]
    step = JointStep(model.lvlm, ObjectiveConfig())
    losses = step.forward_backward(batch)

    embeddings = F.normalize(step.embed_without_grad(batch, batch.micro_batches).embeddings.detach(), dim=-1)
    logits = embeddings[:PAIRS] @ embeddings[PAIRS:].T / 0.05
    shown = [rows[int(index)]["query_image"] for index in dataset.order(0).records]
    for i, j in product(range(PAIRS), repeat=2):
        if i != j and shown[i] == shown[j]:
            logits[i, j] = -torch.inf
    matches = torch.arange(PAIRS)
    expected = (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2
    assert losses.contrastive.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_float32_gradient_is_that_of_float64_but_for_rounding(random_base, model, scenes, way):
    objective = ObjectiveConfig(lm_weight=0.7, contrastive_weight=1.3, temperature=0.1)
    lm, contrastive = plain(model, scenes, objective)
    (0.7 * lm + 1.3 * contrastive).backward()
    expected, single = gradient(model.lvlm), Cafe.load(random_base, Prompts(), torch.float32)
    losses = JointStep(single.lvlm, objective).forward_backward(batches(single, scenes, **WAYS[way])[0])
    assert losses.lm.item() == pytest.approx(lm.item(), rel=1e-6)
    # Relative to the logits, whose rounding a small loss inherits.
    assert losses.contrastive.item() == pytest.approx(contrastive.item(), abs=1e-6 / objective.temperature)
    assert (gradient(single.lvlm) - expected).norm() <= 1e-5 * expected.norm()


def test_contrastive_options_give_the_plain_gradient_however_the_batch_is_cut(model, scenes):
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
        losses = JointStep(model.lvlm, options).forward_backward(batches(model, scenes, **way)[0])
        assert losses.contrastive.item() == pytest.approx(loss.item(), rel=1e-12)
        assert (gradient(model.lvlm) - expected).norm() <= 1e-10 * expected.norm()


def test_matryoshka_dim_beyond_the_embedding_is_rejected(model):
    with pytest.raises(CafeError, match=r"objective\.matryoshka_dims: 1000 is not a prefix"):
        JointStep(model.lvlm, ObjectiveConfig(matryoshka_dims=(64, 1000)))


def test_learned_temperature_is_clamped_and_a_fixed_one_is_not(model, scenes):
    batch = batches(model, scenes, language=False)[0]
    given = JointStep(model.lvlm, ObjectiveConfig(temperature=0.005))
    assert given.forward_backward(batch).temperature.item() == pytest.approx(0.005)
    learned = JointStep(model.lvlm, ObjectiveConfig(temperature=0.005, learn_temperature=True))
    assert learned.forward_backward(batch).temperature.item() == pytest.approx(0.01)
    assert learned.log_temperature.grad.abs() > 0


def test_dropout_is_replayed_in_the_second_pass(model, scenes):
    for layer in model.lvlm.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.3
    model.lvlm.train()
    batch = batches(model, scenes, **WAYS["cached"])[0]
    step = JointStep(model.lvlm, ObjectiveConfig())
    outputs: list[torch.Tensor] = []
    step.packed_forward.register_forward_hook(lambda module, args, made: outputs.append(made[0].detach()))
    step.forward_backward(batch)
    last = outputs[-1]
    # All but the first micro-batch, then the first, which runs once, then the others again.
    assert len(outputs) == 2 * len(batch.micro_batches) - 1
    assert all(torch.equal(one, again) for one, again in zip(outputs, reversed(outputs), strict=True))
    state = torch.get_rng_state()
    step.forward_backward(batch)
    assert not torch.equal(outputs[-1], last) and not torch.equal(state, torch.get_rng_state())


def test_language_only_batch_runs_once_however_it_is_cut(model, scenes):
    grads, forwards = [], []
    step = JointStep(model.lvlm, ObjectiveConfig(contrastive_weight=0.0))
    step.packed_forward.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    for size in (MicroBatchSize(), MicroBatchSize(tokens=200)):
        step.zero_grad()
        forwards.clear()
        batch = batches(model, scenes, contrast=False, micro_batch_size=size)[0]
        step.forward_backward(batch)
        assert forwards == [True] * len(batch.micro_batches)
        grads.append(gradient(step))
    assert len(forwards) > 1 and (grads[1] - grads[0]).norm() <= 1e-10 * grads[0].norm()


def test_has_dropout_finds_it_in_every_part(model):
    lvlm = model.lvlm
    tower = next(part for part in lvlm.model.vision_tower.modules() if hasattr(part, "dropout"))
    layer = lvlm.model.language_model.layers[0].self_attn
    assert not has_dropout(lvlm) and not has_dropout(nn.Dropout(0.0)) and has_dropout(nn.Dropout(0.1))
    for part, name in ((tower, "dropout"), (layer, "attention_dropout")):
        setattr(part, name, 0.3)
        assert has_dropout(lvlm)
        setattr(part, name, 0.0)


def test_published_gradient_scaling_is_one_over_the_world_size(model, scenes, monkeypatch):
    batch = batches(model, scenes, packing=PackingConfig(max_row_tokens=200))[0]
    grads = {}
    for scaling in ("exact", "published"):
        model.lvlm.zero_grad()
        with monkeypatch.context() as patch:
            patch.setattr("cafe.training.step.world_size", lambda: 4)
            JointStep(model.lvlm, ObjectiveConfig(lm_weight=0.0, gradient_scaling=scaling)).forward_backward(batch)
        grads[scaling] = gradient(model.lvlm)
    torch.testing.assert_close(grads["published"], grads["exact"] / 4)


def trie_size(branches: list[Branch]) -> int:
    """Count the tokens of some branches, every common prefix once, with images compared by identity."""
    root, size = {}, 0
    for branch in branches:
        node = root
        for token, is_image in zip(branch.input_ids.tolist(), branch.image_mask.tolist(), strict=True):
            key = (token, id(branch.image_inputs)) if is_image else token
            size += key not in node
            node = node.setdefault(key, {})
    return size


def formula(lvlm: PreTrainedModel, pack: PackedBatch, branches: list[Branch], gradient: bool) -> float:
    """Estimate the FLOPs of a pass over some branches: the tower once per image; the layers once per token of the trie,
    except that what all branches share is there once per row; the head, and the last layer after attention, on the
    tokens whose hidden states are used."""
    text, vision = lvlm.config.text_config, lvlm.config.vision_config
    d, kv = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    before, behind = 2 * (d * d + 2 * d * kv), 2 * (d * d + 3 * d * text.intermediate_size)  # attention, in a layer
    rows = len(pack.inputs["input_ids"])
    same = [len(set(tokens)) == 1 for tokens in zip(*(branch.input_ids.tolist() for branch in branches), strict=False)]
    tokens = trie_size(branches) + (rows - 1) * [*same, False].index(False)
    tokens += pack.inputs["input_ids"].numel() - pack.num_tokens  # padding is computed too
    v, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    images = {
        id(branch.image_inputs): branch.image_inputs["pixel_values"] for branch in branches if branch.image_inputs
    }
    patch_count = sum(crops.shape[:2].numel() for crops in images.values()) * patches
    tower = vision.num_hidden_layers * 2 * patch_count * (4 * v * v + 2 * v * vision.intermediate_size)
    projector = 2 * patch_count * (v * d + d * d)
    head = 2 * len(pack.labels) * d * text.vocab_size
    layers = text.num_hidden_layers * tokens * (before + behind)
    layers -= (tokens - len(pack.labels) - len(pack.embedding_index)) * behind
    seen = int(tree_mask(pack.tree.subtree_end).sum())
    attention = 4 * (text.num_hidden_layers * seen * d + vision.num_hidden_layers * patch_count * patches * v)
    stem = 2 * patch_count * 3 * vision.patch_size**2 * v
    if not gradient:
        return layers + tower + projector + head + attention + stem
    # Pixels have no gradient.
    return 3 * (layers + tower + projector + head + attention) + 2 * stem


@pytest.mark.parametrize("size", [MicroBatchSize(), MicroBatchSize(tokens=700)], ids=["one pass", "cached"])
def test_flops_of_a_step_follow_the_formula(model, scenes, size):
    """The gradient cache's first pass leaves the dialogues out."""
    batch, lvlm = batches(model, scenes, packing=model.packing, micro_batch_size=size)[0], model.lvlm.float()
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
        JointStep(lvlm, ObjectiveConfig()).forward_backward(batch)
    assert (len(batch.micro_batches) > 1) == (size.tokens is not None)
    assert 0.95 * expected <= counter.get_total_flops() <= 1.05 * expected


def test_empty_batch_leaves_no_gradient(model, scenes):
    batch = batches(model, scenes, language=False).collate([])
    losses = JointStep(model.lvlm, ObjectiveConfig(lm_weight=0.0)).forward_backward(batch, log_grad_norms=True)
    assert losses.lm == losses.contrastive == 0
    assert losses.metrics == {"accuracy": 0.0, "grad_norm_contrastive": 0.0}
    assert not gradient(model.lvlm).any()


@pytest.mark.parametrize("log_grad_norms", [False, True])
def test_text_only_micro_batch_adds_nothing_when_only_the_projector_trains(model, scenes, log_grad_norms):
    freeze(model.lvlm, ["vision_tower", "language_model"])
    dialogue = Dialogue((Turn("user", Content.of("Which?")), Turn("assistant", Content.of("the left one"))))
    texts = encode_example(
        Example(Pair(Content.of("a circle"), Content.of("a square")), dialogue), model.chat_processor
    )
    results = []
    for size in (MicroBatchSize(), MicroBatchSize(tokens=1)):
        model.lvlm.zero_grad()
        batch = batches(model, scenes, micro_batch_size=size).collate([encoded(model, scenes)[0], texts])
        losses = JointStep(model.lvlm, ObjectiveConfig()).forward_backward(batch, log_grad_norms=log_grad_norms)
        results.append((losses, gradient(model.lvlm)))
    (whole, expected), (cut_up, grad) = results
    assert (cut_up.lm.item(), cut_up.contrastive.item()) == pytest.approx((whole.lm.item(), whole.contrastive.item()))
    assert expected.norm() > 0 and (grad - expected).norm() <= 1e-10 * expected.norm()
    assert cut_up.metrics == pytest.approx(whole.metrics)
