"""A step on a CPU with attention by blocks beside the same under the dense mask, as rows grow.

python benchmarks/tree_attention.py [--json FILE]
"""

from functools import partial

from common import CAPTION, Row, make_batch, make_pairs, paired, show, tiny_llava

import cafe.attention.tree
from cafe.attention.blockwise import MIN_BLOCKWISE_TOKENS
from cafe.data.batch import Batch
from cafe.packing import PackingConfig
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep

PAIRS = 8
CAPTIONS = (CAPTION, 400, 900)  # tokens; rows of the first are shorter than those that are read by blocks


def main() -> None:
    """Print the table."""
    model = tiny_llava()
    step = JointStep(model, ObjectiveConfig())

    def work(batch: Batch, long: int) -> None:
        cafe.attention.tree.MIN_BLOCKWISE_TOKENS = long
        step.forward_backward(batch)
        model.zero_grad()

    rows = []
    for caption in CAPTIONS:
        batch = make_batch(make_pairs(PAIRS, caption=caption), PackingConfig(max_row_tokens=512))
        columns = batch.micro_batches[0].joint.inputs["input_ids"].shape[1]
        _, ratio = paired(partial(work, batch, 1), partial(work, batch, 2**40))
        name = f"rows of {columns}: steps/s, by blocks / dense"
        if columns < MIN_BLOCKWISE_TOKENS:
            print(f"{name}: {ratio:.3g}; such rows are read under the dense mask")
        else:
            rows.append(Row(name, ratio, 1.0, 1.1))
    show("Attention by blocks", rows)


if __name__ == "__main__":
    main()
