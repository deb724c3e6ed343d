"""The joint step at LLaVA-OneVision's real sizes beside the published one: pairs/s, memory, and how busy the GPU is.

Weights are random. A and B are those of `published.py`, by PyTorch's SDPA; ours attends as the package chooses. All
read the same pairs in bfloat16. Then ours is measured by every kernel of attention over trees, with the kernels that
take the most time, the share of the time that the GPU runs any, and how often its allocator had to ask again.

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
    [--dtype bfloat16] [--measure compare attentions growth] [--kernels paths] [--compile] [--json FILE]

--small takes narrow models of two layers, to try all of it without a GPU.
"""

import argparse
import gc
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import Row, flops, make_batch, paired, show
from journal import Journal
from memory import watched
from planned_memory import make_pairs
from profiling import measure, num_alloc_retries
from published import step_a, step_b
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from cafe.attention.registration import use_tree_attention
from cafe.attention.tree import Kernel
from cafe.data.batch import NO_LIMIT, Batch, MicroBatchSize
from cafe.lvlm.architectures import load_config, meta_model
from cafe.lvlm.forward import UNBOUNDED_ROW, set_kernel
from cafe.packing import PackingConfig, count_unique_tokens, count_work
from cafe.planning.flops import estimate_flops
from cafe.planning.hardware import GIB, HARDWARE, MFU
from cafe.planning.sizes import measure_model
from cafe.planning.workload import StepWorkload, TypicalSample, estimate_workload
from cafe.training.compile import compile_layers
from cafe.training.fsdp import iter_layers
from cafe.training.recipe import Recipe
from cafe.training.recipe_io import read_recipe
from cafe.training.step import JointStep

Work = Callable[[], None]

KERNELS: tuple[Kernel, ...] = ("paths", "mask", "flex")  # of attention over trees, on a GPU
GROWTH = (2, 4, 8, 12)  # pairs in one pass
MEASURES = ("compare", "attentions", "growth")
TOP_KERNELS = 6  # whose names are printed
NARROW = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@dataclass(frozen=True)
class Case:
    """Describe what is compared.

    Attributes:
        recipe: whose base model gives the sizes.
        data: of the pairs.
        pairs: read by all ways.
        chunk: pairs that go through the model at once, with a cache.
        dtype: of the weights.
        small: whether the model is a narrow one of two layers.
    """

    recipe: Recipe
    data: TypicalSample
    pairs: int
    chunk: int
    dtype: torch.dtype
    small: bool = False

    @property
    def repetitions(self) -> int:
        """Return how often each work is timed."""
        return 1 if self.small else 5

    def model(self, language: int | None = None, vision: int | None = None) -> PreTrainedModel:
        """Build a model of so many layers in the language model and in the vision tower, or of all."""
        config = load_config(self.recipe.model.base)
        if self.small:
            narrow(config)
        config.vision_config.num_hidden_layers = vision or config.vision_config.num_hidden_layers
        config.text_config.num_hidden_layers = language or config.text_config.num_hidden_layers
        config.text_config.layer_types = config.text_config.layer_types[:language]
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = AutoModelForImageTextToText.from_config(config, dtype=self.dtype).train()
        use_tree_attention(model)
        return model

    def dense_packing(self, model: PreTrainedModel) -> PackingConfig:
        """Return how pairs are laid out for a dense mask."""
        return PackingConfig(max_row_tokens=2 * model.config.get_text_config().hidden_size)

    def ways(self, model: PreTrainedModel, rows: PackingConfig) -> dict[str, Work]:
        """Return what is compared, by name; `rows` is how ours lays out pairs."""
        sides, step = make_pairs(model, self.pairs, self.data), joint_step(self.recipe, model)
        trees = [list(pair) for pair in zip(sides.queries, sides.targets, sides.dialogues, strict=True)]
        size = MicroBatchSize(tokens=self.chunk * max(map(count_unique_tokens, trees)))
        whole, cut = make_batch(sides, rows), make_batch(sides, rows, size)
        return {
            "A": repeated(model, lambda: step_a(model, sides), published=True),
            "ours, one pass": repeated(model, lambda: step.forward_backward(whole)),
            "B": repeated(model, lambda: step_b(model, sides, self.chunk), published=True),
            "ours, cached": repeated(model, lambda: step.forward_backward(cut)),
        }


def narrow(config: PreTrainedConfig) -> None:
    """Make a configuration that of a narrow model of two layers, which reads images as before."""
    for part in (config.vision_config, config.text_config):
        for name, value in NARROW.items():
            setattr(part, name, value)
    config.text_config.num_key_value_heads = 2


