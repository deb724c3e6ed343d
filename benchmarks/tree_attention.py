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
    cafe.attention.tree.MIN_BLOCKWISE_TOKENS = 1  # short rows too are read as their packing says

    def work(batch: Batch) -> None:
        step.forward_backward(batch)
        model.zero_grad()

    rows = []
    for caption in CAPTIONS:
        pairs = make_pairs(PAIRS, caption=caption)
        by_blocks = make_batch(pairs, PackingConfig(max_row_tokens=512, kernel="blocks"))
        dense = make_batch(pairs, PackingConfig(max_row_tokens=512, kernel="mask"))
        columns = dense.micro_batches[0].joint.inputs["input_ids"].shape[1]
        _, ratio = paired(partial(work, by_blocks), partial(work, dense))
        name = f"rows of {columns}: steps/s, by blocks / dense"
        if columns < MIN_BLOCKWISE_TOKENS:
            print(f"{name}: {ratio:.3g}; such rows are read under the dense mask")
        else:
            rows.append(Row(name, ratio, 1.0, 1.1))
    show("Attention by blocks", rows)


if __name__ == "__main__":
    main()
