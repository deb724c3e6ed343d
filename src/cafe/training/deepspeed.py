"""DeepSpeed, where `accelerate launch` asks for it: each process keeps and steps a part of the weights (ZeRO).

A step makes as many backward passes as it likes, and PyTorch adds their gradients up in the parameters, whole in each
process. DeepSpeed has its turn after the last of them: it reduces and clips the gradients, lets each process take the
optimizer's step on its part, and sends the new weights round.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from accelerate.utils import DeepSpeedPlugin
from jaxtyping import Float
from torch import Tensor, nn

from cafe.errors import CafeError
from cafe.training.fsdp import env_flag
from cafe.training.recipe import Recipe
from cafe.utils.distributed import BUCKET_NUMEL, world_size


def uses_deepspeed(recipe: Recipe) -> bool:
    """Whether `accelerate launch` asks for DeepSpeed.

    Raises:
        CafeError: it asks for more than goes with the joint step, or with the recipe.
    """
    if not env_flag("ACCELERATE_USE_DEEPSPEED"):
        return False
    asked = DeepSpeedPlugin()
    offload = {asked.offload_optimizer_device, asked.offload_param_device} - {"none"}
    if asked.zero_stage not in (1, 2) or offload:
        raise CafeError(
            f"accelerate is set to DeepSpeed's ZeRO of stage {asked.zero_stage}{', offloaded' if offload else ''}: "
            "stages 1 and 2 are supported, not offloaded; model.shard without DeepSpeed divides what stage 3 does."
        )
    if recipe.model.shard or recipe.optimizer.name != "adamw":
        raise CafeError("accelerate is set to DeepSpeed, which goes with model.shard: false and optimizer.name: adamw.")
    if not find_spec("deepspeed"):
        raise CafeError("accelerate is set to DeepSpeed, which is not installed: pip install 'cafe-lvlm[deepspeed]'.")
    return True


class DeepSpeedZero:
    """Takes the place of summing and clipping gradients, and of the optimizer's own `step`.

    Args:
        trained: the weights.
        optimizer: of them; from now on it holds this process's part of each of its groups, as one flat tensor.
        clip: the largest norm of the gradient.
    """

    def __init__(self, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, clip: float) -> None:
        import deepspeed

        apart = {"stage": 1, "contiguous_gradients": False, "overlap_comm": False, "reduce_bucket_size": BUCKET_NUMEL}
        settings = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": clip, "zero_optimization": apart}
        self.trained = trained
        self.engine = deepspeed.initialize(model=nn.ParameterList(trained), optimizer=optimizer, config=settings)[0]

    def sum_gradients(self, scale: float = 1.0) -> Float[Tensor, ""]:
        """Sums the gradients over processes, each process its part, but for a scale; returns their norm together."""
        for parameter in self.trained:
            if parameter.grad is None:  # other processes may have one
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad *= world_size() / scale  # of which DeepSpeed takes the mean
        with self.engine.coalesce_grad_reduction():
            pass
        norm: Float[Tensor, ""] = self.engine.optimizer.scaled_global_norm()
        return norm

    def step(self) -> None:
        """Clips the summed gradients and takes a step."""
        self.engine.step()
