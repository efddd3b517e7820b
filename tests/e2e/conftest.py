"""What a failing test shows: the last lines of every program of the fabrics that run."""

from collections.abc import Iterator

import pytest

from lab.fabric import Fabric

_SHOWN = pytest.StashKey[list[Fabric]]()


@pytest.fixture(scope="session")
def show_logs_of(request: pytest.FixtureRequest) -> list[Fabric]:
    """Put a fabric in, and its logs appear in the reports of tests that fail while it is there."""
    return request.config.stash.setdefault(_SHOWN, [])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: pytest.TestReport = yield  # type: ignore[assignment]  # pluggy sends the result in
    if report.failed:
        there = [fabric for fabric in item.config.stash.get(_SHOWN, []) if fabric.directory.exists()]
        for fabric in there:
            report.sections.extend((f"last lines of {process.log}", process.tail(40)) for process in fabric.processes())
    return report  # type: ignore[return-value]  # and takes it back
