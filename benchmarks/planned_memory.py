"""Two optimizer steps of a recipe's real sizes with random weights, and their peak memory beside the plan's.

By default that is LLaVA-OneVision 0.5B as published (SigLIP so400m and Qwen2-0.5B, 0.9B parameters), with few pairs
whose images are one crop and a thumbnail, so that a machine without a GPU can do it. On a CPU the recipe's bfloat16
arithmetic is left out, everything being float32. What is counted is what the run takes beyond the imported libraries.

python benchmarks/planned_memory.py [--recipe FILE] [--pairs 2] [--image 384x384] [--caption 64] [--json FILE]
    [key=value ...]

e.g. model.freeze=[vision_tower,projector], or micro_batch.tokens=1800 for the gradient cache.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import Row, Sides, branch, make_batch, show
from memory import give_back_what_is_freed, watched
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from cafe.lvlm.architectures import load_config
from cafe.packing import PackingConfig
from cafe.planning.hardware import GIB
from cafe.planning.memory import estimate_memory
from cafe.planning.sizes import measure_model
from cafe.planning.workload import TypicalSample, estimate_workload, image_cost_from_config
from cafe.training.optimizer import configure_trainable_parameters, make_optimizer, summarize_trainable
from cafe.training.recipe import Recipe
from cafe.training.recipe_io import read_recipe
from cafe.training.step import JointStep
from cafe.utils.distributed import clip_grad_norm_

RECIPE = Path(__file__).parents[1] / "recipes" / "cafe-0.5b.yaml"
STEPS = 2


def make_pairs(lvlm: PreTrainedModel, pairs: int, data: TypicalSample) -> Sides:
    """Make random words and images of these lengths and sizes."""
    config, cost = lvlm.config, image_cost_from_config(lvlm, data)
    side = config.vision_config.image_size

    def words(length: int) -> Tensor:
        return torch.randint(1000, 100_000, (length,))

    system, instruction, question = (
        words(data.prompt),
        words(data.prompt_overhead_tokens),
        words(data.prompt_overhead_tokens),
    )
    sides = Sides([], [], [])
    for _ in range(pairs):
        vision = {
            "pixel_values": torch.rand(1, cost.crops, 3, side, side),
            "image_sizes": torch.tensor([[data.height, data.width]]),
        }
        caption_ids, image_ids = words(data.caption), torch.full((cost.tokens,), config.image_token_index)
        sides.queries.append(
            branch(torch.cat([system, image_ids, instruction]), vision, image=config.image_token_index)
        )
        sides.targets.append(branch(torch.cat([system, caption_ids, instruction]), {}))
        dialogue = torch.cat([system, image_ids, question, caption_ids])
        sides.dialogues.append(branch(dialogue, vision, len(caption_ids), config.image_token_index))
    return sides


def two_steps(recipe: Recipe, data: TypicalSample, pairs: int, device: str) -> dict[str, float]:
    """Take two steps, and return what the plan says of their memory, in bytes by what it is for."""
    torch.manual_seed(0)
    dtype = torch.float32 if recipe.model.frozen_weights_dtype == "fp32" else torch.bfloat16
    with torch.device(device):
        lvlm = AutoModelForImageTextToText.from_config(load_config(recipe.model.base), dtype=dtype).train()
    configure_trainable_parameters(lvlm, recipe.model)
    print(summarize_trainable(lvlm), flush=True)
    load, sizes = estimate_workload(recipe, lvlm, data, 1), measure_model(lvlm)
    batch = make_batch(make_pairs(lvlm, pairs, data), PackingConfig(max_row_tokens=load.columns), recipe.micro_batch)
    load = replace(load, micro_batches=len(batch.micro_batches))
    planned = estimate_memory(sizes, load, recipe)
    print(f"the plan: {sum(planned.values()) / GIB:.2f} GiB at the peak", flush=True)
    step = JointStep(lvlm, recipe.objective, recipe.model.precision).to(device)
    trained = [parameter for parameter in step.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(step, lvlm.config.model_type, recipe.optimizer)
    for number in range(1, STEPS + 1):
        started = time.perf_counter()
        losses = step.forward_backward(batch, log_grad_norms=True)
        clip_grad_norm_(trained, recipe.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        summary = f"lm {losses.lm.item():.3f}, contrastive {losses.contrastive.item():.3f}"
        print(f"step {number} of {STEPS}: {time.perf_counter() - started:.0f} s, {summary}", flush=True)
    return planned


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--image", default="384x384", help="pixels, WIDTHxHEIGHT")
    parser.add_argument("--caption", type=int, default=64, help="tokens")
    parser.add_argument("--json")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = "bf16" if device == "cuda" else "fp32"
    width, height = map(int, options.image.split("x"))
    data = TypicalSample(width=width, height=height, caption=options.caption)
    recipe = read_recipe(
        options.recipe, [f"batch_size={options.pairs}", f"model.precision={precision}", *options.overrides]
    )

    give_back_what_is_freed()
    with watched() as taken:
        memory = two_steps(recipe, data, options.pairs, device)
    planned = sum(memory.values())

    print(f"peak {taken.bytes / GIB:.2f} GiB; the plan says {planned / GIB:.2f} GiB:")
    for name, size in memory.items():
        print(f"  {name:16} {size / GIB:6.2f}")
    sys.argv[1:] = ["--json", options.json] if options.json else []
    show(
        f"The sizes of {options.recipe.name}: peak memory of two steps",
        [Row("the plan's error, of the measured peak", abs(planned / taken.bytes - 1), 0.15, 0.05, at_least=False)],
    )


if __name__ == "__main__":
    main()
