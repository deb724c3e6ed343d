"""`cafe plan` against torch's count of FLOPs, what autograd keeps, the families' processors and the Hub's totals."""

import math
import re
import shlex
import weakref
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
import transformers as hf
from families import FAMILIES, tokenizer
from flops import ATTENTION
from PIL import Image
from samples import noise
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from cafe.cli.main import main
from cafe.cli.training import plan_command
from cafe.content import Content, Dialogue, Turn
from cafe.data.batch import Batch, MicroBatch, MicroBatchSize
from cafe.data.dataset import ContrastiveBatchDataset
from cafe.data.records import open_source
from cafe.data.source import Source
from cafe.errors import CafeError
from cafe.lvlm.architectures import KNOWN_CONFIGS, load_config, meta_model
from cafe.lvlm.families import find_vision_tower
from cafe.lvlm.forward import forward_packed
from cafe.lvlm.image_size import set_max_image_size
from cafe.lvlm.loading import without_video
from cafe.lvlm.prompts import Prompts
from cafe.lvlm.vision_cache import VisionCache
from cafe.model import Cafe
from cafe.packing import NO_WORK, PackedBatch, PackingConfig, PackWork, count_unique_tokens, count_work, pack
from cafe.planning.flops import estimate_flops
from cafe.planning.hardware import HARDWARE
from cafe.planning.memory import estimate_memory, optimizer_state_bytes
from cafe.planning.plan import plan
from cafe.planning.sizes import TransformerShape, measure_model
from cafe.planning.workload import (
    StepWorkload,
    TypicalSample,
    estimate_workload,
    image_cost_from_config,
    image_cost_from_processor,
)
from cafe.training.build import build_dataset
from cafe.training.optimizer import enable_gradient_checkpointing, freeze, make_optimizer
from cafe.training.recipe import ObjectiveConfig, OptimizerConfig
from cafe.training.recipe_io import read_recipe
from cafe.training.step import JointStep

RECIPES = Path(__file__).parents[2] / "recipes"

NAMES = get_args(get_type_hints(OptimizerConfig)["name"])

# Billions of parameters that the Hub states on each model's page.
STATED = {
    "llava-hf/llava-onevision-qwen2-0.5b-si-hf": 0.9,
    "llava-hf/llava-onevision-qwen2-7b-si-hf": 8.03,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.75,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "Qwen/Qwen3-VL-2B-Instruct": 2.13,
    "Qwen/Qwen3-VL-4B-Instruct": 4.44,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
}


@pytest.mark.parametrize("base", KNOWN_CONFIGS)
def test_published_sizes_give_the_parameters_the_hub_states(base):
    assert measure_model(meta_model(load_config(base))).parameters / 1e9 == pytest.approx(STATED[base], abs=0.007)


def padded_work(of: PackedBatch) -> PackWork:
    """The work in a pack with its padding, which torch computes and counts too."""
    return replace(count_work(of), tokens=of.inputs["input_ids"].numel())


def workload_of(batch: Batch, patch: int) -> StepWorkload:
    """What a batch's packs hold, padding included."""
    packs = [micro_batch.joint for micro_batch in batch.micro_batches]
    reread = [micro_batch.embedding_only for micro_batch in batch.micro_batches[1:]]
    side = packs[0].inputs["pixel_values"].shape[-1]

    def tokens(of: Iterable[PackedBatch]) -> int:
        return sum(pack.inputs["input_ids"].numel() for pack in of)

    def crops(of: Iterable[PackedBatch]) -> int:
        return sum(pack.inputs["pixel_values"].shape[:-3].numel() for pack in of if "pixel_values" in pack.inputs)

    rows = sum(len(pack.inputs["input_ids"]) for pack in packs)
    return StepWorkload(
        crops=crops(packs),
        patches=(side // patch) ** 2,
        rows=rows,
        columns=tokens(packs) // rows,
        labels=batch.num_supervised,
        text=sum(map(padded_work, packs), NO_WORK),
        reread_crops=crops(reread),
        reread_text=sum(map(padded_work, reread), NO_WORK),
        micro_batches=len(packs),
        largest=max(tokens([pack]) for pack in packs) / tokens(packs),
    )


@pytest.mark.parametrize("frozen", [(), ("vision_tower",), ("vision_tower", "language_model")], ids=str)
@pytest.mark.parametrize("tokens", [None, 700])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_flops_of_a_step_match_torchs_count(random_base, scenes, frozen, tokens, checkpointed):
    model = Cafe.load(random_base, Prompts(), torch.float32)
    freeze(model.lvlm, frozen)
    if checkpointed:
        enable_gradient_checkpointing(model.lvlm)
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    batch = ContrastiveBatchDataset(
        [source],
        model.chat_processor,
        6,
        0,
        packing=PackingConfig(max_row_tokens=160),
        micro_batch_size=MicroBatchSize(tokens=tokens),
    )[0]
    vision = VisionCache(find_vision_tower(model.lvlm), model.lvlm.config) if frozen else None
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        JointStep(model.lvlm.train(), ObjectiveConfig(), vision=vision).forward_backward(batch)
    expected = sum(
        estimate_flops(
            measure_model(model.lvlm), workload_of(batch, model.lvlm.config.vision_config.patch_size), checkpointed
        ).values()
    )
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


def kept(module: nn.Module, half: torch.dtype | None, **inputs: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters and their copies aside."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    matrices = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    shapes = {shape for matrix in matrices for shape in (matrix.shape, matrix.T.shape)}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own and tensor.shape not in shapes:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", half, enabled=bool(half)):
        module(**inputs)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16])
