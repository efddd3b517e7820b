"""Fixtures for all tests."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.golden_files import Golden


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
