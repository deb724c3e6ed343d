"""Muon: momentum made orthogonal, for the matrices inside a model's layers (Jordan et al., 2024; arXiv 2502.16982).

It learns to look at a picture in a fraction of AdamW's steps. `torch.optim.Muon` iterates in bfloat16, whatever the
machine; a CPU without units for that needs a hundred times as long, so here a CPU iterates in float32, and matrices of
one shape go together.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # of the iteration, from Jordan's Muon
_STEPS = 5
_MOMENTUM = 0.95  # of the running mean of gradients


class Muon(torch.optim.AdamW):
    """Nesterov momentum, orthogonalised, for parameter groups with `orthogonal=True`; AdamW for the others.

    The matrices of an orthogonal group have two dimensions. Its steps are as large as AdamW's are (arXiv 2502.16982,
    section 2.2), so that one learning rate serves both; its weight decay is decoupled as AdamW's is.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        for group in self.param_groups:
            if group.get("orthogonal"):
                self._orthogonal_step(group)
        return super().step(closure)  # takes the parameters that still have a gradient

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike.setdefault(matrix.shape, []).append((matrix, matrix.grad))
                matrix.grad = None
        for shape, matrices in alike.items():
            updates = []
            for matrix, grad in matrices:
                state = self.state[matrix]
                if not state:  # AdamW wants to find its count of steps here when a state is loaded
                    state.update(step=torch.zeros(()), momentum=torch.zeros_like(matrix))
                state["step"] += 1
                mean = state["momentum"]
                mean.lerp_(grad, 1 - _MOMENTUM)
                updates.append(grad.lerp(mean, _MOMENTUM))
            rate = group["lr"] * 0.2 * max(shape) ** 0.5
            for (matrix, _), update in zip(matrices, newton_schulz(torch.stack(updates)), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.to(matrix.dtype), alpha=rate)


def hidden_weight_names(model: nn.Module) -> set[str]:
    """The names of the weights of linear layers; neither embeddings nor a head on the vocabulary are among them."""
    heads = {id(module.weight) for name, module in model.named_modules() if name.rpartition(".")[2] == "lm_head"}
    linear = ((name, module.weight) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return {f"{name}.weight" for name, weight in linear if id(weight) not in heads}


def newton_schulz(matrices: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, "matrices rows columns"]:
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
