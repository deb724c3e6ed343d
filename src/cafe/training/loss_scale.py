"""The loss scale of a run that computes in float16.

float16's smallest number is 6e-8, and the gradient of one token or pair within a batch's mean is often smaller: it
would be lost in the backward pass. The loss is therefore multiplied by a large factor, which is divided out of the
weights' gradients, where float32 holds them (Micikevicius et al., arXiv 1710.03740). The factor is a power of two, so
it changes no digit. It is as large as the gradients allow: a step whose gradient overflows is repeated with half the
factor, the same batch and the same random numbers, so nothing is lost; after many steps without overflow the factor
doubles. `torch.amp.GradScaler` would skip such a step and never learn from its batch.
"""

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Multiplies the loss. The default is 1 and never grows.

    Attributes:
        factor: the scale.
        growth_interval: steps without overflow after which it doubles.
        good_steps: steps without overflow since it last changed.
    """

    factor: float = 1.0
    growth_interval: float = math.inf
    good_steps: int = 0

    def backoff(self) -> "LossScale":
        """Return the scale after a gradient that overflowed."""
        return replace(self, factor=self.factor / 2, good_steps=0)

    def update(self) -> "LossScale":
        """Return the scale after a gradient that was finite."""
        if self.good_steps + 1 < self.growth_interval:
            return replace(self, good_steps=self.good_steps + 1)
        return replace(self, factor=2 * self.factor, good_steps=0)


FLOAT16 = LossScale(factor=2.0**16, growth_interval=2000)  # the start and growth interval of PyTorch's GradScaler
