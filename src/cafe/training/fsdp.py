"""A model sharded over processes: with FSDP2 each keeps a part of every weight, gradient and optimizer state.

A layer's weights are whole only while it runs, and gradients are summed in the backward pass. Every process must
therefore run the same layers in the same order, whatever its data: `ContrastiveBatchDataset(blanks=True)` and
`JointStep(blank_micro_batch=...)` see to that.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cafe.errors import RecipeError
from cafe.utils.distributed import world_size


def uses_fsdp(shard: bool) -> bool:
    """Return whether to shard a run of several processes: the recipe's `shard` or `accelerate launch` asks for it.

    Raises:
        RecipeError: the launcher is set to an engine that would give wrong results here.
    """
    if env_flag("ACCELERATE_USE_MEGATRON_LM"):
        raise RecipeError(
            "accelerate is set to Megatron-LM, which needs one loss and one backward pass per step, where the gradient "
            "cache makes several: use FSDP version 2 or DeepSpeed."
        )
    launcher_asks = env_flag("ACCELERATE_USE_FSDP")
    if launcher_asks and os.environ.get("FSDP_VERSION") != "2":
        raise RecipeError("accelerate is set to FSDP version 1, which is not supported: set fsdp_version to 2.")
    return launcher_asks or shard


def env_flag(name: str) -> bool:
    """Return whether an environment variable is set to a true value."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def apply_fsdp(
    module: nn.Module, device: torch.device, dtype: torch.dtype | None = None, whole: nn.Module | None = None
) -> None:
    """Shard a module's parameters over all processes, layer by layer, and move them to the device.

    Args:
        module: holds the model; its parameters are whole within its `forward` and nowhere else.
        device: of this process.
        dtype: gather layers in bfloat16 or float16, which halves the traffic; gradients are summed in float32
            regardless. Ignored on a CPU, whose layer norm takes no such weights with float32 inputs.
        whole: a part that stays whole in each process, because it runs less often than others: a cached vision tower.
    """
    ignored = set(whole.to(device).parameters()) if whole else set()
    mesh = init_device_mesh(device.type, (world_size(),))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    layer_policy = exact
    if dtype and device.type != "cpu":
        layer_policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in list(iter_layers(module)):
        if ignored.isdisjoint(layer.parameters()):
            fully_shard(layer, mesh=mesh, mp_policy=layer_policy)
    # What no layer holds (embeddings, norms, the head) is gathered for the whole forward.
    fully_shard(module, mesh=mesh, mp_policy=exact, ignored_params=ignored)
    # Losses are scaled so that the sum of the processes' gradients is the gradient, not their mean.
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.set_gradient_divide_factor(1.0)
            submodule.set_force_sum_reduction_for_comms(True)


def iter_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Iterate over the layers of each stack in a module: the items of its outermost lists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from iter_layers(child)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Gather the outermost weights of a sharded module within the context, which all processes must enter."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def full_state_dict(lvlm: PreTrainedModel) -> dict[str, Tensor] | None:
    """Gather a sharded model's weights in the main process's memory; return None for a model that is not sharded.

    All processes must call it; the tensors of the others are empty.
    """
    tensors = lvlm.state_dict(keep_vars=True)  # the parameters themselves, whose ids tell which are tied
    is_sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    if not is_sharded:
        return None
    gathered: dict[int, Tensor] = {}  # by id: tied weights are one tensor with two names, and stay so
    for tensor in tensors.values():
        if id(tensor) in gathered:
            continue
        gathered[id(tensor)] = _gather_on_main(tensor)
    return {name: gathered[id(tensor)] for name, tensor in tensors.items()}


def _gather_on_main(tensor: Tensor) -> Tensor:
    """Gather a tensor in all processes, and keep it in the main one's memory alone: a GPU may not hold them all."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    if dist.get_rank() != 0:
        return torch.empty(0)
    return tensor.detach().cpu()
