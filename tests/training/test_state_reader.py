"""A saved state is data: nothing that its files hold is run, whatever pickles stand in them."""

import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from cafe.errors import CheckpointError
from cafe.training.state_reader import INDEX, StatePlanner, StateReader


class Runs:
    """What a pickle can do: write a file when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.mark), "w")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A state of tensors of several dtypes, and a value that is none."""
    state = {"a": torch.arange(3.0), "b": {"c": torch.ones(2, 2, dtype=torch.bfloat16), "step": 7}}
    dcp.save(state, checkpoint_id=tmp_path / "state", no_dist=True)
    return tmp_path / "state"


def load(saved: Path) -> dict:
    state = {"a": torch.zeros(3), "b": {"c": torch.zeros(2, 2, dtype=torch.bfloat16), "step": 0}}
    dcp.load(state, storage_reader=StateReader(saved), planner=StatePlanner(), no_dist=True)
    return state


@pytest.mark.filterwarnings("ignore")
def test_a_state_is_read_as_pytorch_reads_it(saved):
    state = load(saved)
    assert state["a"].tolist() == [0, 1, 2] and state["b"]["step"] == 7
    assert torch.equal(state["b"]["c"], torch.ones(2, 2, dtype=torch.bfloat16))


@pytest.mark.filterwarnings("ignore")
def test_an_index_that_would_run_code_is_refused(saved, tmp_path):
    mark = tmp_path / "was-run"
    index = pickle.loads((saved / INDEX).read_bytes())
    index.planner_data = Runs(mark)
    (saved / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match=r"names .*open, which describes no tensor"):
        StateReader(saved).read_metadata()
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_a_value_that_would_run_code_is_not_loaded(saved, tmp_path):
    mark = tmp_path / "was-run"
    # The hostile bytes take the place of the value in the data file, and the index says where they are.
    hostile = io.BytesIO()
    torch.save(Runs(mark), hostile)
    index = pickle.loads((saved / INDEX).read_bytes())
    [(key, place)] = [(k, v) for k, v in index.storage_data.items() if k.fqn == "b.step"]
    assert isinstance(index.state_dict_metadata["b.step"], BytesStorageMetadata)
    file = saved / place.relative_path
    place.offset, place.length = file.stat().st_size, len(hostile.getvalue())
    with file.open("ab") as out:
        out.write(hostile.getvalue())
    (saved / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(dcp.api.CheckpointException, match="no plain value"):
        load(saved)
    assert not mark.exists() and key.fqn == "b.step"


def test_a_damaged_index_ends_in_a_sentence(saved):
    (saved / INDEX).write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        StateReader(saved).read_metadata()