def test_saved_activations_of_a_layer_match_autograd(half, attention):
    width, inner, heads, tokens = 128, 512, 4, 100

    def language(layers: int) -> int:
        config = hf.Qwen2Config(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=2, vocab_size=8, attn_implementation=attention,
        )  # fmt: skip
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
        hidden = torch.randn(1, tokens, width, requires_grad=True)
        return kept(hf.Qwen2Model(config).train(), half, inputs_embeds=hidden, attention_mask=mask, use_cache=False)

    def tower(layers: int) -> int:
        config = hf.SiglipVisionConfig(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            image_size=140, patch_size=14, vision_use_head=False, attn_implementation=attention,
        )  # fmt: skip
        return kept(hf.SiglipVisionModel(config).train(), half, pixel_values=torch.randn(1, 3, 140, 140))

    mask = tokens * (2 if half else 4)
    for count, gated, beside in ((language, True, mask), (tower, False, 0)):
        stack = TransformerShape(
            layers=1, width=width, heads=width, queries=heads, intermediate_size=inner, gated=gated
        )
        scored = tokens if attention == "eager" else 0
        assert stack.saved_activation_bytes(bool(half), scored) + beside == pytest.approx(
            (count(2) - count(1)) / tokens, rel=0.03
        )


LIMITS = {"max_pixels": 500_000}, {"grids": ((1, 1),)}, {"max_pixels": 500_000, "grids": ((1, 1), (1, 3), (2, 2))}


