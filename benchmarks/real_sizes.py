"""The joint step at LLaVA-OneVision's real sizes beside the published one: pairs/s, memory, and how busy the GPU is.

Weights are random. A and B are those of `published.py`; all read the same pairs in bfloat16, by PyTorch's SDPA, and
ours once more by FlexAttention. The share of the GPU's peak that is used (MFU) counts what the plan's formula counts:
no operation twice, none on padding. Made for one GPU; `--layers 1` tries it on a CPU.

python benchmarks/real_sizes.py [--recipe recipes/cafe-7b.yaml] [--pairs 2] [--many 3] [--dtype bfloat16]
    [--json FILE]
"""

import argparse
import gc
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import Row, clock, make_batch, paired, show
from memory import peak, reset_peak
from planned_memory import make_pairs
from published import step_a, step_b
from transformers import AutoModelForImageTextToText

from cafe.data.loading import MicroBatchSize
from cafe.packing import Packing, tree_size
from cafe.reading import FLEX_MULTIPLE, ONE_ROW
from cafe.training.compiling import compile_layers
from cafe.training.geometry import config_of
from cafe.training.plan import GIB, HARDWARE, MFU, Data, flops_of, load_of, measure
from cafe.training.recipe import read_recipe
from cafe.training.step import JointStep


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "cafe-0.5b.yaml")
    parser.add_argument("--pairs", type=int, default=2, help="read by all ways")
    parser.add_argument("--chunk", type=int, default=1, help="pairs that go through the model at once, with a cache")
    parser.add_argument("--many", type=int, help="pairs read by ours alone, for its share of the peak")
    parser.add_argument("--picture", default="640x480", help="pixels, WIDTHxHEIGHT")
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--layers", type=int, help="of the language model and of the vision tower, if not all")
    parser.add_argument("--compile", action="store_true", help="measure it with compiled layers too")
    parser.add_argument("--json")
    options = parser.parse_args()

    width, height = map(int, options.picture.split("x"))
    data = Data(width=width, height=height, caption=200)
    on_gpu = torch.cuda.is_available()
    recipe = read_recipe(options.recipe, [f"batch_size={options.pairs}", "model.gradient_checkpointing=false"])
    config = config_of(recipe.model.base)
    for part in (config.text_config, config.vision_config) if options.layers else ():
        part.num_hidden_layers = options.layers
    if options.layers:
        config.text_config.layer_types = config.text_config.layer_types[: options.layers]
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, options.dtype)).train()
    step = JointStep(model, recipe.objective, "bf16").to(model.device)
    sides = make_pairs(model, options.pairs, data)
    load, sizes = load_of(recipe, model, data, 1), measure(model)
    trees = [list(pair) for pair in zip(sides.queries, sides.targets, sides.dialogues, strict=True)]
    size = MicroBatchSize(tokens=options.chunk * max(map(tree_size, trees)))
    rows = Packing(columns=load.columns)
    whole, cut = make_batch(sides, rows), make_batch(sides, rows, size)

    def repeated(work: Callable[[], object], published: bool = False) -> Callable[[], None]:
        def once() -> None:
            model.zero_grad(set_to_none=False)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=published):  # ours sees to it itself
                work()

        return once

    a = repeated(lambda: step_a(model, sides), published=True)
    b = repeated(lambda: step_b(model, sides, options.chunk), published=True)
    ours, cached = repeated(lambda: step(whole)), repeated(lambda: step(cut))
    for name, work in (("A", a), ("ours, one pass", ours), ("B", b), ("ours, cached", cached)):
        work()  # makes the gradients, which are no part of it
        gc.collect()
        before = reset_peak()
        work()
        print(f"{name}: {(peak() - before) / GIB:.2f} GiB beyond weights and gradients", flush=True)
    table = []
    for name, own, other, must, aim in (
        ("1: pairs/s, ours / A, one pass", ours, a, 1.8, 2.2),
        ("2: pairs/s, ours / B, gradient cache", cached, b, 1.6, 2.4),
    ):
        seconds, ratio = paired(own, other)
        print(f"{name}: {options.pairs / seconds:.2f} pairs/s, {ratio:.2f} times", flush=True)
        table.append(Row(name, ratio, must, aim))
    if on_gpu:
        many = options.many or options.pairs
        load = load_of(replace(recipe, batch_size=many), model, data, 1)
        work = sum(flops_of(sizes, load).values())
        best = next(each.flops for each in HARDWARE if each.name.split()[0] in torch.cuda.get_device_name())
        sides = make_pairs(model, many, data)
        tries = [
            ("sdpa", Packing(columns=load.columns), False),
            ("flex_attention", Packing(columns=ONE_ROW, multiple=FLEX_MULTIPLE), False),
            ("flex_attention", Packing(columns=ONE_ROW, multiple=FLEX_MULTIPLE), True),
        ]
        for attention, packing, compiled in tries if options.compile else tries[:2]:
            model.set_attn_implementation({"text_config": attention})
            if compiled:
                compile_layers(model)
            batch = make_batch(sides, packing)
            once = repeated(lambda batch=batch: step(batch))
            once()
            seconds = statistics.median(clock(once) for _ in range(5))
            mfu = work / seconds / best
            name = f"MFU, {many} pairs in one pass, {attention}{', compiled' * compiled}"
            print(f"{name}: {many / seconds:.2f} pairs/s, {mfu:.3f}", flush=True)
            table.append(Row(name, mfu, MFU, 0.45))
    sys.argv[1:] = ["--json", options.json] if options.json else []
    show(f"The sizes of {recipe.model.base}, {options.pairs} pairs, {options.picture}, {options.dtype} weights", table)


if __name__ == "__main__":
    main()
