"""DeepSpeed, if `accelerate launch` asks for it: each process keeps and updates a part of the optimizer state (ZeRO).

A step makes as many backward passes as it needs, and PyTorch accumulates their gradients in the parameters, whole in
each process. DeepSpeed runs once per step, after the last backward pass: it reduces and clips the gradients, lets each
process update its part of the weights, and broadcasts the new weights.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from accelerate.utils import DeepSpeedPlugin
from jaxtyping import Float
from torch import Tensor, nn

from cafe.errors import MissingPackageError, RecipeError
from cafe.training.fsdp import env_flag
from cafe.training.recipe import Recipe
from cafe.utils.distributed import BUCKET_NUMEL, world_size


def uses_deepspeed(recipe: Recipe) -> bool:
    """Return whether `accelerate launch` asks for DeepSpeed.

    Raises:
        RecipeError: its settings do not go with the joint step, or with the recipe.
        MissingPackageError: it is not installed.
    """
    if not env_flag("ACCELERATE_USE_DEEPSPEED"):
        return False
    # Reads the settings that `accelerate launch` left in the environment.
    plugin = DeepSpeedPlugin()
    offload = {plugin.offload_optimizer_device, plugin.offload_param_device} - {"none"}
    if plugin.zero_stage not in (1, 2) or offload:
        setting = f"stage {plugin.zero_stage}, offloaded" if offload else f"stage {plugin.zero_stage}"
        raise RecipeError(
            f"accelerate is set to DeepSpeed's ZeRO of {setting}: stages 1 and 2 without offloading are supported; "
            "model.shard without DeepSpeed shards what stage 3 does."
        )
    if recipe.model.shard or recipe.optimizer.name != "adamw":
        raise RecipeError("accelerate is set to DeepSpeed, which needs model.shard: false and optimizer.name: adamw.")
    if not find_spec("deepspeed"):
        raise MissingPackageError(
            "accelerate is set to DeepSpeed, which is not installed: pip install 'cafe-lvlm[deepspeed]'."
        )
    return True


class DeepSpeedZero:
    """Reduces and clips gradients and steps the optimizer, by DeepSpeed's engine.

    Args:
        trained: the trained parameters.
        optimizer: over them; from now on it holds this process's part of each of its groups, as one flat tensor.
        max_grad_norm: the norm to clip the gradient to.
    """

    def __init__(self, trained: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        import deepspeed  # an optional dependency

        # Stage 1 for stage 2 as well: gradients are whole until the last backward pass either way.
        zero = {"stage": 1, "contiguous_gradients": False, "overlap_comm": False, "reduce_bucket_size": BUCKET_NUMEL}
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": max_grad_norm, "zero_optimization": zero}
        self.trained = trained
        self.engine = deepspeed.initialize(model=nn.ParameterList(trained), optimizer=optimizer, config=config)[0]

    def sum_gradients(self, loss_scale: float = 1.0) -> Float[Tensor, ""]:
        """Divide out the loss scale and sum the gradients, each process its part; return their total norm."""
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # another process may have one
            parameter.grad *= world_size() / loss_scale  # DeepSpeed takes the mean
        # The reduction happens at the end of the context; the backward passes are over.
        with self.engine.coalesce_grad_reduction():
            pass
        norm: Float[Tensor, ""] = self.engine.optimizer.scaled_global_norm()
        return norm

    def step(self) -> None:
        """Clip the summed gradients and take a step."""
        self.engine.step()
