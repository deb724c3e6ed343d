"""A short form of `make fuzz`, and every case that once was a finding."""

from collections.abc import Iterator

import fuzzing
import pytest

NUM_CASES = 4  # of each target


@pytest.fixture(scope="module")
def targets(tmp_path_factory) -> Iterator[dict[str, fuzzing.Target]]:
    yield fuzzing.make_targets(tmp_path_factory.mktemp("scenes"))


@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged images
def test_damaged_files_end_in_nothing_but_a_cafe_error(targets):
    findings = []
    for name, target in targets.items():
        findings += [fuzzing.run_case(target, name, number) for number in range(NUM_CASES)]
    assert not list(filter(None, findings))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", fuzzing.CASES.read_text().splitlines())
def test_what_was_found_once_is_not_found_again(targets, case):
    name, _, number = case.rpartition(":")
    assert fuzzing.run_case(targets[name], name, int(number)) is None


def test_undamaged_files_are_read(targets):
    """Or damage would go unseen: a target that fails on good files fails on all of them, with the same sentence."""
    for target in targets.values():
        target.read(target.folder)


def test_a_finding_is_reported():
    def read(folder):
        raise KeyError((folder / "a.json").read_bytes())

    target = fuzzing.Target({"a.json": b'{"a": 1}'}, ("a.json",), read)
    assert "KeyError" in fuzzing.run_case(target, "name", 0)
