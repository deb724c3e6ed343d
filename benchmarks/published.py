"""The joint step as it is published, written plainly from the paper, to compare with.

A reads each branch of the batch by itself, padded: the image for its embedding, the text (with a blank image through
the vision tower), and the dialogue, whose logits are computed at every token. B is A under a gradient cache: first all
embeddings without gradient, chunk by chunk, then once more with it (VLM2Vec's way).
"""

import torch
import torch.nn.functional as F
from common import Sides
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from cafe.packing import Branch, collate_vision

TEMPERATURE = 0.05


def padded(rows: list[Branch], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pad rows on the right."""
    ids = pad_sequence([row.input_ids for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones_like(row.input_ids) for row in rows], batch_first=True)
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        **collate_vision([row.image_inputs for row in rows if row.image_inputs]),
    }
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()}


def embed(model: PreTrainedModel, rows: list[Branch]) -> Tensor:
    """Embed each row by its last token; rows without an image send a blank one through the tower."""
    inputs = padded(rows, model.device, model.dtype)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    last = hidden[torch.arange(len(rows)), inputs["attention_mask"].sum(1) - 1]
    if "pixel_values" not in inputs:
        side = model.config.vision_config.image_size
        blank = torch.zeros(len(rows), 3, side, side, dtype=model.dtype, device=model.device)
        last = last + 0 * model.model.vision_tower(blank).last_hidden_state.sum()
    return F.normalize(last.float(), dim=-1)


def language(model: PreTrainedModel, rows: list[Branch]) -> Tensor:
    """Compute the next-token loss, summed, with logits at every token."""
    inputs = padded(rows, model.device, model.dtype)
    supervised = pad_sequence([row.loss_mask for row in rows], batch_first=True).to(model.device)
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = inputs["input_ids"][:, 1:].masked_fill(~supervised[:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def contrastive(queries: Tensor, targets: Tensor) -> Tensor:
    """Compute symmetric InfoNCE over the whole similarity matrix."""
    logits = queries @ targets.T / TEMPERATURE
    matches = torch.arange(len(queries), device=queries.device)
    return (F.cross_entropy(logits, matches) + F.cross_entropy(logits.T, matches)) / 2


def num_supervised(sides: Sides) -> int:
    """Count the supervised tokens."""
    return sum(int(row.loss_mask.sum()) for row in sides.dialogues)


def step_a(model: PreTrainedModel, sides: Sides) -> tuple[Tensor, Tensor]:
    """A: forward and backward; returns both losses."""
    lm = language(model, sides.dialogues) / num_supervised(sides)
    con = contrastive(embed(model, sides.queries), embed(model, sides.targets))
    (lm + con).backward()
    return lm.detach(), con.detach()


def step_b(model: PreTrainedModel, sides: Sides, chunk: int) -> tuple[Tensor, Tensor]:
    """B: A with a gradient cache over chunks of pairs."""
    chunks = [slice(start, start + chunk) for start in range(0, len(sides.queries), chunk)]
    with torch.no_grad():
        queries = torch.cat([embed(model, sides.queries[part]) for part in chunks]).requires_grad_()
        targets = torch.cat([embed(model, sides.targets[part]) for part in chunks]).requires_grad_()
    with torch.enable_grad():
        con = contrastive(queries, targets)
    con.backward()
    assert queries.grad is not None and targets.grad is not None
    total = torch.zeros((), device=model.device)
    for part in chunks:
        lm = language(model, sides.dialogues[part]) / num_supervised(sides)
        embedding_loss = (embed(model, sides.queries[part]) * queries.grad[part]).sum()
        embedding_loss = embedding_loss + (embed(model, sides.targets[part]) * targets.grad[part]).sum()
        (lm + embedding_loss).backward()
        total += lm.detach()
    return total, con.detach()
