"""The memory that a process can take: what its machine has, or what its control group leaves it."""

from pathlib import Path

import psutil
import pytest

from cafe.utils import memory
from cafe.utils.memory import available_memory

GIB = 2**30


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this process's control group."""
    folder = tmp_path / "system.slice" / "cafe.service"
    folder.mkdir(parents=True)
    own = tmp_path / "own"
    own.write_text("1:name=other:/elsewhere\n0::/system.slice/cafe.service\n")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", own)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 64 * GIB}))
    return folder


def write(cgroup: Path, limit: str, used: int, cached: int) -> None:
    (cgroup / "memory.max").write_text(f"{limit}\n")
    (cgroup / "memory.current").write_text(f"{used}\n")
    (cgroup / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")


def test_a_limit_counts_without_the_files_that_are_kept(cgroup):
    write(cgroup, str(8 * GIB), 6 * GIB, cached=GIB)
    assert available_memory() == 3 * GIB


def test_a_group_that_is_over_its_limit_has_nothing(cgroup):
    write(cgroup, str(GIB), 2 * GIB, cached=0)
    assert available_memory() == 0


def test_without_a_limit_it_is_the_machines(cgroup):
    assert available_memory() == 64 * GIB
    write(cgroup, "max", GIB, cached=0)
    assert available_memory() == 64 * GIB
    write(cgroup, str(128 * GIB), GIB, cached=0)
    assert available_memory() == 64 * GIB
    memory.OWN_CGROUP.write_text("4:memory:/version/one\n")
    assert available_memory() == 64 * GIB
