"""Prefix sharing: lay branches out in rows so that tokens they have in common are computed once.

Branches that begin with the same tokens (system prompt, image) form a tree. A row holds trees in depth-first order: a
prefix once, followed by the continuations of its branches, longest first. Then one number per token determines the
whole attention mask: `subtree_end`, one past the last token below it in its tree. Token i attends to token j exactly if
j <= i < subtree_end[j], that is, if j is an ancestor of i or i itself. The position id of a token is the number of its
ancestors.

             shared prefix      | dialogue only           | query only    | another tree
    tokens   <system> <image>     Describe … A red circle.  Compress …      <system> A red …
    position 0 1 2 3 4            5 6 7 8 9                 5 6             0 1 2

Pure tensors: nothing here knows a model or a file.

    branch  one token sequence, and how its tokens are numbered
    tree    which prefixes branches have in common
    rows    trees into rows of bounded length
    pack    the model inputs of a micro-batch, and where its losses read
    work    how much there is to compute in a pack
"""

from cafe.packing.branch import (
    Branch,
    PositionIdsFn,
    TokenTypeFn,
    default_position_ids,
    image_token_type_ids,
    prefix_lm_token_type_ids,
)
from cafe.packing.pack import PackedBatch, collate_vision, count_crops, pack, pack_with_layout
from cafe.packing.rows import DEFAULT_PACKING, Layout, PackingConfig, build_layout
from cafe.packing.tree import count_unique_tokens
from cafe.packing.work import NO_WORK, PackWork, count_work

__all__ = [
    "DEFAULT_PACKING",
    "NO_WORK",
    "Branch",
    "Layout",
    "PackWork",
    "PackedBatch",
    "PackingConfig",
    "PositionIdsFn",
    "TokenTypeFn",
    "build_layout",
    "collate_vision",
    "count_crops",
    "count_unique_tokens",
    "count_work",
    "default_position_ids",
    "image_token_type_ids",
    "pack",
    "pack_with_layout",
    "prefix_lm_token_type_ids",
]
