"""The saved state of a run: complete or absent, and checked when it is loaded.

    runs/x/state/step-000200/   .metadata, __0_0.distcp   trained weights and optimizer state, each process's part
                                process-0.pt              what is each process's own: its TrainerState
                                manifest.json             the step, the processes, and a hash of every file

The files are written to a staging directory, which is renamed once they are all on disk. A directory without its
manifest, or with a file whose hash is not the manifest's, is damaged: it is reported, and the previous one is used.
"""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cafe.data.batch import MicroBatchSize
from cafe.errors import CheckpointError, first_line
from cafe.training.loss_scale import LossScale
from cafe.training.optimizer import trainable_parameters
from cafe.training.state_reader import StatePlanner, StateReader
from cafe.utils.atomic import commit
from cafe.utils.distributed import all_gather_object, rank, run_on_main_and_broadcast, world_size
from cafe.utils.nonfinite import find_nonfinite

MANIFEST = "manifest.json"
T = TypeVar("T")


@dataclass
class TrainerState:
    """How far a process has come, besides weights and optimizer state.

    Attributes:
        step: the last step taken; the position in the data and the schedule follow from it.
        num_nonfinite: steps skipped because their loss or gradient was not finite.
        num_bad_records, num_records, num_truncated: of this process, see `Quarantine`.
        micro_batch_size: the measured size of micro-batches, if any; the recipe's holds too.
        best_metric: the best result of an evaluation so far.
        loss_scale: of the next step.
        rng_state: of every random number generator.
    """

    step: int = 0
    num_nonfinite: int = 0
    num_bad_records: int = 0
    num_records: int = 0
    num_truncated: int = 0
    micro_batch_size: MicroBatchSize | None = None
    best_metric: float | None = None
    loss_scale: LossScale = field(default_factory=LossScale)
    rng_state: dict[str, Any] = field(default_factory=dict)


def save(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainerState, save_total_limit: int
) -> None:
    """Save the state of a run in `directory`, and remove all but the last `save_total_limit` there.

    Raises:
        CheckpointError: a weight is not finite, or it cannot be written; what was saved before is left as it is.
    """
    check_finite_weights(module, state.step)
    partial = directory / ".partial"
    reason = _save_in_stages(partial, directory, module, optimizer, state, save_total_limit)
    if not reason:
        return
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    raise CheckpointError(
        f"Step {state.step} could not be saved in {directory} ({reason}). What was saved before is still there: free "
        "some space and run the same command to resume from it."
    )


def check_finite_weights(module: nn.Module, step: int) -> None:
    """Make sure, in all processes alike, that the trained weights are finite: a run cannot recover from others.

    Raises:
        CheckpointError: one is not.
    """
    found = all_gather_object(find_nonfinite(trainable_parameters(module).items()))
    nonfinite = next(filter(None, found), None)
    if nonfinite is not None:
        raise CheckpointError(
            f"The weight {nonfinite} holds values that are not finite at step {step}, which was not saved. What was "
            "saved before is still there: lower the learning rate, and set another output."
        )


def _save_in_stages(
    partial: Path,
    directory: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: TrainerState,
    save_total_limit: int,
) -> str:
    """Save by way of a staging directory; return what went wrong, or nothing.

    Every stage ends alike in all processes, so that none waits for one that failed.
    """
    # First an empty directory, which the main process makes for all.
    _, reason = run_on_main_and_broadcast(lambda: _capture_error(lambda: _make_empty(partial)))
    if reason:
        return reason

    # Then each process's own files.
    digests: dict[str, str] = {}
    for own, reason in all_gather_object(_capture_error(lambda: _write_own_files(partial, module, optimizer, state))):
        if reason:
            return reason
        digests |= own or {}

    # Last the manifest, without which the directory counts as damaged.
    def finish() -> None:
        """Write the manifest, rename the directory, and remove older ones."""
        _check_holds_trained(partial, module)
        manifest = {"step": state.step, "processes": world_size(), "files": digests}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        commit(partial, directory / f"step-{state.step:06d}")
        _remove_old(directory, save_total_limit)

    _, reason = run_on_main_and_broadcast(lambda: _capture_error(finish))
    return reason


def _check_holds_trained(partial: Path, module: nn.Module) -> None:
    """Make sure that the written files hold every weight that is trained.

    Raises:
        CheckpointError: one is missing.
    """
    written = StateReader(partial).read_metadata().state_dict_metadata
    for name in trainable_parameters(module):
        if f"weights.{name}" not in written:
            raise CheckpointError(f"the weight {name}, which is trained, is not in the files")


