"""The contrastive loss: symmetric InfoNCE and its options.

Everything is computed in float32, or in float64 where the input is, whatever precision the model ran in.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

MIN_TEMPERATURE = 0.01  # CLIP's bound on a learned temperature; the joint step applies it
CHUNK_NUMEL = 2 * 2**20  # similarities computed at once: 8 MiB in float32


@dataclass(frozen=True)
class ContrastiveConfig:
    """Configure the contrastive loss.

    To add an option, add a field here, use it below, and give `ObjectiveConfig` in the recipe a field of the same name.

    Attributes:
        symmetric: also contrast targets with queries, and average the two directions.
        hardness_weight: multiply the term of each negative by exp(hardness_weight * cosine), held constant in the
            gradient, so that a negative counts more the more it resembles the match (LLaVE, arXiv 2503.04812). 0 gives
            all negatives the same weight.
        false_negative_margin: leave out negatives whose cosine exceeds that of the match by more than this, as they are
            probably unlabeled matches (GISTEmbed, arXiv 2402.16829, here with the model as its own guide). None keeps
            all negatives.
        dim_weights: for each number of leading dimensions, the weight of the loss on these dimensions alone
            (Matryoshka, Kusupati et al., arXiv 2205.13147). The whole embedding has weight 1.
        mask_duplicates: do not count a query and a target that any pair of the batch holds as each other's negatives.
    """

    symmetric: bool = True
    hardness_weight: float = 0.0
    false_negative_margin: float | None = None
    dim_weights: Mapping[int, float] = field(default_factory=dict)
    mask_duplicates: bool = True


DEFAULT_CONFIG = ContrastiveConfig()


def info_nce(
    queries: Float[Tensor, "pairs dim"],
    targets: Float[Tensor, "pairs dim"],
    temperature: float | Float[Tensor, ""] = 0.05,
    negatives: Float[Tensor, "negatives dim"] | None = None,
    *,
    query_ids: Int64[Tensor, " pairs"] | None = None,
    target_ids: Int64[Tensor, " targets"] | None = None,
    negative_owner: Int64[Tensor, " negatives"] | None = None,
    negative_match_prob: Float[Tensor, " negatives"] | None = None,
    config: ContrastiveConfig = DEFAULT_CONFIG,
    chunk_numel: int = CHUNK_NUMEL,
) -> Float[Tensor, ""]:
    """Compute InfoNCE with in-batch and hard negatives (CAFe, arXiv 2503.19900; van den Oord et al., arXiv 1807.03748).

    Row i of `queries` matches row i of `targets`. The targets of all other pairs and all hard negatives are negatives
    of every query; the queries of all other pairs are negatives of every target.

    The similarity matrix is never held in memory: it is computed in chunks, once for the loss and once more for its
    gradient, so memory grows with the number of pairs and not with its square.

    Args:
        queries: one embedding per pair; need not be normalized.
        targets: the matches of the queries.
        temperature: divides the cosine; 0.05 as published.
        negatives: hard negatives, used in the query-to-target direction.
        query_ids, target_ids: equal ids mean equal content; None if all differ. Those of the hard negatives may follow
            the targets'. A query and a target that any pair of the batch holds are no negatives of each other.
        negative_owner: the query that each hard negative was mined for.
        negative_match_prob: the probability that a hard negative matches its query after all. It is the weight of the
            negative among the query's targets, where the match has weight 1; the loss is the cross-entropy with this
            distribution (soft matching scores, as in UniME-V2, arXiv 2510.13515). None stands for 0 everywhere.
        config: the options of the loss.
        chunk_numel: entries of the similarity matrix computed at once; fewer where the targets have fewer entries.

    Returns:
        The mean loss in nats, or the weighted mean of several where `config.dim_weights` is set.
    """
    negatives = targets[:0] if negatives is None else negatives
    if not config.mask_duplicates:
        query_ids = target_ids = None
    # The whole embedding is one of the prefixes, so without `dim_weights` this is a single loss.
    weights = {**config.dim_weights, queries.shape[1]: 1.0}
    losses = []
    for dim, weight in weights.items():
        # A prefix is normalized anew: it is used as an embedding by itself.
        loss = _single_info_nce(
            _normalize(queries[:, :dim]),
            _normalize(targets[:, :dim]),
            _normalize(negatives[:, :dim]),
            temperature,
            query_ids,
            target_ids,
            negative_owner,
            negative_match_prob,
            config,
            chunk_numel,
        )
        losses.append(weight * loss)
    return torch.stack(losses).sum() / sum(weights.values())


def _single_info_nce(
    queries: Float[Tensor, "pairs dim"],
    targets: Float[Tensor, "pairs dim"],
    negatives: Float[Tensor, "negatives dim"],
    temperature: float | Float[Tensor, ""],
    query_ids: Int64[Tensor, " pairs"] | None,
    target_ids: Int64[Tensor, " targets"] | None,
    negative_owner: Int64[Tensor, " negatives"] | None,
    negative_match_prob: Float[Tensor, " negatives"] | None,
    config: ContrastiveConfig,
    chunk_numel: int,
) -> Float[Tensor, ""]:
    """Compute InfoNCE of unit rows over all their dimensions."""
    if len(negatives):
        targets = torch.cat([targets, negatives])
    scale = queries.new_ones(()) / temperature
    loss: Tensor = _InfoNCE.apply(queries, targets, scale, query_ids, target_ids, config, chunk_numel)
    if negative_owner is None or negative_match_prob is None:
        return loss

    # So far each query's target distribution is its match alone. Moving probability from the match to a negative
    # changes the cross-entropy by that probability times the difference of their logits.
    match_probs = negative_match_prob.to(loss)
    total_weight = 1 + scale.new_zeros(len(queries)).index_add(0, negative_owner, match_probs)
    soft_labels = match_probs / total_weight[negative_owner]
    negatives, positives = targets[len(queries) :], targets[negative_owner]
    cosine_gap = ((positives - negatives) * queries[negative_owner]).sum(1)
    change = soft_labels @ cosine_gap * scale / len(queries)
    directions = 2 if config.symmetric else 1
    return loss + change / directions


class _InfoNCE(torch.autograd.Function):
    """Compute InfoNCE of unit rows in chunks. The targets are those of all pairs, followed by the hard negatives."""

    @staticmethod
    def forward(
        ctx: Any,
        queries: Float[Tensor, "pairs dim"],
        targets: Float[Tensor, "targets dim"],
        scale: Float[Tensor, ""],
        query_ids: Int64[Tensor, " pairs"] | None,
        target_ids: Int64[Tensor, " ids"] | None,
        config: ContrastiveConfig,
        chunk_numel: int,
    ) -> Float[Tensor, ""]:
        """Compute the loss, and keep the denominators of its softmaxes."""
        pairs = len(queries)
        positive_logits, row_logsumexp = queries.new_empty(pairs), queries.new_empty(pairs)
        column_logsumexp = queries.new_full((pairs,), float("-inf"))
        chunks = _iter_logits(queries, targets, scale, query_ids, target_ids, config, chunk_numel)
        for rows, logits, column_logits in chunks:
            positive_logits[rows] = logits.diagonal(rows.start)
            # A chunk holds whole rows, so the denominator of a query is complete; that of a target is accumulated.
            row_logsumexp[rows] = logits.logsumexp(1)
            if config.symmetric:
                torch.logaddexp(column_logsumexp, column_logits.logsumexp(0), out=column_logsumexp)

        # The backward pass computes the logits again from these; it needs the denominators only.
        ctx.save_for_backward(queries, targets, scale, query_ids, target_ids, row_logsumexp, column_logsumexp)
        ctx.config, ctx.chunk_numel = config, chunk_numel
        loss = (row_logsumexp - positive_logits).mean()
        if not config.symmetric:
            return loss
        return (loss + (column_logsumexp - positive_logits).mean()) / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of the embeddings and, if it is learned, of the temperature."""
        queries, targets, scale, query_ids, target_ids, row_logsumexp, column_logsumexp = ctx.saved_tensors
        pairs = len(queries)
        directions = 2 if ctx.config.symmetric else 1
        grad_queries, grad_targets = torch.empty_like(queries), torch.zeros_like(targets)
        grad_scale = torch.zeros_like(scale)
        chunks = _iter_logits(queries, targets, scale, query_ids, target_ids, ctx.config, ctx.chunk_numel)
        for rows, logits, column_logits in chunks:
            # The gradient of a logsumexp is a softmax; that of the loss subtracts 1 at the match, once per direction.
            # `column_logits` may be a view of `logits`: it is read before these are overwritten.
            column_probs = (column_logits - column_logsumexp).exp_() if ctx.config.symmetric else 0.0
            probs = logits.sub_(row_logsumexp[rows, None]).exp_()
            probs[:, :pairs] += column_probs
            probs.diagonal(rows.start).sub_(directions)
            probs *= grads[0] / (directions * pairs)
            # A chunk has all that its queries need, and a part of what each target does.
            grad_queries[rows] = (probs @ targets).mul_(scale)
            grad_targets.addmm_(probs.T, queries[rows])
        if ctx.needs_input_grad[2]:
            # A logit is cosine * scale, so the gradient of the scale is the sum of probs * cosine.
            grad_scale = (grad_queries * queries).sum() / scale
        return grad_queries, grad_targets.mul_(scale), grad_scale, None, None, None, None


