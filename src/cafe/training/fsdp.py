"""A model spread over processes: FSDP2 keeps a part of every weight, gradient and optimizer state in each of them.

A layer's weights are whole only while it reads, and gradients are summed as they are made. Every process must then read
the same layers in the same order, whatever is in its data; `Batches(blanks=True)` and
`JointStep(blank=...)` see to it.
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

from cafe.errors import CafeError
from cafe.utils.distributed import world_size


def uses_fsdp(asked: bool) -> bool:
    """Whether a run of several processes is to be sharded: its recipe asks for it, or `accelerate launch` does.

    Raises:
        CafeError: the launcher is set to an engine that would be wrong here.
    """
    if env_flag("ACCELERATE_USE_MEGATRON_LM"):
        raise CafeError(
            "accelerate is set to Megatron-LM, which wants one loss and one backward pass a step where the gradient "
            "cache makes several: set it to FSDP of version 2 or to DeepSpeed."
        )
    told = env_flag("ACCELERATE_USE_FSDP")
    if told and os.environ.get("FSDP_VERSION") != "2":
        raise CafeError("accelerate is set to FSDP of version 1, which is not supported: set fsdp_version to 2.")
    return told or asked


def env_flag(name: str) -> bool:
    """Whether an environment variable says yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def apply_fsdp(
    reading: nn.Module, device: torch.device, half: torch.dtype | None = None, whole: nn.Module | None = None
) -> None:
    """Spreads a module's parameters over all processes, layer by layer, and moves them to the device.

    Args:
        reading: what holds the model; its parameters are whole within its `forward` and nowhere else.
        device: of this process.
        half: gather layers in bfloat16 or float16, which is half the traffic; gradients are summed in float32 all the
            same. Not on a CPU, whose layer norm takes no such weights beside float32 inputs.
        whole: a part that stays whole in each process, because it is not read equally often: a cached vision tower.
    """
    kept = set(whole.to(device).parameters()) if whole else set()
    mesh = init_device_mesh(device.type, (world_size(),))
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    less = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in list(iter_layers(reading)):
        if kept.isdisjoint(layer.parameters()):
            fully_shard(layer, mesh=mesh, mp_policy=less if half and device.type != "cpu" else exact)
    fully_shard(reading, mesh=mesh, mp_policy=exact, ignored_params=kept)
    for module in reading.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum, not the mean
            module.set_force_sum_reduction_for_comms(True)


def iter_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of each stack in a module: the items of its outermost lists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from iter_layers(child)


@contextmanager
def unsharded(reading: nn.Module) -> Iterator[None]:
    """Within it, the model of a sharded module can be used by itself, by all processes alike."""
    if isinstance(reading, FSDPModule):
        reading.unshard()
    try:
        yield
    finally:
        if isinstance(reading, FSDPModule):
            reading.reshard()


def full_state_dict(lvlm: PreTrainedModel) -> dict[str, Tensor] | None:
    """A sharded model's weights in the main process's memory, nothing in others'; None for a model that is whole.

    All processes must call it.
    """
    tensors = lvlm.state_dict(keep_vars=True)
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        return None
    done: dict[int, Tensor] = {}  # tied weights are one tensor under two names, and stay so
    for tensor in tensors.values():
        if id(tensor) not in done:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            done[id(tensor)] = full.detach().cpu() if dist.get_rank() == 0 else torch.empty(0)
    return {name: done[id(tensor)] for name, tensor in tensors.items()}
