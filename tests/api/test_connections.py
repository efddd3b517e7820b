"""No request holds a connection to the database while it waits for another one: many at once would wait for each other."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from controlplane.store.session import Database
from tests.api.test_objects import CHECKS, check, put
from tests.backend import Postgres

AT_ONCE = 25


@pytest.fixture
async def database(postgres: Postgres) -> AsyncIterator[Database]:
    """Fewer connections than requests."""
    database = Database(postgres.app_url, connections=4)
    yield database
    await database.close()


@pytest.mark.parametrize(
    "path",
    [
        *(f"{CHECKS}/alive?response_format={number}" for number in (0, 3)),
        f"{CHECKS}/alive/status",
        "/api/register/namespaces/system/authority",
        "/api/data/namespaces/system/topology/site_mesh_groups",
    ],
)
async def test_many_requests_share_few_connections(user: httpx.AsyncClient, path: str) -> None:
    await put(user, CHECKS, check())
    answers = await asyncio.gather(*(user.get(path) for _ in range(AT_ONCE)))
    assert [answer.status_code for answer in answers] == [200] * AT_ONCE
