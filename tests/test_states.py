"""What is said of two runs that should have ended alike and did not."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from states import differences, explain, first_differing, held, remember, set_aside, states_of, write
from torch import nn

from cafe.training import checkpointing
from cafe.training.checkpointing import TrainerState
from cafe.utils.rng import get_rng_state


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return module, optimizer


def test_two_states_that_differ_name_the_first_tensor_and_the_first_moment(tmp_path):
    module, optimizer = trained()
    whole = held(module, optimizer, get_rng_state())
    assert first_differing(whole, whole) == []
    broken = {kind: {name: value.clone() for name, value in tensors.items()} for kind, tensors in whole.items()}
    broken["weights"]["1.weight"][0, 1] += 0.5
    broken["weights"]["1.bias"][0] += 2
    del broken["moments"]["1.weight.exp_avg"]
    write(tmp_path / "whole", "2-saved", whole)
    write(tmp_path / "broken", "2-saved", broken)
    write(tmp_path / "broken", "4-saved", broken)  # which the whole run did not
    assert differences(tmp_path / "broken", tmp_path / "whole") == [
        "step 2 as process 0 saved it: 2 of 4 weights, 1.weight first, apart by at most 0.5; "
        "1 of 12 moments, 1.weight.exp_avg first, which only the whole run has"
    ]


def test_what_a_process_saves_and_loads_is_remembered_and_outlives_the_run(tmp_path, monkeypatch):
    for name in ("save", "load"):
        monkeypatch.setattr(checkpointing, name, getattr(checkpointing, name))  # and back again
    run = tmp_path / "run"
    remember(states_of(run))
    module, optimizer = trained()
    checkpointing.save(run / "state", module, optimizer, TrainerState(step=3, rng_state=get_rng_state()), 1)
    with torch.no_grad():
        module[0].weight.zero_()
    assert checkpointing.load(run / "state", module, optimizer, pytest.fail).step == 3
    set_aside(run)
    shutil.rmtree(run / "state")
    said = explain(run, run)
    place = Path(re.search("kept in (.*).\n", said)[1])
    assert said.splitlines()[1:] == [f"step 3 as process 0 {done} it: the same" for done in ("loaded", "saved")]
    assert (place / "run-state" / "step-000003" / "manifest.json").is_file()
    assert tmp_path not in place.parents and (place / "run-states" / "3-loaded-0.pt").is_file()
    shutil.rmtree(place)
