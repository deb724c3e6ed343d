"""A step on a CPU with attention by blocks beside the same under the dense mask, as trees grow.

All trees are in one row, as on a CPU by default, or in the rows of the dense mask.

python benchmarks/tree_attention.py [--json FILE]
"""

from functools import partial

from common import CAPTION, Row, make_batch, make_pairs, paired, show, tiny_llava

from cafe.data.batch import Batch
from cafe.lvlm.forward import UNBOUNDED_ROW
from cafe.packing import PackingConfig
from cafe.training.recipe import ObjectiveConfig
from cafe.training.step import JointStep

PAIRS = 8
CAPTIONS = (CAPTION, 400, 900)  # tokens
TARGETS = {400: (1.0, 1.1), 900: (1.27, 1.4)}  # by the caption: of blocks in the rows of the dense mask


def main() -> None:
    """Print the table."""
    model = tiny_llava()
    step = JointStep(model, ObjectiveConfig())

    def work(batch: Batch) -> None:
        step.forward_backward(batch)
        model.zero_grad()

    rows = []
    for caption in CAPTIONS:
        pairs = make_pairs(PAIRS, caption=caption)
        dense = make_batch(pairs, PackingConfig(max_row_tokens=512, kernel="mask"))
        same_rows = make_batch(pairs, PackingConfig(max_row_tokens=512, kernel="blocks"))
        one_row = make_batch(pairs, PackingConfig(max_row_tokens=UNBOUNDED_ROW, kernel="blocks"))
        columns = dense.micro_batches[0].joint.inputs["input_ids"].shape[1]
        if caption in TARGETS:
            _, ratio = paired(partial(work, same_rows), partial(work, dense))
            rows.append(Row(f"rows of {columns}: steps/s, by blocks / dense", ratio, *TARGETS[caption]))
        _, ratio = paired(partial(work, one_row), partial(work, dense))
        rows.append(Row(f"steps/s, by blocks in one row / dense, rows of {columns}", ratio, 1.0, 1.1))
    show("Attention by blocks", rows)


if __name__ == "__main__":
    main()
