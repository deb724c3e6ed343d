"""Where a run stands, on disk: complete or absent, and checked when it is read.

    runs/x/state/step-000200/   .metadata, __0_0.distcp   trained weights and optimizer state, each process its part
                                process-0.pt              what is each process's own: its Position
                                manifest.json             the step, the processes, and a hash of every file

The files are written to a directory aside, which is renamed once they are all on the disk. A directory without its
manifest, or with a file whose hash is not the manifest's, is damaged: it is named, and the one before it is used.
"""

import errno
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from cafe.data.batch import MicroBatchSize
from cafe.errors import CafeError
from cafe.training.loss_scale import LossScale
from cafe.utils.atomic import commit
from cafe.utils.distributed import all_gather_object, rank, run_on_main_and_broadcast, world_size

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")


@dataclass
class TrainerState:
    """How far a process has come, beside weights and optimizer state.

    Attributes:
        step: the last step taken; the data's position and the schedule follow from it.
        num_nonfinite: steps left out because their loss or gradient was not finite.
        num_bad_records, num_records: of this process's records, see `Quarantine`.
        micro_batch_size: of micro-batches, where it was found by measurement; the recipe's holds as well.
        best_metric: the best result of an evaluation so far.
        loss_scale: of the next step's loss.
        rng_state: the state of every random number generator.
    """

    step: int = 0
    num_nonfinite: int = 0
    num_bad_records: int = 0
    num_records: int = 0
    micro_batch_size: MicroBatchSize | None = None
    best_metric: float | None = None
    loss_scale: LossScale = field(default_factory=LossScale)
    rng_state: dict[str, Any] = field(default_factory=dict)


