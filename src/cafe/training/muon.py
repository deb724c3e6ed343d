"""Muon: orthogonalized momentum for the matrices inside a model's layers (Jordan et al., 2024; arXiv 2502.16982).

It learns to use images in a fraction of AdamW's steps. `torch.optim.Muon` iterates in bfloat16 everywhere, which takes
a CPU without units for it a hundred times as long; here a CPU iterates in float32, and matrices of one shape are
orthogonalized together.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

# All three as in Jordan's Muon.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of x, x^3 and x^5 in the polynomial that is iterated
_ITERATIONS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.AdamW):
    """Nesterov momentum, orthogonalized, for parameter groups with `orthogonal=True`; AdamW for the others.

    Parameters of an orthogonal group have two dimensions. Their updates have the RMS of AdamW's (arXiv 2502.16982,
    section 2.2), so one learning rate serves both, and their weight decay is decoupled as AdamW's is.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        for group in self.param_groups:
            if group.get("orthogonal"):
                self._orthogonal_step(group)
        return super().step(closure)  # of the parameters that still have a gradient

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        """Update the matrices of a group that have a gradient, and clear it."""
        # Matrices of one shape go through the iteration as one batch.
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                by_shape.setdefault(matrix.shape, []).append(matrix)
        for shape, matrices in by_shape.items():
            directions = [self._nesterov(matrix) for matrix in matrices]
            updates = newton_schulz(torch.stack(directions))
            # An orthogonal matrix has an RMS of 1 / sqrt(its longer side); AdamW's updates have one of about 0.2.
            rate = group["lr"] * 0.2 * max(shape) ** 0.5
            for matrix, update in zip(matrices, updates, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.sub_(update.to(matrix.dtype), alpha=rate)

    def _nesterov(self, matrix: nn.Parameter) -> Tensor:
        """Update a matrix's momentum with its gradient, and return the gradient that looks ahead along it."""
        grad = matrix.grad
        assert grad is not None
        matrix.grad = None  # so that AdamW passes it over
        state = self.state[matrix]
        if not state:
            # AdamW's `load_state_dict` expects "step" in every state.
            state.update(step=torch.zeros(()), momentum=torch.zeros_like(matrix))
        state["step"] += 1
        momentum: Tensor = state["momentum"]
        momentum.lerp_(grad, 1 - _MOMENTUM)
        return grad.lerp(momentum, _MOMENTUM)


def hidden_weight_names(model: nn.Module) -> set[str]:
    """Return the names of linear layers' weights, without the language model's head."""
    modules = dict(model.named_modules())
    # By identity: an adapter around the head and the layer within have one weight.
    heads = {id(module.weight) for name, module in modules.items() if name.rpartition(".")[2] == "lm_head"}
    names = set()
    for name, module in modules.items():
        if isinstance(module, nn.Linear) and id(module.weight) not in heads:
            names.add(f"{name}.weight")
    return names


def newton_schulz(matrices: Float[Tensor, "matrices rows columns"]) -> Float[Tensor, "matrices rows columns"]:
    """Return the matrices with singular values near 1, by Newton-Schulz iteration."""
    # The smaller Gram matrix is the cheaper one: work on wide matrices.
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.to(torch.float32 if x.device.type == "cpu" else torch.bfloat16)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values of at most 1, where it converges
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        # x <- a x + (b A + c A A) x  with  A = x x^T
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
