"""What each process of a run held whenever it saved or loaded its state, and where two runs' first differ."""

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cafe.training import checkpointing
from cafe.utils.distributed import rank

Held = dict[str, dict[str, Tensor]]
"""A process's weights, optimizer moments and random numbers, each by name."""


def remember(directory: Path) -> None:
    """From here on, this process writes into `directory` what it holds before every save and after every load."""
    save, load = checkpointing.save, checkpointing.load

    def saving(state: Path, module: nn.Module, optimizer: torch.optim.Optimizer, at: Any, *rest: Any) -> None:
        write(directory, f"{at.step}-saved", held(module, optimizer, at.rng_state))
        save(state, module, optimizer, at, *rest)

    def loading(state: Path, module: nn.Module, optimizer: torch.optim.Optimizer, report: Callable[[str], None]) -> Any:
        at = load(state, module, optimizer, report)
        if at:
            write(directory, f"{at.step}-loaded", held(module, optimizer, at.rng_state))
        return at

    checkpointing.save, checkpointing.load = saving, loading


def held(module: nn.Module, optimizer: torch.optim.Optimizer, generators: dict[str, Any]) -> Held:
    """This process's own part of everything."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    stepped = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {}
    for at, weight in enumerate(stepped):
        for entry, value in optimizer.state.get(weight, {}).items():
            if isinstance(value, Tensor):
                moments[f"{names.get(weight, at)}.{entry}"] = own(value)  # DeepSpeed's parts have no name
    numbers = {"torch": generators["torch"]} if generators else {}
    return {"weights": {name: own(value) for name, value in module.state_dict().items()}, "moments": moments} | {
        "random numbers": numbers
    }


def own(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that lies here."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def write(directory: Path, when: str, what: Held) -> None:
    """Complete or absent, for the process may be killed."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f"{when}-{rank()}.partial"
    torch.save(what, partial)
    partial.rename(partial.with_suffix(".pt"))


def differences(broken: Path, whole: Path) -> list[str]:
    """A line for each time that a process of the broken run saved or loaded: what differs from the whole run's save."""
    lines = []
    for file in sorted(broken.glob("*.pt"), key=lambda file: [int(part) for part in re.findall(r"\d+", file.name)]):
        step, when, process = file.stem.split("-")
        other = whole / f"{step}-saved-{process}.pt"
        if other.exists():
            apart = first_differing(torch.load(file), torch.load(other))
            lines.append(f"step {step} as process {process} {when} it: {'; '.join(apart) or 'the same'}")
    return lines


def first_differing(one: Held, other: Held) -> list[str]:
    """Of each kind the first tensor that is not the same in both, and how far it is apart at most."""
    found = []
    for kind in one:
        names = [*one[kind], *(name for name in other[kind] if name not in one[kind])]
        wrong = [name for name in names if not same(one[kind].get(name), other[kind].get(name))]
        if wrong:
            far = apart(one[kind].get(wrong[0]), other[kind].get(wrong[0]))
            found.append(f"{len(wrong)} of {len(names)} {kind}, {wrong[0]} first, {far}")
    return found


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are both there and have the same numbers."""
    return one is not None and other is not None and torch.equal(one, other)


def apart(one: Tensor | None, other: Tensor | None) -> str:
    """How far two tensors are apart."""
    if one is None or other is None:
        return "which only the whole run has" if one is None else "which only the broken run has"
    if one.shape != other.shape:
        return f"{tuple(one.shape)} and {tuple(other.shape)}"
    return f"apart by at most {(one.double() - other.double()).abs().max().item():.2g}"


def states_of(output: Path) -> Path:
    """Where what a run's processes held is remembered."""
    return output.with_name(f"{output.name}-states")


def set_aside(output: Path) -> None:
    """Copies the state of a killed run, which is removed at its end."""
    shutil.copytree(output / "state", output.with_name(f"{output.name}-state"), dirs_exist_ok=True)


def explain(broken: Path, whole: Path) -> str:
    """In what the states of two runs that ended otherwise differ, and where all that is known of them is kept."""
    place = Path(tempfile.mkdtemp(prefix="cafe-resumed-"))  # outlives the test
    for path in {path for output in (broken, whole) for path in output.parent.glob(f"{output.name}*")}:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, place / path.name)
    lines = differences(states_of(broken), states_of(whole))
    return "\n".join([f"{broken} ended otherwise than {whole}; their states are kept in {place}.", *lines])
