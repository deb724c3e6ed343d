"""The losses, as pure tensor functions: no model, no file, no rank.

All of them compute in float32 (or float64 where the input is) whatever the model ran in.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

CHUNK_NUMEL = 2 * 2**20  # similarities computed at once: 8 MiB in float32


def info_nce(
    queries: Float[Tensor, "pairs dim"],
    targets: Float[Tensor, "pairs dim"],
    temperature: float | Tensor = 0.05,
    negatives: Float[Tensor, "negatives dim"] | None = None,
    target_ids: Int64[Tensor, " targets"] | None = None,
    owners: Int64[Tensor, " negatives"] | None = None,
    scores: Float[Tensor, " negatives"] | None = None,
    symmetric: bool = True,
    hardness: float = 0.0,
    margin: float | None = None,
    tile: int = CHUNK_NUMEL,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE with in-batch negatives (CAFe, arXiv 2503.19900; van den Oord et al., arXiv 1807.03748).

    Rows need not be normalised. Row i of `queries` matches row i of `targets`; every other pair's target and every
    hard negative is a negative of every query, and every other pair's query is a negative of every target.

    The similarity matrix is never held: it is made in tiles, once for the loss and once more for its gradient, so that
    memory grows with the number of pairs and not with its square.

    Args:
        queries: one embedding a pair.
        targets: its match.
        temperature: divides the cosine; 0.05 as published.
        negatives: hard negatives, for the query-to-target direction.
        target_ids: of the targets, and of the hard negatives behind them if wanted; equal numbers mark equal contents,
            of which a query's own target makes none a negative.
        owners, scores: the query that each hard negative was found for, and how likely it matches that after all: its
            weight as a target beside the match's weight of 1. So a query's targets are a distribution, and the loss the
            cross-entropy with it (soft matching scores, as in UniME-V2, arXiv 2510.13515). None for 0 each.
        symmetric: also contrast targets with queries, and average the two directions.
        hardness: each negative's term is multiplied by exp(hardness * cosine), held constant in the gradient: the more
            a negative resembles the match, the more it counts (LLaVE, arXiv 2503.04812). 0 for equal weights.
        margin: what is more similar than the match by more than this cosine is taken for a match that nobody marked,
            and is no negative (as in GISTEmbed, arXiv 2402.16829, here with the model as its own guide). None for none.
        tile: entries of the similarity matrix computed at once, or as many as the targets have where that is less.

    Returns:
        The mean loss in nats.
    """
    queries, targets = _normalize(queries), _normalize(targets)
    if negatives is not None and len(negatives):
        targets = torch.cat([targets, _normalize(negatives)])
    scale = queries.new_ones(()) / temperature
    loss: Tensor = _InfoNCE.apply(queries, targets, scale, target_ids, symmetric, hardness, margin, tile)
    if owners is None or scores is None:
        return loss
    # Of the cross-entropy, the matches alone are in the loss so far: what the other targets' shares change in it.
    found, matches = targets[len(queries) :], targets[owners]
    shares = scores.to(loss) / (1 + scale.new_zeros(len(queries)).index_add(0, owners, scores.to(loss)))[owners]
    change = shares @ ((matches - found) * queries[owners]).sum(1) * scale / len(queries)
    return loss + change / (2 if symmetric else 1)


def matryoshka(
    prefixes: Mapping[int, float],
    queries: Float[Tensor, "pairs dim"],
    targets: Float[Tensor, "pairs dim"],
    temperature: float | Tensor,
    negatives: Float[Tensor, "negatives dim"],
    **options: Any,
) -> Float[Tensor, ""]:
    """The weighted mean of InfoNCE over prefixes of the embedding (Kusupati et al., arXiv 2205.13147).

    Args:
        prefixes: the weight of each number of first dimensions; the whole embedding has weight 1.
        queries, targets, temperature, negatives, options: as `info_nce` takes them.
    """
    weights = {**prefixes, queries.shape[1]: 1.0}
    losses = [
        weight * info_nce(queries[:, :dim], targets[:, :dim], temperature, negatives[:, :dim], **options)
        for dim, weight in weights.items()
    ]
    return torch.stack(losses).sum() / sum(weights.values())