@pytest.mark.parametrize("limits", [{}, *LIMITS], ids=str)
@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 200), (1000, 300), (2000, 1500)], ids=str)
def test_image_cost_from_config_matches_the_familys_processor(size, limits):
    image, data = Image.new("RGB", size), TypicalSample(width=size[0], height=size[1])
    lvlm = meta_model(load_config("llava-hf/llava-onevision-qwen2-0.5b-si-hf"))
    processor = without_video(hf.LlavaOnevisionProcessor)(
        hf.LlavaOnevisionImageProcessorPil(),
        tokenizer(["<image>", "<video>"], pad="<pad>", eos="<end>"),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
    )
    set_max_image_size(meta_model(lvlm.config), processor, **limits)
    made = processor(text=["<image>"], images=[[image]], return_tensors="pt")
    found = image_cost_from_config(lvlm, data, **limits)
    assert (found.tokens, found.crops) == (made["input_ids"].shape[1], made["pixel_values"].shape[1])
    for base, options in (
        ("Qwen/Qwen2.5-VL-3B-Instruct", {"size": {"shortest_edge": 3136, "longest_edge": 12845056}}),
        ("Qwen/Qwen3-VL-2B-Instruct", {"patch_size": 16, "size": {"shortest_edge": 65536, "longest_edge": 16777216}}),
    ):
        if "grids" in limits:
            continue
        lvlm, images = meta_model(load_config(base)), hf.Qwen2VLImageProcessorPil(**options)
        set_max_image_size(lvlm, SimpleNamespace(image_processor=images), **limits)
        grid = images([image], return_tensors="pt")["image_grid_thw"][0]
        found = image_cost_from_config(lvlm, data, **limits)
        assert (found.patches, found.tokens) == (grid.prod(), grid.prod() // 4)


def test_plan_applies_the_recipes_image_limits():
    recipe = read_recipe(RECIPES / "cafe-0.5b.yaml", ["model.image_grids=[[1,1]]"])
    assert plan(recipe).load.crops == 2 * recipe.batch_size  # the image and its thumbnail


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_knows_image_cost_and_flops_of_every_family(family):
    try:
        model = FAMILIES[family]()
    except ImportError as error:
        pytest.skip(str(error))
    seen = image_cost_from_processor(model.chat_processor, model.lvlm, TypicalSample(width=64, height=64))
    said, branches, spoken = Content.of("a red circle"), [], []
    for number in range(2):
        image = noise(number, 64, 64)
        answered = Dialogue((Turn("user", Content.of([image, "what is it"])), Turn("assistant", said)))
        branches.append([model.encode_embedding(Content.of(image)), model.encode_embedding(said)])
        spoken.append([model.encode_dialogue(answered)])
    packed = pack(branches, spoken, model.packing)
    assert seen.tokens == branches[0][0].image_mask.sum()
    micro_batch = MicroBatch(packed, packed, torch.tensor([0, 2, 1, 3]))
    ids, none = torch.arange(2), torch.empty(0, dtype=torch.long)
    batch = Batch([micro_batch], ids, ids, none, none.float(), none, len(packed.labels), [], [""] * 2)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        JointStep(model.lvlm.train(), ObjectiveConfig()).forward_backward(batch)
    rows, columns = packed.inputs["input_ids"].shape
    text = padded_work(packed)
    if model.lvlm.config.get_text_config()._attn_implementation == "eager":
        # Plain matrix products compute what is masked too, and torch counts it.
        text = replace(text, seen=rows * columns**2, read_seen=rows * columns**2)
    load = StepWorkload(
        crops=4 * seen.crops,  # here each branch shows images of its own
        patches=seen.patches,
        rows=rows,
        columns=columns,
        labels=len(packed.labels),
        text=text,
    )
    # Gemma 4's embeddings of each layer are not in the formula, and neither is the linear attention of Qwen3.5, which
    # is a large part of a tiny model.
    tolerance = 0.3 if family == "qwen3_5" else 0.15
    assert sum(estimate_flops(measure_model(model.lvlm), load).values()) == pytest.approx(
        counter.get_total_flops(), rel=tolerance
    )


def test_experts_and_unusual_towers_are_rejected():
    lvlm = meta_model(load_config("Qwen/Qwen3-VL-2B-Instruct"))
    lvlm.config.text_config.num_experts = 128
    with pytest.raises(CafeError, match="cannot estimate mixture-of-experts models such as this qwen3_vl model"):
        measure_model(lvlm)
    lvlm.config.text_config.num_experts = None
    lvlm.config.vision_config = hf.TimmWrapperConfig()
    with pytest.raises(CafeError, match="cannot estimate this qwen3_vl model: its vision tower"):
        measure_model(lvlm)


def test_plan_of_a_directory_uses_its_own_processor(tmp_path, capsys):
    FAMILIES["smolvlm"]().save(tmp_path)
    recipe = ["plan", str(RECIPES / "cafe-0.5b.yaml"), f"model.base={tmp_path}"]
    assert main([*recipe, "--image", "64x64"]) == 0 and "5 crops of 16 patches" in capsys.readouterr().out
    assert main([*recipe, "model.max_image_pixels=1024"]) == 0 and "1 crops of 16 patches" in capsys.readouterr().out


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("tokens", [None, 400])
def test_planned_rows_match_those_of_training(random_base, scenes, recipe, share, tokens):
    """Of pairs whose captions are equally long, as the plan takes them to be."""
    recipe = replace(
        recipe,
        model=replace(recipe.model, share_prefixes=share),
        objective=ObjectiveConfig(hard_negatives=False),
        batch_size=48,
        micro_batch=MicroBatchSize(tokens=tokens),
    )
    model = Cafe.load(random_base, recipe.prompts, torch.float32)
    batches = build_dataset(recipe, model, 0, 1, device=torch.device("cuda"))
    by_length = groupby(batches.largest_examples(48), lambda example: len(example.target))
    examples = max((list(alike) for _, alike in by_length), key=len)
    rows = [part.joint.inputs["input_ids"].shape for part in batches.collate(examples).micro_batches]
    query, target = examples[0].query, examples[0].target
    prompt = len(query) + len(target) - count_unique_tokens([query, target])
    words = len(query) - int(query.image_mask.sum()) - prompt
    data = TypicalSample(
        width=64, height=64, prompt=prompt, prompt_overhead_tokens=words, caption=len(target) - prompt - words
    )
    found = estimate_workload(replace(recipe, batch_size=len(examples)), model.lvlm, data, 1)
    assert found.micro_batches == len(rows)
    assert found.columns == pytest.approx(max(columns for _, columns in rows), rel=0.06)
    assert found.padded_tokens == pytest.approx(sum(map(math.prod, rows)), rel=0.06)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.see, made)
        return made

    def see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())

    def free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tokens", [None, 700])
