"""Attention over trees in a model sharded over two processes (FSDP2 over gloo, on the CPU), in every family."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES
from processes import launched, run_processes
from torch import Tensor
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from tree_samples import SHARING, checked_kernel, make_pack

import cafe.attention.paths
import cafe.attention.tree
from cafe.packing import PackedBatch
from cafe.training.compile import compile_layers
from cafe.training.fsdp import apply_fsdp
from cafe.training.optimizer import enable_gradient_checkpointing
from cafe.training.step import PackedForward

TEXTS = [["what is it?", "why?"], ["where?", "a longer question?", "who?"]]  # of each process
KERNELS = ["blocks", "paths"]
ALL_AT_ONCE = "llava_onevision"  # with gradient checkpointing and compiled layers too


def gradient_of(packed_forward: PackedForward, packs: list[PackedBatch]) -> Tensor:
    """Return the gradient of the sum of the packs' losses, whole."""
    packed_forward.zero_grad()
    for packed in packs:
        embeddings, loss = packed_forward(packed)
        (embeddings.square().sum() + loss).backward()
    grads = []
    for _, parameter in sorted(packed_forward.named_parameters()):
        grad = torch.zeros(parameter.shape) if parameter.grad is None else parameter.grad
        grads.append((grad.full_tensor() if isinstance(grad, DTensor) else grad).flatten().double())
    return torch.cat(grads)


def shard_each_family(results: Path, environment: dict[str, str], error_file: Path) -> None:
    """Compare the gradients of each family before and after it is sharded; write how far apart they are."""
    with launched(environment, error_file):
        cafe.attention.paths.causal_attention = checked_kernel
        dist.init_process_group("gloo")
        apart = {}
        for family in SHARING:
            try:
                model = FAMILIES[family]()
            except ImportError:
                continue
            packed_forward = PackedForward(model.lvlm.double().train())
            whole = gradient_of(packed_forward, [make_pack(model, "mask", *texts) for texts in TEXTS])
            assert whole.any()
            apply_fsdp(packed_forward, torch.device("cpu"))
            assert all(isinstance(parameter, DTensor) for parameter in model.lvlm.parameters())
            own = {kernel: [make_pack(model, kernel, *TEXTS[dist.get_rank()])] for kernel in KERNELS}
            for kernel in KERNELS:
                apart[f"{family} {kernel}"] = distance(gradient_of(packed_forward, own[kernel]), whole)
            if family != ALL_AT_ONCE:
                continue
            enable_gradient_checkpointing(model.lvlm)
            compile_layers(model.lvlm)
            for kernel in KERNELS:
                apart[f"{family} {kernel} compiled"] = distance(gradient_of(packed_forward, own[kernel]), whole)
            assert counters["stats"]["unique_graphs"] > 0
        if dist.get_rank() == 0:
            results.write_text(json.dumps(apart))
        dist.destroy_process_group()


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return how far two gradients are apart, relative to their norm."""
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fsdp")
    error_files = [directory / f"{number}.txt" for number in range(2)]
    error = run_processes(shard_each_family, (directory / "results.json",), {}, error_files)
    assert not error, error
    return json.loads((directory / "results.json").read_text())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", SHARING)
def test_a_sharded_model_has_the_gradient_of_a_whole_one_by_every_kernel(apart, family, kernel):
    if f"{family} {kernel}" not in apart:
        pytest.skip(f"This version of transformers has no {family}.")
    assert apart[f"{family} {kernel}"] <= 1e-5  # some families have norms in float32


@pytest.mark.parametrize("kernel", KERNELS)
def test_so_does_one_with_gradient_checkpointing_and_compiled_layers(apart, kernel):
    assert apart[f"{ALL_AT_ONCE} {kernel} compiled"] <= 1e-5
