"""Gradients in a module's parameters: one per loss where their norms are logged, and free of the loss scale."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cafe.utils.distributed import existing_grads, global_grad_norm


class PerLossGradients:
    """Accumulates the gradients of several losses, separately where the norm of each is wanted.

    Args:
        parameters: the trained parameters.
        losses: the losses' names, the same in every process; any of them may have no gradient in a micro-batch.
        separate: keep one gradient per loss until `merge`.
    """

    def __init__(self, parameters: list[nn.Parameter], losses: Sequence[str], separate: bool) -> None:
        self.parameters, self.separate = parameters, separate
        self.by_loss: dict[str, list[Tensor | None]] = {name: [None] * len(parameters) for name in losses}
        self.accumulated: list[Tensor | None] = []
        if separate:
            # What earlier batches of the same step accumulated is put aside until `merge`.
            self.accumulated = self._swap([None] * len(parameters))

    def backward(self, **losses: Float[Tensor, ""]) -> None:
        """Backpropagate losses that share a graph, and free the graph."""
        # A micro-batch of text gives no gradient where the projector alone is trained.
        trained = {name: loss for name, loss in losses.items() if loss.requires_grad}
        if self.separate:
            self._backward_separately(trained)
        elif trained:
            torch.stack(list(trained.values())).sum().backward()

    def _backward_separately(self, losses: dict[str, Float[Tensor, ""]]) -> None:
        """Backpropagate one loss at a time, each into its own gradients."""
        for count, (name, loss) in enumerate(losses.items(), start=1):
            # The parameters have this loss's gradients alone meanwhile.
            self._swap(self.by_loss[name])
            loss.backward(retain_graph=count < len(losses))  # the last one frees the graph
            self.by_loss[name] = self._swap([None] * len(self.parameters))

    def merge(self) -> dict[str, float]:
        """Add the separate gradients to the parameters' own and return the norm of each over all processes."""
        if not self.separate:
            return {}
        norms = {}
        # Back to the sum of earlier batches, to which this one's gradients are added.
        self._swap(self.accumulated)
        for name, grads in self.by_loss.items():
            norms[name] = global_grad_norm(self.parameters, grads).item()
            for parameter, grad in zip(self.parameters, grads, strict=True):
                _accumulate(parameter, grad)
        return norms

    def _swap(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        """Set the parameters' gradients and return the previous ones."""
        previous = [parameter.grad for parameter in self.parameters]
        for parameter, grad in zip(self.parameters, grads, strict=True):
            parameter.grad = grad
        return previous


def _accumulate(parameter: nn.Parameter, grad: Tensor | None) -> None:
    """Add a gradient to a parameter's, as a backward pass does."""
    if grad is None:
        return
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad.add_(grad)


def unscale(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Divide the parameters' gradients by the factor that the loss was multiplied by."""
    if factor == 1:
        return
    for grad in existing_grads(parameters):
        grad.div_(factor)
