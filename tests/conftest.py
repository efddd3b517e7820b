"""Fixtures for all tests."""

import asyncio
from collections.abc import Iterator
from zlib import crc32

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from tests.golden_files import Golden

settings.register_profile("untimed", settings.default, deadline=None)  # others may have the processor
settings.load_profile("untimed")


class Streams(LoadScopeScheduling):  # type: ignore[misc]  # without types
    """With `-n 3` two workers run what is end to end, which mostly waits, and one all else. More fabrics at once would be too much."""

    def _split_scope(self, nodeid: str) -> str:
        if not nodeid.startswith("tests/e2e/"):
            return "all else"
        shares_a_fabric = nodeid.startswith("tests/e2e/features/")
        scope = "features" if shares_a_fabric else nodeid.partition("::")[0]
        return f"end to end {crc32(scope.encode()) % 2}"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Streams:
    return Streams(config, log)


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
