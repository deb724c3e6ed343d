"""The scale of the loss in a run whose arithmetic is float16.

The smallest number of float16 is 6e-8, and what the mean over a batch's tokens and pairs leaves of each one's gradient
is often less: it would be lost on its way backward. So the loss is multiplied by a large factor, which is divided out
of the weights' gradients, where float32 holds them (Micikevicius et al., arXiv 1710.03740). The factor is a power of
two and changes no digit. It is as large as the gradients let it be: where one overflows, the step is taken again under
half of it, with the same batch and the same random numbers, so that nothing is lost; and it doubles after many steps
without. `torch.amp.GradScaler` would leave such a step out, its batch unlearned.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """A factor on the loss; by default none, and for ever.

    Attributes:
        factor: it.
        growth_interval: steps after which it doubles.
        good_steps: steps since it last changed.
    """

    factor: float = 1.0
    growth_interval: float = math.inf
    good_steps: int = 0

    def backoff(self) -> "LossScale":
        """The scale after a gradient that overflowed."""
        return replace(self, factor=self.factor / 2, good_steps=0)

    def update(self) -> "LossScale":
        """The scale after a gradient that was finite."""
        if self.good_steps + 1 < self.growth_interval:
            return replace(self, good_steps=self.good_steps + 1)
        return replace(self, factor=2 * self.factor, good_steps=0)


FLOAT16 = LossScale(factor=2.0**16, growth_interval=2000)  # as PyTorch's own begins and doubles


def unscale(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Divides a factor on the loss out of its gradient."""
    if factor == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= factor
