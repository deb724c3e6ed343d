"""The losses, as pure tensor functions: no model, no file, no rank.

All of them compute in float32 (or float64 where the input is) whatever the model ran in.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def info_nce(
    queries: Float[Tensor, "pairs dim"],
    targets: Float[Tensor, "pairs dim"],
    temperature: float | Tensor = 0.05,
    negatives: Float[Tensor, "negatives dim"] | None = None,
    target_ids: Int64[Tensor, "pairs"] | None = None,
    symmetric: bool = True,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE with in-batch negatives (CAFe, arXiv 2503.19900; van den Oord et al., arXiv 1807.03748).

    Rows need not be normalised. Row i of `queries` matches row i of `targets`; every other pair's target and every
    hard negative is a negative of every query, and every other pair's query is a negative of every target.

    Args:
        queries: one embedding a pair.
        targets: its match.
        temperature: divides the cosine; 0.05 as published.
        negatives: hard negatives, for the query-to-target direction.
        target_ids: equal numbers mark equal targets, which are then not each other's negatives.
        symmetric: also contrast targets with queries, and average the two directions.

    Returns:
        The mean loss in nats.
    """
    logits = similarity(queries, targets) / temperature
    if target_ids is not None:
        logits = logits.masked_fill(duplicates(target_ids), float("-inf"))
    matches = torch.arange(len(queries), device=queries.device)
    forward = logits
    if negatives is not None and len(negatives):
        forward = torch.cat([logits, similarity(queries, negatives) / temperature], dim=1)
    loss = F.cross_entropy(forward, matches)
    return (loss + F.cross_entropy(logits.T, matches)) / 2 if symmetric else loss


def similarity(rows: Float[Tensor, "rows dim"], columns: Float[Tensor, "columns dim"]) -> Float[Tensor, "rows columns"]:
    """Cosine of every row with every column, in at least float32."""
    rows, columns = (
        F.normalize(side if side.dtype == torch.float64 else side.float(), dim=-1) for side in (rows, columns)
    )
    return rows @ columns.T


def duplicates(target_ids: Int64[Tensor, "pairs"]) -> Bool[Tensor, "pairs pairs"]:
    """True where two different pairs share a target."""
    same = target_ids[:, None] == target_ids[None, :]
    return same & ~torch.eye(len(target_ids), dtype=torch.bool, device=target_ids.device)


def next_token_loss(
    logits: Float[Tensor, "rows tokens vocabulary"],
    input_ids: Int64[Tensor, "rows tokens"],
    supervised: Bool[Tensor, "rows tokens"],
    count: int | Tensor,
) -> Float[Tensor, ""]:
    """Next-token cross-entropy summed over the supervised tokens and divided by `count`.

    `count` is the number of supervised tokens of the whole contrastive batch, over all micro-batches and ranks, so
    that adding up the parts gives the mean over tokens and not a mean of means.
    """
    wanted = supervised[:, 1:]
    chosen = logits[:, :-1][wanted]
    chosen = chosen if chosen.dtype == torch.float64 else chosen.float()
    return F.cross_entropy(chosen, input_ids[:, 1:][wanted], reduction="sum") / count


def retrieval_accuracy(
    queries: Float[Tensor, "pairs dim"],
    targets: Float[Tensor, "pairs dim"],
    target_ids: Int64[Tensor, "pairs"] | None = None,
) -> Float[Tensor, ""]:
    """Share of pairs, both directions averaged, that are nearest to their own match within the batch (0 to 1)."""
    logits = similarity(queries, targets)
    if target_ids is not None:
        logits = logits.masked_fill(duplicates(target_ids), float("-inf"))
    matches = torch.arange(len(queries), device=queries.device)
    return ((logits.argmax(1) == matches).float().mean() + (logits.argmax(0) == matches).float().mean()) / 2