def test_peak_memory_of_a_step_matches_its_live_tensors(random_base, scenes, checkpointed, tokens):
    model = Cafe.load(random_base, Prompts(), torch.float32)
    if checkpointed:
        enable_gradient_checkpointing(model.lvlm)
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    size = MicroBatchSize(tokens=tokens)
    batch = ContrastiveBatchDataset(
        [source], model.chat_processor, 12, 0, packing=PackingConfig(max_row_tokens=160), micro_batch_size=size
    )[0]
    step = JointStep(model.lvlm.train(), ObjectiveConfig())
    optimizer = torch.optim.AdamW(step.lvlm.parameters())
    with Live() as live:
        for _ in range(2):
            step.forward_backward(batch, log_grad_norms=True)
            optimizer.step()
            optimizer.zero_grad()
    recipe = read_recipe(RECIPES / "cafe-0.5b.yaml", ["model.precision=fp32"])
    recipe = replace(recipe, model=replace(recipe.model, gradient_checkpointing=checkpointed))
    load = replace(workload_of(batch, model.lvlm.config.vision_config.patch_size), vectors=24)
    memory = estimate_memory(measure_model(model.lvlm), load, recipe)
    assert sum(memory.values()) - memory["weights"] == pytest.approx(live.peak, rel=0.15)


def test_vision_cache_memory_matches_its_live_tensors(random_base, scenes):
    model = Cafe.load(random_base, Prompts(), torch.float32)
    freeze(model.lvlm, ("vision_tower",))
    source = open_source(Source(path=str(scenes / "llava_train.json")))
    batch = ContrastiveBatchDataset(
        [source], model.chat_processor, 48, 0, packing=model.packing, micro_batch_size=MicroBatchSize(tokens=200)
    )[0]
    tower, peaks = find_vision_tower(model.lvlm), []
    for vision in (None, VisionCache(tower, model.lvlm.config)):
        step = JointStep(model.lvlm.train(), ObjectiveConfig(), vision=vision)
        with Live() as live:
            step.forward_backward(batch)
        model.lvlm.zero_grad()
        peaks.append(live.peak)
    recipe = read_recipe(RECIPES / "cafe-0.5b.yaml", ["model.precision=fp32"])
    load = workload_of(batch, model.lvlm.config.vision_config.patch_size)
    assert estimate_memory(measure_model(model.lvlm), load, recipe)["vision cache"] == pytest.approx(
        peaks[1] - peaks[0], rel=0.15
    )


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_cached_features_per_patch_match_the_vision_cache(family):
    model = FAMILIES[family]()
    freeze(model.lvlm, ("vision_tower", "projector"))
    sizes, tower = measure_model(model.lvlm), find_vision_tower(model.lvlm)
    branch = model.encode_embedding(Content.of(noise(0, 64, 64)))
    patches = branch.image_inputs["pixel_values"].numel() // (3 * model.lvlm.config.vision_config.patch_size**2)
    patches //= getattr(model.lvlm.config.vision_config, "temporal_patch_size", 1)
    vision = VisionCache(tower, model.lvlm.config)
    with torch.no_grad(), vision.enabled():
        forward_packed(model.lvlm, pack([[branch]], [[]], model.packing))
        kept = sum(leaf.numel() for leaf in tree_leaves(list(vision.cached.values())) if leaf is not None)
    assert sizes.vision_is_cached and kept == sizes.cached_features_per_patch * patches


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", NAMES)
def test_optimizer_state_bytes_match_the_optimizer(random_base, name):
    lvlm = Cafe.load(random_base, Prompts(), torch.float32).lvlm
    optimizer = make_optimizer(lvlm, "llava_onevision", OptimizerConfig(name=name))
    for parameter in lvlm.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = sum(each.nbytes for state in optimizer.state.values() for each in state.values() if torch.is_tensor(each))
    sizes = measure_model(lvlm)
    assert optimizer_state_bytes(sizes, name) / sizes.trained == pytest.approx(
        held / sizes.trained, abs=0.15
    )  # bytes a weight


