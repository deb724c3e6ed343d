"""Chains: the runs of tokens in a row of trees that follow each other both in the row and in the tree.

A row consists of few chains, one for each part of a tree between two branching points. A token attends to the tokens
before it in its own chain, and to the beginnings of the chains that its own branches off from. So every kernel that
skips masked positions works on chains, not on tokens.

The functions take `ends`, the `subtree_end` of the tokens of one row (see `cafe.packing`).
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from operator import neg


def iter_chains(ends: Sequence[int]) -> Iterator[slice]:
    """Iterate over the columns of each chain of a row; together they are the whole row."""
    # A token begins a chain where it is not below the token before it.
    starts = [0, *(column for column in range(1, len(ends)) if ends[column - 1] <= column)]
    for start, stop in zip(starts, [*starts[1:], len(ends)], strict=True):
        yield slice(start, stop)


def iter_ancestors(ends: Sequence[int]) -> Iterator[tuple[slice, list[slice]]]:
    """Iterate over the chains of a row, each with the beginnings of other chains that its tokens attend to."""
    open_chains: list[slice] = []  # from the root down, those that the current chain branches off from
    for chain in iter_chains(ends):
        # A tree is laid out depth first: a chain is closed for good where its first token's subtree ends.
        while open_chains and ends[open_chains[-1].start] <= chain.start:
            open_chains.pop()
        ancestors = []
        for above in open_chains:
            # Subtrees are nested, so along a chain their ends never rise: its ancestors are its first tokens.
            stop = bisect_left(ends, -chain.start, above.start, above.stop, key=neg)
            ancestors.append(slice(above.start, stop))
        yield chain, ancestors
        open_chains.append(chain)


def iter_branches(ends: Sequence[int], chain: slice) -> Iterator[tuple[slice, slice]]:
    """Iterate over what branches off a chain: the columns of its tokens, and the chain's beginning they attend to."""
    # From the last token of the chain back: each token whose subtree ends later adds the tokens in between.
    stop = chain.stop
    for column in reversed(range(chain.start, chain.stop)):
        if ends[column] > stop:
            yield slice(stop, ends[column]), slice(chain.start, column + 1)
            stop = ends[column]


def read_spans(ends: Sequence[int], columns: Sequence[int]) -> list[tuple[slice, slice]]:
    """List the chains that hold any of some sorted columns, each with its part from the first of these to the last."""
    spans = []
    for chain in iter_chains(ends):
        # Which of the sorted columns lie in the chain.
        first, stop = bisect_left(columns, chain.start), bisect_left(columns, chain.stop)
        if first < stop:
            spans.append((chain, slice(columns[first], columns[stop - 1] + 1)))
    return spans