def _make_empty(directory: Path) -> None:
    """Make a directory, without what an interrupted save left there."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_own_files(
    partial: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainerState
) -> dict[str, str]:
    """Write this process's files and return their hashes by name."""
    with suppress_warnings():
        dcp.save(_state_tensors(module, optimizer), checkpoint_id=partial, no_dist=world_size() == 1)
    torch.save(asdict(state), partial / f"process-{rank()}.pt")
    return {file.name: _digest(file) for file in partial.iterdir() if _writer_rank(file.name) == rank()}


def _remove_old(directory: Path, save_total_limit: int) -> None:
    """Remove all but the last saved states."""
    for old in _saved_states(directory)[max(save_total_limit, 1) :]:
        (old / MANIFEST).unlink(missing_ok=True)  # from here on it is damaged, should removing it be interrupted
        shutil.rmtree(old)


def load(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, report: Callable[[str], None]
) -> TrainerState | None:
    """Load the newest complete state in `directory` into module and optimizer; return None if there is none.

    Raises:
        CheckpointError: it was saved by another number of processes, or with another model.
    """
    saved = run_on_main_and_broadcast(lambda: _newest_complete(directory, report))
    if saved is None:
        return None
    # Each process has its own part of the data, and of the optimizer state under DeepSpeed.
    processes = _read_manifest(saved)["processes"]
    if processes != world_size():
        raise CheckpointError(
            f"{saved} was saved by {processes} processes, which see the data in another order than {world_size()} "
            f"would: start {processes} processes, or set another output."
        )
    try:
        with suppress_warnings():
            _load_tensors(saved, module, optimizer)
    except (CheckpointException, KeyError):
        raise CheckpointError(
            f"{saved} holds other weights than this run trains, as after a change of the base model, of the launcher "
            "(DeepSpeed or not) or of this package: set another output, or remove that directory to start over."
        ) from None
    return _read_trainer_state(saved / f"process-{rank()}.pt")


def _read_trainer_state(file: Path) -> TrainerState:
    """Read how far this process had come.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    try:
        own = torch.load(file, weights_only=True)  # plain values and tensors alone: nothing is executed
        size = own["micro_batch_size"] and MicroBatchSize(**own["micro_batch_size"])
        loss_scale = LossScale(**own["loss_scale"])
        return TrainerState(**{**own, "micro_batch_size": size, "loss_scale": loss_scale})
    except Exception as error:  # whatever the file holds
        raise CheckpointError(
            f"{file} is damaged, or of another version of this package ({first_line(error):.200}): set another output, "
            f"or remove {file.parent} to resume from an earlier state."
        ) from None


# Why not `get_state_dict` and `set_state_dict` of `torch.distributed.checkpoint.state_dict`, with
# `ignore_frozen_params=True`? Tried with PyTorch 2.13: they take an optimizer step with zero gradients to make the
# state of every parameter, so one that no gradient has reached resumes with a step too many (or, if it was saved
# without state, not at all: "Missing optimizer state"); a strict load misses the frozen weights that were left out;
# and under DeepSpeed the optimizer holds flat partitions, which have no name in the module (KeyError).
def _state_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return what training changes, by name. Frozen weights are the base model's and are not saved."""
    # Buffers of a forward pass that are not persistent come back by themselves.
    persistent = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    weights: dict[str, nn.Parameter] = trainable_parameters(module)
    # DeepSpeed's optimizer steps flat partitions in the place of the module's parameters.
    known = set(weights.values())
    for number, parameter in enumerate(_optimizer_parameters(optimizer)):
        if parameter not in known:
            weights[f"{_partition_prefix(rank())}{number}"] = parameter
    # A parameter that no gradient has reached yet has no state.
    state = {name: optimizer.state[weight] for name, weight in weights.items() if weight in optimizer.state}
    return {"weights": {**buffers, **weights}, "optimizer": state}


def _optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters of all groups, in the order by which `Optimizer.load_state_dict` numbers them."""
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _partition_prefix(process: int) -> str:
    """Return the prefix of names of what only one process's optimizer holds, see `DeepSpeedZero`."""
    return f"part-{process}-"