def set_attention(model: PreTrainedModel, kernel: Kernel) -> PackingConfig:
    """Let a model attend along trees by a kernel, and return how the package lays out rows for it."""
    model.get_decoder().set_attn_implementation("sdpa")  # in whose place the package puts its own
    use_tree_attention(model, "flex_attention" if kernel == "flex" else "sdpa")
    dtype = torch.float32 if kernel == "mask" else torch.bfloat16  # no other kernel takes float32
    packing = set_kernel(PackingConfig(), model, model.device, dtype)
    if model.device.type == "cpu":
        return replace(packing, kernel=kernel)
    if packing.kernel != kernel:
        raise ValueError(f"this GPU or model does not use {kernel}")
    return packing


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


def one_pass(case: Case, model: PreTrainedModel, pairs: int) -> StepWorkload:
    """Estimate what one pass over so many pairs reads."""
    return estimate_workload(replace(case.recipe, batch_size=pairs, micro_batch=NO_LIMIT), model, case.data, 1)


def work_of(case: Case, model: PreTrainedModel, batch: Batch) -> float:
    """Count the FLOPs of a step that reads a batch in one pass, as described at the top."""
    return sum(estimate_flops(measure_model(model), load_of(case, model, batch)).values())


def load_of(case: Case, model: PreTrainedModel, batch: Batch) -> StepWorkload:
    """Return what a step reads that reads a batch in one pass."""
    [micro_batch] = batch.micro_batches
    # Crops and labels are those of the data; what the language model computes depends on the layout.
    return replace(one_pass(case, model, len(batch.query_ids)), text=count_work(micro_batch.joint))


def dense_work_of(case: Case, model: PreTrainedModel, batch: Batch) -> float:
    """Count the same with what a dense mask hides, and with the scores that the backward pass computes again."""
    sizes, load = measure_model(model), load_of(case, model, batch)
    rows, columns = batch.micro_batches[0].joint.inputs["input_ids"].shape

    def flops_of(seen: float, read_seen: float) -> float:
        text = replace(load.text, seen=seen, read_seen=read_seen)
        return sum(estimate_flops(sizes, replace(load, text=text)).values())

    dense = flops_of(rows * columns**2, load.text.read * columns)
    # Forward, attention takes a third of what it takes in all; the scores are one of its two products.
    language_scores = (dense - flops_of(0, 0)) / 3 / 2
    tower_scores = load.crops * sizes.tower.attention_flops(sizes.tower.layers * load.patches**2) / 2
    return dense + language_scores + tower_scores


def count(case: Case, many: int) -> list[Row]:
    """Count the operations of the published ways over those of ours; every layer of a part adds the same."""
    model = meta_model(load_config(case.recipe.model.base))
    for pairs in sorted({case.pairs, many}):
        sides = make_pairs(model, pairs, case.data)
        for packing in (case.dense_packing(model), PackingConfig(max_row_tokens=UNBOUNDED_ROW)):
            batch = make_batch(sides, packing)
            rows, columns = batch.micro_batches[0].joint.inputs["input_ids"].shape
            work = work_of(case, model, batch) / pairs / 1e12
            dense = dense_work_of(case, model, batch) / pairs / 1e12
            print(
                f"work of {pairs} pairs in {rows} rows of {columns}: {work:.2f} TFLOPs a pair; "
                f"{dense:.2f} with what a dense mask hides and scores that are computed again",
                flush=True,
            )
    counts = []
    for language, vision in ((1, 1), (2, 1), (1, 2)):
        model = case.model(language, vision)
        ways = case.ways(model, case.dense_packing(model))
        counts.append({name: flops(work) for name, work in ways.items()})
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


def compare(case: Case, model: PreTrainedModel, journal: Journal) -> list[Row]:
    """Compare pairs/s of ours with those of the published ways."""
    ways = case.ways(model, set_kernel(PackingConfig(), model, model.device, torch.bfloat16))
    for name, work in ways.items():
        work()  # makes the gradients, which are no part of it
        gc.collect()
        with watched() as taken:
            work()
        journal.add({"figure": f"{name}: memory beyond weights and gradients", "GiB": taken.bytes / GIB})
    table = []
    for name, own, other, must, aim in (
        ("1: pairs/s, ours / A, one pass", "ours, one pass", "A", 1.8, 2.2),
        ("2: pairs/s, ours / B, gradient cache", "ours, cached", "B", 1.6, 2.4),
    ):
        retries = num_alloc_retries()
        seconds, ratio = paired(ways[own], ways[other], case.repetitions)
        speed = {"pairs/s": case.pairs / seconds, "allocator retries": num_alloc_retries() - retries}
        journal.add({"figure": name, "measured": ratio, "must": must, "aim": aim, **speed})
        table.append(Row(name, ratio, must, aim))
    return table


