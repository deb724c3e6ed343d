"""DeepSpeed in two real processes takes the optimizer's own steps, and each process holds half of its state."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cafe.training.deepspeed import DeepSpeedZero

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'cafe-lvlm[deepspeed]'")

GRADIENTS = [[1.0, None], [torch.nan, 2.0], [-3.0, 4.0]]  # of a step: one process's, and the other's
CLIP = 30.0


def weights() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (7,), (2, 2))]
    groups = [{"params": made[:2], "lr": 0.1}, {"params": made[2:], "lr": 0.01, "weight_decay": 0.5}]
    return made, torch.optim.AdamW(groups, eps=1e-2)


def process(rank: int, meeting: str, file: Path) -> None:
    """Take the steps, and skip those that are not finite as the loop does."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    trained, optimizer = weights()
    zero = DeepSpeedZero(trained, optimizer, CLIP)
    norms = []
    for gradients in GRADIENTS:
        for parameter in trained:
            if (gradient := gradients[rank]) is not None:
                parameter.grad = torch.full_like(parameter, gradient)
        norms.append(zero.sum_gradients())
        if norms[-1].isfinite():
            zero.step()
        optimizer.zero_grad()
    held = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    torch.save(([weight.detach().clone() for weight in trained], torch.stack(norms), held), file)


def test_deepspeed_steps_are_the_optimizers_own_and_skipped_ones_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    spawn = multiprocessing.get_context("spawn")
    files = [tmp_path / f"{rank}.pt" for rank in range(2)]
    running = [spawn.Process(target=process, args=(rank, tmp_path / "meet", file)) for rank, file in enumerate(files)]
    for one in running:
        one.start()
    for one in running:
        one.join()
    trained, optimizer = weights()
    norms = []
    for gradients in GRADIENTS:
        for parameter in trained:
            parameter.grad = torch.full_like(parameter, sum(gradient or 0.0 for gradient in gradients))
        norms.append(nn.utils.clip_grad_norm_(trained, CLIP))
        if norms[-1].isfinite():
            optimizer.step()
    for file in files:
        got, its_norms, held = torch.load(file)
        assert held == 14  # of 26, divided evenly and in groups
        torch.testing.assert_close(got, [weight.detach() for weight in trained], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(its_norms, torch.stack(norms).nan_to_num(torch.inf), rtol=1e-6, atol=0)