def _iter_logits(
    queries: Float[Tensor, "pairs dim"],
    targets: Float[Tensor, "targets dim"],
    scale: Float[Tensor, ""],
    query_ids: Int64[Tensor, " pairs"] | None = None,
    target_ids: Int64[Tensor, " ids"] | None = None,
    config: ContrastiveConfig = DEFAULT_CONFIG,
    chunk_numel: int = CHUNK_NUMEL,
) -> Iterator[tuple[slice, Float[Tensor, "rows targets"], Float[Tensor, "rows pairs"]]]:
    """Iterate over chunks of rows of the similarity matrix.

    Yields:
        The rows of the chunk, the logits of their queries over all targets, and the same logits over the targets of the
        pairs as the target-to-query direction sees them: there a false-negative margin counts from the target's own
        match. Whatever is not a negative is -inf.
    """
    pairs = len(queries)
    # A chunk need not be larger than the targets, which are in memory anyway.
    step = max(1, min(chunk_numel // len(targets), targets.shape[1]))
    # Multiplying a negative's term by exp(hardness_weight * cosine) is the same as a larger scale of its logit.
    negative_scale = scale + config.hardness_weight
    bounds = None
    if config.false_negative_margin is not None:
        # The largest cosine of a negative, as a logit: compared as they are, the logits need no division.
        positive_cosine = (queries * targets[:pairs]).sum(1)
        bounds = (positive_cosine + config.false_negative_margin) * negative_scale
    match_mask = _make_match_mask(queries, query_ids, target_ids)
    for start in range(0, pairs, step):
        rows = slice(start, min(start + step, pairs))
        logits = (queries[rows] * negative_scale) @ targets.T
        positive_logits = logits.diagonal(start) * (scale / negative_scale)

        # Known matches. This also masks each query's own, which is put back below.
        if match_mask is not None:
            is_match = match_mask(rows)
            logits[:, : is_match.shape[1]].masked_fill_(is_match, float("-inf"))

        # Unlabeled matches. Each direction has its own bound: only here do the two need separate memory.
        column_logits = logits[:, :pairs]
        if bounds is not None:
            column_logits = column_logits.masked_fill(column_logits > bounds, float("-inf"))
            logits.masked_fill_(logits > bounds[rows, None], float("-inf"))

        for each in (logits, column_logits):
            each.diagonal(start).copy_(positive_logits)
        yield rows, logits, column_logits


def _make_match_mask(
    queries: Float[Tensor, "pairs dim"],
    query_ids: Int64[Tensor, " pairs"] | None,
    target_ids: Int64[Tensor, " ids"] | None,
) -> Callable[[slice], Bool[Tensor, "rows ids"]] | None:
    """Return a function that says, for some queries, which targets they are paired with anywhere in the batch.

    A query and a target are paired if any pair holds an equal query and an equal target, by their ids. None if no ids
    are given: then all contents differ.
    """
    if query_ids is None and target_ids is None:
        return None
    pairs = len(queries)
    distinct = torch.arange(pairs, device=queries.device)
    queries_by_id = distinct if query_ids is None else query_ids
    # The ids of targets become small numbers, so that they can index a table.
    groups = distinct if target_ids is None else target_ids.unique(return_inverse=True)[1]
    if len(queries_by_id.unique()) == pairs:  # each query has its own match alone
        return lambda rows: groups[rows, None] == groups[None, :]

    def match_mask(rows: slice) -> Bool[Tensor, "rows ids"]:
        """Count the pairs of each equal query by their groups of targets, and look the targets up in that."""
        is_same_query = (queries_by_id[:, None] == queries_by_id[None, rows]).to(queries)
        counts = queries.new_zeros(len(groups), is_same_query.shape[1]).index_add_(0, groups[:pairs], is_same_query)
        return (counts.index_select(0, groups) > 0).T

    return match_mask


def _normalize(rows: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Scale rows to unit length, in float32 or, where the input is, in float64."""
    precise = rows if rows.dtype == torch.float64 else rows.float()
    return F.normalize(precise, dim=-1)


def in_batch_accuracy(
    queries: Float[Tensor, "pairs dim"],
    targets: Float[Tensor, "pairs dim"],
    query_ids: Int64[Tensor, " pairs"] | None = None,
    target_ids: Int64[Tensor, " pairs"] | None = None,
    chunk_numel: int = CHUNK_NUMEL,
) -> Float[Tensor, ""]:
    """Compute the fraction of pairs whose match is the nearest in the batch, averaged over both directions (0 to 1).

    Contents that are paired anywhere in the batch, by equal ids, do not compete with each other's matches.
    """
    queries, targets = _normalize(queries), _normalize(targets)
    matches = torch.arange(len(queries), device=queries.device)
    correct = queries.new_zeros(())
    unit_scale = queries.new_ones(())
    directions = ((queries, targets, query_ids, target_ids), (targets, queries, target_ids, query_ids))
    for anchors, candidates, anchor_ids, candidate_ids in directions:
        chunks = _iter_logits(anchors, candidates, unit_scale, anchor_ids, candidate_ids, chunk_numel=chunk_numel)
        for rows, logits, _ in chunks:
            correct += (logits.argmax(1) == matches[rows]).sum()
    return correct / (2 * len(queries))