def test_float16_costs_the_same_as_bfloat16():
    one, other = (
        plan(read_recipe(RECIPES / "mmeb-lora.yaml", [f"model.precision={half}", f"model.frozen_weights_dtype={half}"]))
        for half in ("bf16", "fp16")
    )
    assert one.memory == other.memory and one.flops == other.flops


def test_plan_depends_on_the_attention_implementation():
    recipe = read_recipe(RECIPES / "cafe-0.5b.yaml", ["batch_size=16", "model.gradient_checkpointing=false"])
    sdpa, eager, flash, flex = (
        plan(replace(recipe, model=replace(recipe.model, attention=name)))
        for name in ("sdpa", "eager", "flash_attention_2", "flex_attention")
    )
    # FlashAttention takes no mask of trees: each branch is read by itself.
    assert flash.load.text.tokens > 1.5 * sdpa.load.text.tokens
    # One row holds the system prompt once; under a dense mask, each of several does.
    assert sdpa.flops == flex.flops < eager.flops < flash.flops
    # FlexAttention's row is padded, and eager attention keeps its scores.
    assert sdpa.memory["activations"] < flex.memory["activations"] < eager.memory["activations"]


def test_fsdp_divides_weights_gradients_and_optimizer_state():
    recipe = read_recipe(RECIPES / "cafe-7b.yaml")
    one, eight = plan(recipe, 1).memory, plan(recipe, 8).memory
    for name in ("weights", "optimizer state"):
        assert eight[name] == one[name] / 8
    assert plan(recipe, 8).peak < plan(recipe, 1).peak / 2


EXPECTED = re.compile(r"#   `cafe (plan .+)`: ([\d.,]+) GiB per GPU, ([\d.,]+) hours on (.+)")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_state_the_memory_and_hours_of_their_plan(path):
    stated = [EXPECTED.fullmatch(line) for line in path.read_text().splitlines()]
    found = [match for match in stated if match]
    assert found or read_recipe(path).model.base not in KNOWN_CONFIGS, (
        "say what `cafe plan` says in a comment, as the others do"
    )
    for match in found:
        options = plan_command.make_context("plan", shlex.split(match[1])[1:]).params
        width, height = map(int, options["image"].split("x"))
        data = TypicalSample(width=width, height=height, caption=options["caption"])
        recipe = read_recipe(RECIPES.parent / options["recipe"], options["overrides"])
        costs = plan(recipe, options["gpus"], data, options["pairs"])
        [hardware] = [hardware for hardware in HARDWARE if hardware.name == match[4]]
        assert f"{costs.peak / 2**30:,.1f}" == match[2] and f"{costs.hours(hardware):,.1f}" == match[3]


def test_plan_command_prints_and_names_an_unknown_base(tmp_path, capsys):
    assert main(["plan", str(RECIPES / "cafe-0.5b.yaml"), "--gpus", "8"]) == 0
    said = capsys.readouterr().out
    assert "893.7M" in said and "16 pairs on 8 GPUs" in said and "RTX 3090" in said
    # Alone, a pair has 5,064,904 in 3,391 tokens, as `test_workload.py` writes out; two share a prompt of 14.
    assert f"{5_064_904 - 14 * 15 / 4:,.0f} (query, key) pairs" in said and "3,384 tokens" in said
    assert main(["plan", str(RECIPES / "cafe-0.5b.yaml"), "model.base=some/one"]) == 1
    assert "The sizes of some/one are not known" in capsys.readouterr().err
    assert main(["plan", str(RECIPES / "cafe-0.5b.yaml"), f"model.base={tmp_path}"]) == 1
    assert f"The sizes of {tmp_path} are not known: it has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "warns"),
    [
        ("batch_size=1", True),
        ("batch_size=1 optimizer.gradient_accumulation_steps=16", True),
        ("batch_size=1 --gpus 2", False),
        ("batch_size=1 objective.contrastive_weight=0", False),
        ("batch_size=2", False),
    ],
)
def test_the_plan_warns_of_a_contrastive_batch_of_one_pair(words, warns, capsys):
    assert main(["plan", str(RECIPES / "cafe-0.5b.yaml"), *words.split()]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: with batch_size: 1")]
    assert len(lines) == warns and all("Raise batch_size, and set micro_batch" in line for line in lines)
