"""The two sites."""

from collections.abc import AsyncIterator

import pytest_asyncio

from lab.fabric import Fabric
from tests.e2e.two_sites import TwoSites, two_sites


@pytest_asyncio.fixture(scope="package", loop_scope="package")
async def shared_sites(show_logs_of: list[Fabric]) -> AsyncIterator[TwoSites]:
    async with two_sites(show_logs_of) as sites:
        yield sites