def save(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, position: TrainerState, keep: int
) -> None:
    """Writes the state of a run into `directory`, and removes all but the last `keep` that are there.

    Raises:
        CafeError: it cannot be written; what was there before is left as it is.
    """
    partial = directory / ".partial"

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write() -> dict[str, str]:
        with suppress_warnings():
            dcp.save(_tensors(module, optimizer), checkpoint_id=partial, no_dist=world_size() == 1)
        torch.save(asdict(position), partial / f"process-{rank()}.pt")
        return {file.name: _digest(file) for file in partial.iterdir() if _writer_rank(file.name) == rank()}

    def finish() -> None:
        files = {name: digest for own, _ in written for name, digest in (own or {}).items()}
        manifest = {"step": position.step, "processes": world_size(), "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        commit(partial, directory / f"step-{position.step:06d}")
        for old in _saved(directory)[max(keep, 1) :]:
            (old / MANIFEST).unlink(missing_ok=True)  # from here on it is no checkpoint
            shutil.rmtree(old)

    # Each stage ends for all processes alike: none is left waiting for one that failed.
    failed = run_on_main_and_broadcast(lambda: _capture_error(begin))[1]
    if not failed:
        written = all_gather_object(_capture_error(write))
        failed = next(filter(None, (reason for _, reason in written)), "")
    if not failed:
        failed = run_on_main_and_broadcast(lambda: _capture_error(finish))[1]
    if failed:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise CafeError(
            f"Step {position.step} could not be saved in {directory} ({failed}); what was saved before is still there: "
            "make room, and the same command goes on from it."
        )


def load(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, report: Callable[[str], None]
) -> TrainerState | None:
    """Puts the newest complete state in `directory` into module and optimizer; None if there is none.

    Raises:
        CafeError: it was saved by another number of processes, or of another model.
    """
    found = run_on_main_and_broadcast(lambda: _newest(directory, report))
    if found is None:
        return None
    processes = json.loads((found / MANIFEST).read_text())["processes"]
    if processes != world_size():
        raise CafeError(
            f"{found} was saved by {processes} processes, which read the data in another order than {world_size()} would: "
            f"start {processes}, or give another output."
        )
    try:
        with suppress_warnings():
            _read(found, module, optimizer)
    except (CheckpointException, KeyError):
        raise CafeError(
            f"{found} holds other weights than this run trains, as after a change of the base model, of the launcher "
            "(DeepSpeed or not) or of this package: give another output, or remove that directory to start anew."
        ) from None
    own = torch.load(found / f"process-{rank()}.pt")
    size = own["micro_batch_size"] and MicroBatchSize(**own["micro_batch_size"])
    scale = LossScale(**own["loss_scale"])
    return TrainerState(**{**own, "micro_batch_size": size, "loss_scale": scale})


def _tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What training changes, by name. A weight that is frozen comes from the base model again."""
    kept = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in kept}
    weights = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    known, stepped = set(weights.values()), [weight for group in optimizer.param_groups for weight in group["params"]]
    weights |= {f"{_part(rank())}{at}": weight for at, weight in enumerate(stepped) if weight not in known}
    state = {name: optimizer.state[weight] for name, weight in weights.items() if weight in optimizer.state}
    return {"weights": {**buffers, **weights}, "optimizer": state}


def _part(process: int) -> str:
    """How the name begins of what only one process's optimizer holds, see `Zero`."""
    return f"part-{process}-"


def _read(found: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights = _tensors(module, optimizer)["weights"]
    wanted: dict[str, Any] = {f"weights.{name}": weight for name, weight in weights.items()}
    # An optimizer makes its state at its first step: here, what the files hold of it, as large as it was.
    entries: dict[str, tuple[str, str]] = {}
    others = tuple(_part(process) for process in range(world_size()) if process != rank())
    for key, saved in dcp.FileSystemReader(found).read_metadata().state_dict_metadata.items():
        part, _, rest = key.partition(".")
        if part == "optimizer" and not rest.startswith(others):
            name, _, entry = rest.rpartition(".")
            entries[key] = (name, entry)
            if not isinstance(saved, TensorStorageMetadata):
                wanted[key] = None
            elif saved.size and saved.size == weights[name].shape:
                wanted[key] = torch.empty_like(weights[name], dtype=saved.properties.dtype, requires_grad=False)
            else:
                wanted[key] = torch.empty(saved.size, dtype=saved.properties.dtype)
    dcp.load(wanted, checkpoint_id=found, no_dist=world_size() == 1)
    state: dict[Tensor, dict[str, Any]] = {}
    for key, (name, entry) in entries.items():
        state.setdefault(weights[name], {})[entry] = wanted[key]
    order = [weight for group in optimizer.param_groups for weight in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    numbered = {number: state[weight] for number, weight in enumerate(order) if weight in state}
    optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _saved(directory: Path) -> list[Path]:
    return sorted(directory.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _newest(directory: Path, report: Callable[[str], None]) -> Path | None:
    for saved in _saved(directory):
        wrong = find_damage(saved)
        if wrong is None:
            return saved
        report(f"{saved} is damaged ({wrong}) and is not used: the run goes on from before it.")
    return None


def find_damage(saved: Path) -> str | None:
    """What is wrong with a saved state; None if it is as it was written."""
    try:
        files = json.loads((saved / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return f"it has no readable {MANIFEST}"
    for name, digest in files.items():
        if not (saved / name).is_file():
            return f"{name} is missing"
        if _digest(saved / name) != digest:
            return f"{name} is not what was written"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "blake2b").hexdigest()


def _writer_rank(name: str) -> int:
    """The process that wrote a file: `__3_0.distcp` and `process-3.pt` are the fourth's."""
    digits = name.replace("process-", "__").removeprefix("__").partition("_")[0].partition(".")[0]
    return int(digits) if digits.isdigit() else 0


def _capture_error(work: Callable[[], T]) -> tuple[T | None, str]:
    """What some writing returns, and what was wrong: the system's own words, which a writer's error may hide."""
    try:
        return work(), ""
    except (Exception, CheckpointException) as failure:  # whatever a full disk makes of each writer
        error: BaseException = failure
        if isinstance(failure, CheckpointException):
            error = next(iter(failure.failures.values()))[0]
        while error.__cause__ or error.__context__:
            error = error.__cause__ or error.__context__ or error
        return None, (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().splitlines()[0]


@contextmanager
def disk_full_errors(output: Path) -> Iterator[None]:
    """Makes one sentence of an error that a full disk raises anywhere, and removes what was half written."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if not full and not any(f"os error {number}" in str(error) for number in FULL):
            raise
        for partial in output.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        raise CafeError(
            f"{output} cannot be written to ({error}): make room, and the same command goes on from the last saved "
            "state."
        ) from None


@contextmanager
def suppress_warnings() -> Iterator[None]:
    """Without torch's warning that a run of one process is not distributed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
