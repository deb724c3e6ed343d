"""The joint step beside the published one: the same losses in less time, fewer operations and less padding.

python benchmarks/one_pass.py [--json FILE]
"""

import torch
from common import Row, Sides, flops, make_batch, make_pairs, paired, show, tiny_llava
from published import step_a, step_b

from cafe.data.batch import Batch, MicroBatchSize
from cafe.lvlm.forward import set_kernel
from cafe.lvlm.vision_cache import VisionCache
from cafe.packing import PackingConfig
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep

PAIRS, CHUNK = 16, 4
CHUNK_TOKENS = 1800  # about CHUNK pairs


def main() -> None:
    """Print the table."""
    model = tiny_llava()
    step = JointStep(model, ObjectiveConfig())
    sides: Sides = make_pairs(PAIRS)
    packing = set_kernel(PackingConfig(), model, model.device, model.dtype)
    whole = make_batch(sides, packing)
    cached = make_batch(sides, packing, MicroBatchSize(tokens=CHUNK_TOKENS))

    def ours(batch: Batch) -> None:
        step.forward_backward(batch)
        model.zero_grad()

    def a() -> None:
        step_a(model, sides)
        model.zero_grad()

    def b() -> None:
        step_b(model, sides, CHUNK)
        model.zero_grad()

    def against_b(precision: str = "fp32", frozen: bool = False) -> float:
        """Pairs/s of ours over those of B, both under a gradient cache."""
        tower = model.model.vision_tower.requires_grad_(not frozen)
        other = JointStep(model, ObjectiveConfig(), precision, VisionCache(tower, model.config) if frozen else None)

        def cached_step() -> None:
            other.forward_backward(cached)
            model.zero_grad()

        def autocast_b() -> None:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
                b()

        ratio = paired(cached_step, autocast_b)[1]
        tower.requires_grad_(True)
        return ratio

    losses, published = step.forward_backward(whole), step_a(model, sides)
    torch.testing.assert_close(losses.lm, published[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses.contrastive, published[1], rtol=1e-3, atol=1e-3)
    model.zero_grad()

    seconds, against_a = paired(lambda: ours(whole), a)
    seconds_cached, cached_ratio = paired(lambda: ours(cached), b)
    _, cache_cost = paired(lambda: ours(whole), lambda: ours(cached))
    joint = cached.micro_batches[0].joint
    padding = 1 - whole.micro_batches[0].joint.num_tokens / whole.micro_batches[0].joint.inputs["input_ids"].numel()
    print(
        f"{PAIRS} pairs: {PAIRS / seconds:.2f} pairs/s in one pass, {PAIRS / seconds_cached:.2f} pairs/s in "
        f"{len(cached.micro_batches)} micro-batches of about {joint.num_tokens} tokens"
    )
    show(
        "The joint step",
        [
            Row("1: pairs/s, ours / A, one pass", against_a, 1.8, 2.2),
            Row("2: pairs/s, ours / B, gradient cache", cached_ratio, 1.6, 2.4),
            Row("2: the same in bf16", against_b(precision="bf16"), 1.6, 2.4),
            Row("2: the same with a frozen vision tower", against_b(frozen=True), 1.6, 3.0),
            Row("1: FLOPs, A / ours", flops(a) / flops(lambda: ours(whole)), 1.8, 2.2),
            Row("2: FLOPs, B / ours", flops(b) / flops(lambda: ours(cached)), 1.6, 2.4),
            Row("5: step time with / without gradient cache", cache_cost, 1.38, 1.30, at_least=False),
            Row("11: tokens that are padding, %", 100 * padding, 2.0, 0.0, at_least=False),
        ],
    )


if __name__ == "__main__":
    main()