def _load_tensors(saved: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load weights in place, and the optimizer state that was saved."""
    weights = _state_tensors(module, optimizer)["weights"]
    tensors: dict[str, Any] = {f"weights.{name}": weight for name, weight in weights.items()}
    # An optimizer makes its state at its first step, so there is none to load into: make what the files hold.
    entries = _saved_optimizer_entries(saved, weights)
    tensors |= {f"optimizer.{name}.{entry}": empty for (name, entry), empty in entries.items()}
    dcp.load(tensors, storage_reader=StateReader(saved), planner=StatePlanner(), no_dist=world_size() == 1)

    # The weights are loaded in place; the optimizer's state is handed over.
    state: dict[Tensor, dict[str, Any]] = {}
    for name, entry in entries:
        state.setdefault(weights[name], {})[entry] = tensors[f"optimizer.{name}.{entry}"]
    _set_optimizer_state(optimizer, state)


def _set_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[Tensor, dict[str, Any]]) -> None:
    """Set the optimizer's state, given by parameter; the groups keep their options, which the recipe sets."""
    numbered = {}
    for number, parameter in enumerate(_optimizer_parameters(optimizer)):
        if parameter in state:
            numbered[number] = state[parameter]
    optimizer.load_state_dict({"state": numbered, "param_groups": optimizer.state_dict()["param_groups"]})


def _saved_optimizer_entries(saved: Path, weights: dict[str, Tensor]) -> dict[tuple[str, str], Tensor | None]:
    """Return empty tensors for the optimizer state that was saved, by weight and entry; None for what is no tensor."""
    entries: dict[tuple[str, str], Tensor | None] = {}
    others = tuple(_partition_prefix(process) for process in range(world_size()) if process != rank())
    for key, metadata in StateReader(saved).read_metadata().state_dict_metadata.items():
        kind, _, rest = key.partition(".")
        if kind != "optimizer" or rest.startswith(others):
            continue
        # The weight's name has dots itself, the entry's has none.
        name, _, entry = rest.rpartition(".")
        entries[name, entry] = _empty_entry(metadata, weights[name])
    return entries


def _empty_entry(metadata: Any, weight: Tensor) -> Tensor | None:
    """Return a tensor to load an entry of a weight's optimizer state into, or None for an entry that is no tensor."""
    if not isinstance(metadata, TensorStorageMetadata):
        return None
    dtype = metadata.properties.dtype
    if metadata.size and metadata.size == weight.shape:
        # Such as a moment: sharded and placed as the weight is.
        return torch.empty_like(weight, dtype=dtype, requires_grad=False)
    return torch.empty(metadata.size, dtype=dtype)  # such as the step's number


def _saved_states(directory: Path) -> list[Path]:
    """Return the saved states in a directory, newest first."""
    names = [path for path in directory.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(names, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _newest_complete(directory: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest saved state that is not damaged, and report the damaged ones."""
    for saved in _saved_states(directory):
        damage = find_damage(saved)
        if damage is None:
            return saved
        report(f"Skipping damaged checkpoint {saved} ({damage}); resuming from the previous one.")
    return None


def find_damage(saved: Path) -> str | None:
    """Return what is wrong with a saved state, or None if it is as it was written."""
    try:
        files = _read_manifest(saved)["files"]
    except (OSError, ValueError, RecursionError):
        return f"it has no readable {MANIFEST}"
    for name, digest in files.items():
        if Path(name).name != name or not (saved / name).is_file():
            return f"{name} is missing"
        if _digest(saved / name) != digest:
            return f"{name} is not what was written"
    return None


def _read_manifest(saved: Path) -> dict[str, Any]:
    """Read the manifest of a saved state.

    Raises:
        ValueError: it is not what a save writes.
    """
    manifest = json.loads((saved / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(manifest, dict):
        raise ValueError("not a mapping")
    kinds = {"files": dict, "processes": int}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise ValueError(f"no {name}")
    return manifest


def _digest(path: Path) -> str:
    """Return a hash of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _writer_rank(name: str) -> int:
    """Return the rank that wrote a file: `__3_0.distcp` and `process-3.pt` are rank 3's, `.metadata` rank 0's."""
    own = re.match(r"(?:__|process-)(\d+)[_.]", name)
    return int(own[1]) if own else 0


def _capture_error(write: Callable[[], T]) -> tuple[T | None, str]:
    """Return what a function that writes returns, and what went wrong in it, if anything."""
    try:
        return write(), ""
    except (Exception, CheckpointException) as error:  # the latter is a BaseException alone
        cause = _first_cause(error)
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        return None, reason.strip().splitlines()[0]


def _first_cause(error: BaseException) -> BaseException:
    """Follow an error to the one that began it, in the system's own words: each writer wraps it in another."""
    if isinstance(error, CheckpointException):
        # By rank, with a traceback each; the first of them will do.
        error, _ = next(iter(error.failures.values()))
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Suppress PyTorch's warning that a run of one process is not distributed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
