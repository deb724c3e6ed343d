"""Muon: momentum made orthogonal, for the matrices inside a model's layers (Jordan et al., 2024; arXiv 2502.16982).

It learns to look at a picture in a fraction of AdamW's steps. `torch.optim.Muon` iterates in bfloat16, whatever the
machine; a CPU without units for that needs a hundred times as long, so here a CPU iterates in float32, and matrices of
one shape go together.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # of the iteration, from Jordan's Muon
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Steps of Nesterov momentum, orthogonalised and as large as AdamW's are (arXiv 2502.16982, section 2.2).

    Args:
        matrices: parameters of two dimensions.
        lr: the learning rate, on AdamW's scale.
        momentum: of the running mean of gradients.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; `closure` is there for PyTorch's schedulers and not called."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    alike.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in alike.items():
                updates = []
                for matrix in matrices:
                    mean = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))
                    mean.lerp_(matrix.grad, 1 - group["momentum"])
                    updates.append(matrix.grad.lerp(mean, group["momentum"]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for matrix, update in zip(matrices, orthogonal(torch.stack(updates)), strict=True):
                    matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.to(matrix.dtype), alpha=rate)


def orthogonal(matrices: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, "matrices rows columns"]:
    """The matrices with their singular values brought near 1, by Newton and Schulz's iteration."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.to(torch.float32 if x.device.type == "cpu" else torch.bfloat16)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
