"""The losses, as pure tensor functions: no model, no file, no rank.

All of them compute in float32 (or float64 where the input is) whatever the model ran in.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

TILE = 2 * 2**20  # similarities computed at once: 8 MiB in float32
HEAD_TILE = 32 * 2**20  # logits of the language head computed at once: 128 MiB


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
    tile: int = TILE,
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
        for rows, logits, columns in _tiles(queries, targets, scale, ids, hardness, margin, tile):
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
        for rows, logits, columns in _tiles(queries, targets, scale, ids, hardness, margin, tile):
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


def _tiles(
    queries: Tensor,
    targets: Tensor,
    scale: Tensor,
    ids: Tensor | None = None,
    hardness: float = 0.0,
    margin: float | None = None,
    tile: int = TILE,
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


def similarity(rows: Float[Tensor, "rows dim"], columns: Float[Tensor, "columns dim"]) -> Float[Tensor, "rows columns"]:
    """Cosine of every row with every column, in at least float32."""
    return _normalize(rows) @ _normalize(columns).T


def _normalize(rows: Tensor) -> Tensor:
    return F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=-1)


def next_token_loss(
    hidden: Float[Tensor, "supervised dim"],
    labels: Int64[Tensor, " supervised"],
    weight: Float[Tensor, "vocabulary dim"],
    bias: Float[Tensor, " vocabulary"] | None = None,
    softcap: float | None = None,
    tile: int = HEAD_TILE,
) -> Float[Tensor, ""]:
    """Next-token cross-entropy, summed over the supervised tokens.

    Divide by the number of supervised tokens of the whole contrastive batch, over all micro-batches and ranks: then the
    parts add up to the mean over tokens and not to a mean of means.

    The head runs on the tokens that predict something, and on some of them at a time; their gradient is taken at once,
    so that the logits of all are never held and never computed twice. Liger's kernel (arXiv 2410.10989) does the same,
    and on an H200 takes longer: `benchmarks/language_head.py`.

    Args:
        hidden: the last hidden state of the token before each supervised one.
        labels: the supervised tokens.
        weight, bias: of the language-model head.
        softcap: logits become softcap * tanh(logits / softcap), where the family does so.
        tile: logits computed at once.
    """
    if not torch.is_grad_enabled():  # of which a Function is not told
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    loss: Tensor = _NextToken.apply(hidden, labels, weight, bias, softcap, tile)
    return loss


class _NextToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        softcap: float | None,
        tile: int,
    ) -> Tensor:
        exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        head = weight.to(hidden.dtype)
        needs_hidden, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and needs_bias else None
        total = torch.zeros((), dtype=exact, device=hidden.device)
        step = max(1, tile // len(weight))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = (hidden[rows] @ head.T).to(exact)
            if bias is not None:
                logits += bias
            if softcap is not None:
                squashed = torch.tanh(logits / softcap)
                logits = softcap * squashed
            wanted = labels[rows, None]
            shares = logits.log_softmax(-1)
            total -= shares.gather(1, wanted).sum()
            if any(ctx.needs_input_grad):
                grad = shares.exp_().scatter_add_(1, wanted, shares.new_full(wanted.shape, -1.0))
                if softcap is not None:
                    grad *= 1 - squashed**2
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad @ head
                if grad_weight is not None:
                    grad_weight += grad.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [factor] = grads  # in float32 at least: float16 would hold neither a small share of a loss nor a scaled one
        hidden, weight, bias = (
            None if grad is None else (grad.to(factor.dtype) * factor).to(grad.dtype) for grad in ctx.saved_tensors
        )
        return hidden, None, weight, bias, None, None


def retrieval_accuracy(
    queries: Float[Tensor, "pairs dim"],
    targets: Float[Tensor, "pairs dim"],
    target_ids: Int64[Tensor, " pairs"] | None = None,
    tile: int = TILE,
) -> Float[Tensor, ""]:
    """Share of pairs, both directions averaged, that are nearest to their own match within the batch (0 to 1)."""
    queries, targets = _normalize(queries), _normalize(targets)
    pairs = torch.arange(len(queries), device=queries.device)
    right = queries.new_zeros(())
    for rows, columns in ((queries, targets), (targets, queries)):
        for found, logits, _ in _tiles(rows, columns, rows.new_ones(()), target_ids, tile=tile):
            right += (logits.argmax(1) == pairs[found]).sum()
    return right / (2 * len(queries))
