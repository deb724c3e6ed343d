"""Prefix trees in rows: what branches share is laid out, and computed, once.

Branches that begin with the same tokens (system prompt, image) form a tree. A row holds trees in depth-first order:
a prefix once, then what follows it on each branch. Then one number a token says everything about attention: `end`, one
past the last token below it in its tree. Token i sees token j exactly if j <= i < end[j], that is, if j is i's ancestor
or i itself; a token's position is the number of its ancestors.

             shared prefix      | query's own | dialogue's own          | another tree
    tokens   <system> <image>     Compress …    Describe … A red circle.  <system> A red …
    position 0 1 2 3 4            5 6           5 6 7 8 9                 0 1 2

Pure tensors: no model, no file.
"""

from cafe.packing.branch import (
    Branch,
    PositionIdsFn,
    TokenTypeFn,
    default_position_ids,
    image_token_type_ids,
    prefix_lm_token_type_ids,
)
from cafe.packing.pack import PackedBatch, collate_vision, count_crops, pack
from cafe.packing.rows import DEFAULT_PACKING, Layout, PackingConfig, build_layout
from cafe.packing.tree import count_unique_tokens

__all__ = [
    "DEFAULT_PACKING",
    "Branch",
    "Layout",
    "PackedBatch",
    "PackingConfig",
    "PositionIdsFn",
    "TokenTypeFn",
    "build_layout",
    "collate_vision",
    "count_crops",
    "count_unique_tokens",
    "default_position_ids",
    "image_token_type_ids",
    "pack",
    "prefix_lm_token_type_ids",
]
