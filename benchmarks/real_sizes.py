"""The joint step at LLaVA-OneVision's real sizes beside the published one: pairs/s, memory, and how busy the GPU is.

Weights are random. A and B are those of `published.py`; all read the same pairs in bfloat16, by PyTorch's SDPA, and
ours once more by FlexAttention.

MFU is the share of the GPU's peak FLOPs that the work of a step takes. The work is counted by the formulas of
`cafe plan` (`cafe/planning/flops.py`) for the packs that are read:

- the tokens of the packs, each once, without padding; the last layer's feed-forward part for the tokens that are read;
- in the language model's attention, the (query, key) pairs that are seen: a token with its ancestors and itself, and in
  the last layer those whose query is read. What a mask hides is no work, even if the kernel computes it;
- in the vision tower's attention, all pairs of patches of a crop;
- a backward pass of twice the forward pass: the scores that attention computes again are not counted.

Without a GPU this work is printed, so that MFU follows from pairs/s: pairs/s x work of a pair / peak. And the
operations of A, B and ours are counted by PyTorch: of few layers, from which those of all follow.

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

from cafe.data.batch import NO_LIMIT, Batch, MicroBatchSize
from cafe.lvlm.architectures import load_config, meta_model
from cafe.lvlm.forward import FLEX_MULTIPLE, UNBOUNDED_ROW
from cafe.packing import PackingConfig, count_unique_tokens, count_work
from cafe.planning.flops import estimate_flops
from cafe.planning.hardware import GIB, HARDWARE, MFU
from cafe.planning.sizes import measure_model
from cafe.planning.workload import StepWorkload, TypicalSample, estimate_workload
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


def layouts(case: Case, model: PreTrainedModel, many: int) -> dict[str, PackingConfig]:
    """Return how so many pairs are laid out for each kind of attention."""
    return {
        "sdpa": PackingConfig(max_row_tokens=one_pass(case, model, many).columns),
        "flex_attention": PackingConfig(max_row_tokens=UNBOUNDED_ROW, pad_to_multiple_of=FLEX_MULTIPLE),
    }


def one_pass(case: Case, model: PreTrainedModel, pairs: int) -> StepWorkload:
    """Estimate what one pass over so many pairs reads."""
    return estimate_workload(replace(case.recipe, batch_size=pairs, micro_batch=NO_LIMIT), model, case.data, 1)


def work_of(case: Case, model: PreTrainedModel, batch: Batch) -> float:
    """Count the FLOPs of a step that reads a batch in one pass, as described at the top."""
    [micro_batch] = batch.micro_batches
    # Crops and labels are those of the data; what the language model computes depends on the layout.
    load = replace(one_pass(case, model, len(batch.query_ids)), text=count_work(micro_batch.joint))
    return sum(estimate_flops(measure_model(model), load).values())


def count(case: Case, many: int) -> list[Row]:
    """Count the operations of the published ways over those of ours; every layer of a part adds the same."""
    model = meta_model(load_config(case.recipe.model.base))
    for pairs in sorted({case.pairs, many}):
        sides = make_pairs(model, pairs, case.data)
        for attention, packing in layouts(case, model, pairs).items():
            batch = make_batch(sides, packing)
            rows, columns = batch.micro_batches[0].joint.inputs["input_ids"].shape
            work = work_of(case, model, batch) / pairs / 1e12
            print(
                f"work of {pairs} pairs in {rows} rows of {columns} ({attention}): {work:.2f} TFLOPs a pair", flush=True
            )
    counts = []
    for language, vision in ((1, 1), (2, 1), (1, 2)):
        counts.append({name: flops(work) for name, work in case.ways(case.model(language, vision)).items()})
        print(f"counted with {language} and {vision} layers", flush=True)
    layers = model.config.text_config.num_hidden_layers - 1, model.config.vision_config.num_hidden_layers - 1
    alone, *more = counts
    total = {
        name: alone[name] + sum(number * (each[name] - alone[name]) for number, each in zip(layers, more, strict=True))
        for name in alone
    }
    for name, sum_ in total.items():
        print(f"{name}: {sum_ / case.pairs / 1e12:.2f} TFLOPs a pair, counted by PyTorch")
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
    step, sides = joint_step(case.recipe, model), make_pairs(model, many, case.data)
    best = next(each.flops for each in HARDWARE if each.name.split()[0] in torch.cuda.get_device_name())
    batches = {attention: make_batch(sides, packing) for attention, packing in layouts(case, model, many).items()}
    works = {attention: work_of(case, model, batch) for attention, batch in batches.items()}
    tries = [*((attention, False) for attention in batches), ("flex_attention", True)]
    table = []
    for attention, compile_ in tries if compiled else tries[:-1]:
        model.set_attn_implementation({"text_config": attention})
        if compile_:
            compile_layers(model)
        once = repeated(model, lambda batch=batches[attention]: step.forward_backward(batch))
        once()
        seconds = statistics.median(clock(once) for _ in range(5))
        mfu = works[attention] / seconds / best
        name = f"MFU, {many} pairs in one pass, {attention}{', compiled' * compile_}"
        tflops = works[attention] / many / 1e12
        print(f"{name}: {many / seconds:.2f} pairs/s of {tflops:.2f} TFLOPs, {mfu:.3f}", flush=True)
        table.append(Row(name, mfu, MFU, 0.45))
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "cafe-0.5b.yaml")
    parser.add_argument("--pairs", type=int, default=2, help="read by all ways")
    parser.add_argument("--chunk", type=int, default=1, help="pairs that go through the model at once, with a cache")
    parser.add_argument(
        "--many", type=int, help="pairs read by ours alone, for its share of the peak; by default those of --pairs"
    )
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
        table = count(case, options.many or options.pairs)
    sys.argv[1:] = ["--json", options.json] if options.json else []
    show(
        f"The sizes of {recipe.model.base}, {options.pairs} pairs, {options.image}, captions of {options.caption}, "
        f"{options.dtype} weights",
        table,
    )


if __name__ == "__main__":
    main()
