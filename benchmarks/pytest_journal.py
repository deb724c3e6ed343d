"""A plugin of pytest that writes the outcome of each test as it ends: `pytest -p pytest_journal --json FILE`."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--json", type=Path, help="write the outcome of each test to this file as it ends")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Register what writes outcomes."""
    if path := session.config.getoption("--json"):
        session.config.pluginmanager.register(OutcomeWriter(path))


class OutcomeWriter:
    """Writes a row for each test.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        from journal import Journal  # imports cafe, which must come after the tests' import hooks

        self.journal = Journal(path)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the outcome of a test, or of its set-up where that is all there is."""
        if report.when == "call" or report.outcome != "passed":
            row = {"figure": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
            if report.failed:
                row["failed"] = report.longreprtext.strip().splitlines()[-1][:300]
            self.journal.add(row)
