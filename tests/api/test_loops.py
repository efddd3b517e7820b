"""Background work of a replica, on the real database."""

import asyncio
from datetime import timedelta
from uuid import UUID

import httpx
from fastapi import FastAPI
from sqlalchemy import create_engine, text

from agent.protocol.report import EdgeMetrics, MetricsReport, Report
from controlplane.loops import retention
from controlplane.loops.retention import Keep, forget_once
from controlplane.store import telemetry
from controlplane.store.locks import Lock, take
from controlplane.store.session import Database
from tests.api.enrolled import TOKENS, Node, admitted, create_token, live, node
from tests.api.test_delivery import publish, tenant_of, waiting
from tests.backend import Postgres, now

__all__ = ["live"]

KEEP = Keep(metrics=timedelta(days=7), audit=timedelta(days=400))


async def test_losing_the_notifications_costs_a_second_and_no_change(live: FastAPI, user: httpx.AsyncClient, postgres: Postgres) -> None:
    async with admitted(live, user, "a") as made:
        before = await made.manifest()
        poll = asyncio.create_task(made.manifest(before.hash))
        await waiting(live, made)
        await asyncio.to_thread(_stop_listening, postgres)
        await publish(user, "a")
        async with asyncio.timeout(10):
            assert (await poll).hash != before.hash


async def test_a_listener_notices_that_the_database_is_gone(database: Database) -> None:
    async with await database.listen("somebody") as connection:
        parameters = connection.info.get_parameters()
        assert [parameters[f"keepalives_{name}"] for name in ("idle", "interval", "count")] == ["1", "1", "3"]


def _stop_listening(postgres: Postgres) -> None:
    """As when Postgres is restarted, or a network in between forgets the connection."""
    engine = create_engine(postgres.owner_url)
    with engine.begin() as connection:
        found = connection.execute(text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"))
        assert found.rowcount >= 1
    engine.dispose()


async def test_what_has_had_its_time_is_forgotten(app: FastAPI, user: httpx.AsyncClient) -> None:
    database = app.state.services.database
    token = (await create_token(user))["spec"]["content"]
    async with admitted(app, user, "a") as made, node(app, token, "b") as pending:
        await publish(user, "a")
        await pending.bootstrap()
        await _serve(app, made)
        tenant_id = UUID(tenant_of(made))
        span = now() - timedelta(minutes=1), now() + timedelta(minutes=1)
        await forget_once(database, KEEP, now())
        async with database.sessions(tenant_id) as session:
            assert await telemetry.between(session, tenant_id, *span, most=100)
        await forget_once(database, KEEP, now() + timedelta(days=8))
        async with database.sessions(tenant_id) as session:
            assert not await telemetry.between(session, tenant_id, *span, most=100)
            assert await telemetry.totals(session, tenant_id)
        (registration,) = (await user.get("/api/register/namespaces/system/registrations_by_site/b")).json()["items"]
        assert registration["object"]["status"]["current_state"] == "RETIRED"
        await user.delete("/api/config/namespaces/shop/http_loadbalancers/cart")
        await forget_once(database, KEEP, now() + 2 * retention.KEEP_ENDED)
        async with database.sessions(tenant_id) as session:
            assert not await telemetry.totals(session, tenant_id)
        assert (await user.get(TOKENS)).json()["items"] == []


async def test_one_replica_at_a_time_forgets(app: FastAPI, user: httpx.AsyncClient) -> None:
    database = app.state.services.database
    name = (await create_token(user))["metadata"]["name"]
    async with database.transaction() as session:
        await take(session, Lock.RETENTION)
        await forget_once(database, KEEP, now() + 2 * retention.KEEP_ENDED)
        assert (await user.get(f"{TOKENS}/{name}")).status_code == 200
    await forget_once(database, KEEP, now() + 2 * retention.KEEP_ENDED)
    assert (await user.get(f"{TOKENS}/{name}")).status_code == 404


async def _serve(app: FastAPI, made: Node) -> None:
    delivery = app.state.services.delivery
    await delivery.catch_up(await delivery.cache(UUID(tenant_of(made))))
    edge = EdgeMetrics(load_balancer="shop/cart", protocol="http", destination="", requests={"2xx": 1})
    await made.control.report(Report(boot_id=made.boot_id, metrics=MetricsReport(sequence=1, edges=(edge,))))