def use(
    case: Case, model: PreTrainedModel, many: int, kernels: list[Kernel], compiled: bool, journal: Journal
) -> list[Row]:
    """Measure the share of the GPU's peak that ours uses with so many pairs, by each kind of attention."""
    step, best = joint_step(case.recipe, model), peak_flops()
    sides = make_pairs(model, many, case.data)
    table = []
    for kernel, compile_ in product(kernels, (False, True) if compiled else (False,)):
        name = f"MFU, {many} pairs in one pass, {kernel}{', compiled' * compile_}"
        try:
            batch = to_gpu_memory(make_batch(sides, set_attention(model, kernel)))
            work = work_of(case, model, batch)
            if compile_:
                compile_layers(model)
            figures = measure_step(model, step, batch, case.repetitions)
        except Exception as error:  # of one kernel, or of its compiler
            journal.add_failure(name, error)
            continue
        finally:
            undo_compilation(model)
        mfu = work * figures["pairs/s"] / many / best
        journal.add(
            {"figure": name, "measured": mfu, "must": MFU, "aim": 0.45, "TFLOPs a pair": work / many / 1e12, **figures}
        )
        table.append(Row(name, mfu, MFU, 0.45))
    return table


def grow(case: Case, model: PreTrainedModel, kernel: Kernel, journal: Journal) -> None:
    """Measure steps of more and more pairs, and what a step costs that does not grow with them."""
    step, packing = joint_step(case.recipe, model), set_attention(model, kernel)
    measured = {}
    for pairs in (1, 2) if case.small else GROWTH:
        name = f"a step of {pairs} pairs in one pass, {kernel}"
        try:
            batch = to_gpu_memory(make_batch(make_pairs(model, pairs, case.data), packing))
            figures = measure_step(model, step, batch, case.repetitions)
        except torch.OutOfMemoryError as error:
            journal.add_failure(name, error)
            break
        measured[pairs] = figures["ms"]
        journal.add({"figure": name, **figures})
    if len(measured) > 1:
        slope, fixed = statistics.linear_regression(list(measured), list(measured.values()))
        title = f"steps of {', '.join(map(str, measured))} pairs, fitted by a line, {kernel}"
        journal.add({"figure": title, "ms fixed": fixed, "ms a pair": slope})


def measure_step(model: PreTrainedModel, step: JointStep, batch: Batch, repetitions: int) -> dict[str, Any]:
    """Time and profile a step."""
    release_memory()
    once = repeated(model, lambda: step.forward_backward(batch))
    for _ in range(2):  # the first compiles and makes the gradients
        once()
    timing = measure(once, repetitions)
    return {
        "pairs/s": len(batch.query_ids) / timing.seconds,
        "ms": 1e3 * timing.seconds,
        "busy share": timing.busy_share,
        "allocator retries": timing.num_alloc_retries,
        "kernels": timing.top(TOP_KERNELS),
    }


def to_gpu_memory(batch: Batch) -> Batch:
    """Pin a batch for its copy to the GPU, as the data loader does in training."""
    return batch.pin_memory() if torch.cuda.is_available() else batch


def release_memory() -> None:
    """Give what is no longer used back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def undo_compilation(model: PreTrainedModel) -> None:
    """Make a model's layers what they were before `compile_layers`."""
    for layer in iter_layers(model):
        vars(layer).pop("forward", None)
    torch.compiler.reset()


def peak_flops() -> float:
    """Look up the GPU's peak FLOPs; NaN where it is not known."""
    if not torch.cuda.is_available():
        return math.nan
    name = torch.cuda.get_device_name()
    return next((each.flops for each in HARDWARE if each.name.split()[0] in name), math.nan)


def measure_all(case: Case, options: argparse.Namespace, journal: Journal) -> list[Row]:
    """Measure what the options say."""
    if not torch.cuda.is_available():
        torch.compiler.set_stance("force_eager")  # what it compiles is not what is tried
    model, table = case.model(), list[Row]()
    if "compare" in options.measure:
        table += compare(case, model, journal)
    if "attentions" in options.measure:
        table += use(case, model, options.many or options.pairs, options.kernels, options.compile, journal)
    if "growth" in options.measure:
        grow(case, model, options.kernels[0], journal)
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
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=MEASURES[:2], help="what, on a GPU")
    parser.add_argument(
        "--kernels", nargs="+", choices=KERNELS, default=KERNELS, help="of attention, the first to grow"
    )
    parser.add_argument("--small", action="store_true", help="a narrow model of two layers, also without a GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    width, height = map(int, options.image.split("x"))
    data = TypicalSample(width=width, height=height, caption=options.caption)
    recipe = read_recipe(options.recipe, [f"batch_size={options.pairs}", "model.gradient_checkpointing=false"])
    case = Case(recipe, data, options.pairs, options.chunk, getattr(torch, options.dtype), options.small)
    if torch.cuda.is_available() or options.small:
        journal = Journal(options.json)
        table = measure_all(case, options, journal)
        sys.argv[1:] = []  # the rows are written already
    else:
        table = count(case, options.many or options.pairs)
        sys.argv[1:] = ["--json", str(options.json)] if options.json else []
    show(
        f"The sizes of {recipe.model.base}, {options.pairs} pairs, {options.image}, captions of {options.caption}, "
        f"{options.dtype} weights",
        table,
    )


if __name__ == "__main__":
    main()
