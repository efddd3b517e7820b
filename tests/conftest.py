"""Fixtures for all tests."""

import asyncio
from collections.abc import Iterator

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.golden_files import Golden


class TwoStreams(LoadScopeScheduling):  # type: ignore[misc]  # without types
    """With `-n 2` one worker runs what is end to end, which mostly waits, and the other one all else. Two fabrics at once would be too much."""

    def _split_scope(self, nodeid: str) -> str:
        return "end to end" if nodeid.startswith("tests/e2e/") else "all else"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> TwoStreams:
    return TwoStreams(config, log)


def pytest_configure() -> None:
    """Plugins ask for the current event loop around tests that have none; asyncio would make one then, which nobody closes."""
    asyncio.set_event_loop(None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files instead of comparing with them")


@pytest.fixture(scope="session")
def golden(request: pytest.FixtureRequest) -> Iterator[Golden]:
    golden = Golden(update=request.config.getoption("--update-golden"))
    yield golden
    golden.check_for_stale_files()