class _InfoNCE(torch.autograd.Function):
    """InfoNCE on unit rows: the targets of all pairs, then the hard negatives."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        targets: Tensor,
        scale: Tensor,
        ids: Tensor | None,
        symmetric: bool,
        hardness: float,
        margin: float | None,
        tile: int,
    ) -> Tensor:
        pairs = len(queries)
        positives, by_row = queries.new_empty(pairs), queries.new_empty(pairs)
        by_column = queries.new_full((pairs,), float("-inf"))
        for rows, logits, columns in _iter_logits(queries, targets, scale, ids, hardness, margin, tile):
            positives[rows] = logits.diagonal(rows.start)
            by_row[rows] = logits.logsumexp(1)
            if symmetric:
                torch.logaddexp(by_column, columns.logsumexp(0), out=by_column)
        ctx.save_for_backward(queries, targets, scale, ids, by_row, by_column)
        ctx.options = symmetric, hardness, margin, tile
        loss = (by_row - positives).mean()
        return (loss + (by_column - positives).mean()) / 2 if symmetric else loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queries, targets, scale, ids, by_row, by_column = ctx.saved_tensors
        symmetric, hardness, margin, tile = ctx.options
        pairs, directions = len(queries), 2 if symmetric else 1
        grad_queries, grad_targets = torch.empty_like(queries), torch.zeros_like(targets)
        grad_scale = torch.zeros_like(scale)
        for rows, logits, columns in _iter_logits(queries, targets, scale, ids, hardness, margin, tile):
            back = (columns - by_column).exp_() if symmetric else 0.0
            share = logits.sub_(by_row[rows, None]).exp_()
            share[:, :pairs] += back
            share.diagonal(rows.start).sub_(directions)
            share *= grads[0] / (directions * pairs)
            grad_queries[rows] = (share @ targets).mul_(scale)
            grad_targets.addmm_(share.T, queries[rows])
        if ctx.needs_input_grad[2]:  # a logit is cosine * scale, so the sum of share * cosine is this
            grad_scale = (grad_queries * queries).sum() / scale
        return grad_queries, grad_targets.mul_(scale), grad_scale, None, None, None, None, None


def _iter_logits(
    queries: Tensor,
    targets: Tensor,
    scale: Tensor,
    ids: Tensor | None = None,
    hardness: float = 0.0,
    margin: float | None = None,
    tile: int = CHUNK_NUMEL,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The logits of queries over all targets, and over the pairs' own for the other direction, some rows at a time.

    They are of the same numbers, but a margin is from each direction's own match. What is no negative is -inf.
    """
    pairs = len(queries)
    step = max(1, min(tile // len(targets), targets.shape[1]))  # rows: a tile holds no more numbers than the targets
    sharp = scale + hardness
    bounds = None if margin is None else ((queries * targets[:pairs]).sum(1) + margin) * sharp
    for start in range(0, pairs, step):
        rows = slice(start, min(start + step, pairs))
        logits = (queries[rows] * sharp) @ targets.T
        matches = logits.diagonal(start) * (scale / sharp)
        if ids is not None:
            same = ids[rows, None] == ids[None, :]
            logits[:, : len(ids)].masked_fill_(same, float("-inf"))
        columns = logits[:, :pairs]
        if bounds is not None:
            columns = columns.masked_fill(columns > bounds, float("-inf"))
            logits.masked_fill_(logits > bounds[rows, None], float("-inf"))
        for each in (logits, columns):
            each.diagonal(start).copy_(matches)
        yield rows, logits, columns


def _normalize(rows: Tensor) -> Tensor:
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=-1)


def in_batch_accuracy(
    queries: Float[Tensor, "pairs dim"],
    targets: Float[Tensor, "pairs dim"],
    target_ids: Int64[Tensor, " pairs"] | None = None,
    tile: int = CHUNK_NUMEL,
) -> Float[Tensor, ""]:
    """Share of pairs, both directions averaged, that are nearest to their own match within the batch (0 to 1)."""
    queries, targets = _normalize(queries), _normalize(targets)
    pairs = torch.arange(len(queries), device=queries.device)
    right = queries.new_zeros(())
    for rows, columns in ((queries, targets), (targets, queries)):
        for found, logits, _ in _iter_logits(rows, columns, rows.new_ones(()), target_ids, tile=tile):
            right += (logits.argmax(1) == pairs[found]).sum()
    return right / (2 * len(queries))
