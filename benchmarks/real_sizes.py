"""The joint step at LLaVA-OneVision's real sizes beside the published one: pairs/s, memory, and how busy the GPU is.

Weights are random. A and B are those of `published.py`; all read the same pairs in bfloat16, by PyTorch's SDPA, and
ours once more by FlexAttention. The share of the GPU's peak that is used (MFU) counts what the plan's formula counts:
no operation twice, none on padding.

Without a GPU the operations of each are counted instead: of few layers, from which those of all follow.

python benchmarks/real_sizes.py [--recipe recipes/cafe-7b.yaml] [--pairs 2] [--many 3] [--caption 200]
    [--dtype bfloat16] [--json FILE]
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from common import Row, clock, flops, make_batch, paired, show
from memory import watched
from planned_memory import make_pairs
from published import step_a, step_b
from transformers import AutoModelForImageTextToText, PreTrainedModel

from cafe.data.batch import MicroBatchSize
from cafe.lvlm.architectures import load_config
from cafe.lvlm.forward import FLEX_MULTIPLE, UNBOUNDED_ROW
from cafe.packing import PackingConfig, count_unique_tokens
from cafe.planning.flops import estimate_flops
from cafe.planning.hardware import GIB, HARDWARE, MFU
from cafe.planning.sizes import measure_model
from cafe.planning.workload import TypicalSample, estimate_workload
from cafe.training.compile import compile_layers
from cafe.training.recipe import Recipe
from cafe.training.recipe_io import read_recipe
from cafe.training.step import JointStep

Work = Callable[[], None]


@dataclass(frozen=True)
class Case:
    """Describe what is compared.

    Attributes:
        recipe: whose base model gives the sizes.
        data: of the pairs.
        pairs: read by all ways.
        chunk: pairs that go through the model at once, with a cache.
        dtype: of the weights.
    """

    recipe: Recipe
    data: TypicalSample
    pairs: int
    chunk: int
    dtype: torch.dtype

    def model(self, language: int | None = None, vision: int | None = None) -> PreTrainedModel:
        """Build a model of so many layers in the language model and in the vision tower, or of all."""
        config = load_config(self.recipe.model.base)
        config.vision_config.num_hidden_layers = vision or config.vision_config.num_hidden_layers
        config.text_config.num_hidden_layers = language or config.text_config.num_hidden_layers
        config.text_config.layer_types = config.text_config.layer_types[:language]
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return AutoModelForImageTextToText.from_config(config, dtype=self.dtype).train()

    def ways(self, model: PreTrainedModel) -> dict[str, Work]:
        """Return what is compared, by name."""
        sides, step = make_pairs(model, self.pairs, self.data), joint_step(self.recipe, model)
        trees = [list(pair) for pair in zip(sides.queries, sides.targets, sides.dialogues, strict=True)]
        size = MicroBatchSize(tokens=self.chunk * max(map(count_unique_tokens, trees)))
        rows = PackingConfig(max_row_tokens=estimate_workload(self.recipe, model, self.data, 1).columns)
        whole, cut = make_batch(sides, rows), make_batch(sides, rows, size)
        return {
            "A": repeated(model, lambda: step_a(model, sides), published=True),
            "ours, one pass": repeated(model, lambda: step.forward_backward(whole)),
            "B": repeated(model, lambda: step_b(model, sides, self.chunk), published=True),
            "ours, cached": repeated(model, lambda: step.forward_backward(cut)),
        }


def joint_step(recipe: Recipe, model: PreTrainedModel) -> JointStep:
    """Make our joint step."""
    return JointStep(model, recipe.objective, "bf16").to(model.device)


def repeated(model: PreTrainedModel, work: Callable[[], object], published: bool = False) -> Work:
    """Wrap some work so that it begins without gradients."""

    def once() -> None:
        model.zero_grad(set_to_none=False)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=published):  # ours sees to it itself
            work()

    return once


def count(case: Case) -> list[Row]:
    """Count the operations of the published ways over those of ours; every layer of a part adds the same."""
    counts = []
    for language, vision in ((1, 1), (2, 1), (1, 2)):
        counts.append({name: flops(work) for name, work in case.ways(case.model(language, vision)).items()})
        print(f"counted with {language} and {vision} layers", flush=True)
    config = load_config(case.recipe.model.base)
    layers = config.text_config.num_hidden_layers - 1, config.vision_config.num_hidden_layers - 1
    alone, *more = counts
    total = {
        name: alone[name] + sum(number * (each[name] - alone[name]) for number, each in zip(layers, more, strict=True))
        for name in alone
    }
    for name, sum_ in total.items():
        print(f"{name}: {sum_ / case.pairs / 1e12:.1f} TFLOPs a pair")
    return [
        Row("1: FLOPs, A / ours, one pass", total["A"] / total["ours, one pass"], 1.8, 2.2),
        Row("2: FLOPs, B / ours, gradient cache", total["B"] / total["ours, cached"], 1.6, 2.4),
    ]


def compare(case: Case, model: PreTrainedModel) -> list[Row]:
    """Compare pairs/s of ours with those of the published ways."""
    ways = case.ways(model)
    for name, work in ways.items():
        work()  # makes the gradients, which are no part of it
        gc.collect()
        with watched() as taken:
            work()
        print(f"{name}: {taken.bytes / GIB:.2f} GiB beyond weights and gradients", flush=True)
    table = []
    for name, own, other, must, aim in (
        ("1: pairs/s, ours / A, one pass", "ours, one pass", "A", 1.8, 2.2),
        ("2: pairs/s, ours / B, gradient cache", "ours, cached", "B", 1.6, 2.4),
    ):
        seconds, ratio = paired(ways[own], ways[other])
        print(f"{name}: {case.pairs / seconds:.2f} pairs/s, {ratio:.2f} times", flush=True)
        table.append(Row(name, ratio, must, aim))
    return table


def use(case: Case, model: PreTrainedModel, many: int, compiled: bool) -> list[Row]:
    """Measure the share of the GPU's peak that ours uses with so many pairs, by each kind of attention."""
    step, load = (
        joint_step(case.recipe, model),
        estimate_workload(replace(case.recipe, batch_size=many), model, case.data, 1),
    )
    work = sum(estimate_flops(measure_model(model), load).values())
    best = next(each.flops for each in HARDWARE if each.name.split()[0] in torch.cuda.get_device_name())
    sides = make_pairs(model, many, case.data)
    in_one_row = PackingConfig(max_row_tokens=UNBOUNDED_ROW, pad_to_multiple_of=FLEX_MULTIPLE)
    tries = [("sdpa", PackingConfig(max_row_tokens=load.columns), False), ("flex_attention", in_one_row, False)]
    table = []
    for attention, packing, compile_ in [*tries, ("flex_attention", in_one_row, True)] if compiled else tries:
        model.set_attn_implementation({"text_config": attention})
        if compile_:
            compile_layers(model)
        batch = make_batch(sides, packing)
        once = repeated(model, lambda batch=batch: step.forward_backward(batch))
        once()
        seconds = statistics.median(clock(once) for _ in range(5))
        name = f"MFU, {many} pairs in one pass, {attention}{', compiled' * compile_}"
        print(f"{name}: {many / seconds:.2f} pairs/s, {work / seconds / best:.3f}", flush=True)
        table.append(Row(name, work / seconds / best, MFU, 0.45))
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "cafe-0.5b.yaml")
    parser.add_argument("--pairs", type=int, default=2, help="read by all ways")
    parser.add_argument("--chunk", type=int, default=1, help="pairs that go through the model at once, with a cache")
    parser.add_argument("--many", type=int, help="pairs read by ours alone, for its share of the peak")
    parser.add_argument("--image", default="640x480", help="pixels, WIDTHxHEIGHT")
    parser.add_argument("--caption", type=int, default=200, help="tokens")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--compile", action="store_true", help="measure it with compiled layers too")
    parser.add_argument("--json")
    options = parser.parse_args()

    width, height = map(int, options.image.split("x"))
    data = TypicalSample(width=width, height=height, caption=options.caption)
    recipe = read_recipe(options.recipe, [f"batch_size={options.pairs}", "model.gradient_checkpointing=false"])
    case = Case(recipe, data, options.pairs, options.chunk, getattr(torch, options.dtype))
    if torch.cuda.is_available():
        model = case.model()
        table = compare(case, model) + use(case, model, options.many or options.pairs, options.compile)
    else:
        table = count(case)
    sys.argv[1:] = ["--json", options.json] if options.json else []
    show(
        f"The sizes of {recipe.model.base}, {options.pairs} pairs, {options.image}, captions of {options.caption}, "
        f"{options.dtype} weights",
        table,
    )


if __name__ == "__main__":
    main()
