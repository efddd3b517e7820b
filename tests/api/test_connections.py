"""Nothing holds a connection to the database while it waits for another one: many at once would wait for each other."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from controlplane.loops.retention import Keep, forget_once
from controlplane.services.heartbeats import Heartbeats
from controlplane.services.homes import Seen, assign
from controlplane.services.leases import Leases
from controlplane.store.session import Database
from tests.api.enrolled import Node, admitted, caught_up
from tests.api.test_delivery import tenant_of
from tests.api.test_objects import CHECKS, check, put
from tests.api.test_regional_edges import running_edge
from tests.backend import Postgres, now

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


@pytest.fixture
async def single(postgres: Postgres) -> AsyncIterator[Database]:
    """One connection."""
    database = Database(postgres.app_url, connections=1)
    yield database
    await database.close()


@pytest.fixture
async def heard(app: FastAPI, user: httpx.AsyncClient) -> AsyncIterator[Node]:
    """A node with a heartbeat just now."""
    async with admitted(app, user, "a") as made:
        await made.beat()
        await app.state.services.heartbeats.flush(now())
        yield made


async def test_forgetting_needs_one_connection(app: FastAPI, heard: Node, single: Database) -> None:
    await heard.manifest()
    await forget_once(single, Keep(metrics=timedelta(0), audit=timedelta(0)), now() + timedelta(days=1))
    async with single.sessions(UUID(tenant_of(heard))) as session:
        assert (await session.execute(text("SELECT count(*) FROM audit_log"))).scalar_one() == 0


async def test_choosing_regional_edges_needs_one_connection(
    app: FastAPI, operator: httpx.AsyncClient, user: httpx.AsyncClient, heard: Node, single: Database
) -> None:
    async with running_edge(app, operator, "single"):
        await assign(single, app.state.services.heartbeats, Seen(), now())
        spec = (await user.get("/api/config/namespaces/system/sites/a")).json()["spec"]
        assert [ref["name"] for ref in spec["connected_re_for_config"]] == ["single"]


async def test_judging_leases_needs_one_connection(app: FastAPI, heard: Node, single: Database) -> None:
    later = now() + timedelta(hours=1)
    await Leases(single, Heartbeats(single, later - timedelta(minutes=1))).look(later)
    tenant_id = tenant_of(heard)
    await caught_up(app, tenant_id)
    assert heard.credentials
    fleet = (await app.state.services.delivery.cache(UUID(tenant_id))).view.fleet
    assert fleet.observations.lost == {heard.credentials.site_id}
