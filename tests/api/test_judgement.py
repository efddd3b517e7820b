"""What is told of a site whose nodes do not all speak, or are coming and going."""

import asyncio
from datetime import timedelta
from uuid import UUID

import httpx
import pytest
from cryptography.x509 import load_pem_x509_certificate
from fastapi import FastAPI
from sqlalchemy import select

from agent.errors import Refused
from controlplane.auth import Caller
from controlplane.services import sites
from controlplane.services.heartbeats import lease
from controlplane.store import nodes
from controlplane.store.nodes import NodeStatus
from controlplane.store.session import Database
from controlplane.store.tables import NodeRow
from tests.api.enrolled import SITES, Node, admitted, caught_up, node, token_for
from tests.api.test_delivery import publish, tenant_of
from tests.api.test_objects import BALANCERS
from tests.backend import now

STATUS = f"{BALANCERS}/cart/status"


def node_id(made: Node) -> UUID:
    assert made.credentials
    return UUID(made.credentials.node_id)


async def test_a_node_that_may_still_speak_keeps_its_site_from_being_applied(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as first, admitted(app, user, "a", "node-2") as second:
        await publish(user, "a")
        await caught_up(app, tenant_of(first))
        await first.apply()
        heartbeats = app.state.services.heartbeats
        await heartbeats.flush(now())
        (site,) = (await user.get(STATUS)).json()["sites"]
        assert (site["state"], site["reason"]) == ("Pending", "waiting for a heartbeat of node node-2")
        await second.apply()
        await heartbeats.flush(now())
        assert (await user.get(STATUS)).json()["applied"]


async def test_a_node_that_never_spoke_is_given_up_after_a_lease(app: FastAPI, user: httpx.AsyncClient, database: Database) -> None:
    async with admitted(app, user, "a") as first, admitted(app, user, "a", "node-2") as second:
        await publish(user, "a")
        long_ago = now() - 2 * lease(2)
        async with database.sessions(UUID(tenant_of(first))) as session:
            await nodes.change(session, UUID(tenant_of(first)), node_id(second), created_at=long_ago)
        await caught_up(app, tenant_of(first))
        await first.apply()
        heartbeats = app.state.services.heartbeats
        heartbeats.healthy_since = long_ago
        await heartbeats.flush(now())
        assert (await user.get(STATUS)).json()["applied"]


def heard(made: Node, boot_id: str, age_s: float) -> NodeStatus:
    return NodeStatus(node_id(made), boot_id, 9, now() - timedelta(seconds=age_s), None, 0, [], "live", [], 0.0, "")


async def test_a_late_heartbeat_of_an_earlier_boot_changes_nothing(app: FastAPI, user: httpx.AsyncClient, database: Database) -> None:
    async with admitted(app, user, "a") as made, database.sessions(UUID(tenant_of(made))) as session:
        for boot_id, age_s in (("first", 10.0), ("second", 5.0), ("first", 7.0)):
            await nodes.write_statuses(session, UUID(tenant_of(made)), [heard(made, boot_id, age_s)])
        assert (await nodes.statuses(session, UUID(tenant_of(made))))[node_id(made)].boot_id == "second"


async def test_a_boot_that_was_replaced_stays_so_while_its_proofs_can_be_repeated(
    app: FastAPI, user: httpx.AsyncClient, database: Database
) -> None:
    async with admitted(app, user, "a") as made, database.sessions(UUID(tenant_of(made))) as session:
        beats = (("first", 300, "first"), ("second", 200, "second"), ("first", 150, "second"), ("third", 90, "third"))
        for boot_id, age_s, current in (*beats, ("second", 30, "third"), ("first", 20, "first"), ("third", 10, "first")):
            await nodes.write_statuses(session, UUID(tenant_of(made)), [heard(made, boot_id, age_s)])
            assert (await nodes.statuses(session, UUID(tenant_of(made))))[node_id(made)].boot_id == current


async def test_nobody_joins_a_site_while_it_is_decommissioned(app: FastAPI, user: httpx.AsyncClient, database: Database) -> None:
    async with admitted(app, user, "a") as first, node(app, await token_for(user, "a"), "a", "node-2") as second:
        tenant_id = UUID(tenant_of(first))
        caller = Caller(tenant_id, "", operator=False, credential="test")
        async with database.sessions(tenant_id) as session:
            await sites.decommission(session, caller, "a", now=now())
            joining = asyncio.create_task(second.bootstrap())
            done, _ = await asyncio.wait({joining}, timeout=0.5)
            assert not done
        with pytest.raises(Refused, match="was revoked"):
            await joining
        assert (await user.get(f"{SITES}/a")).status_code == 404


async def test_every_certificate_is_known_however_many_are_asked_for_at_once(
    app: FastAPI, user: httpx.AsyncClient, database: Database
) -> None:
    async with admitted(app, user, "a") as made:
        tenant_id = UUID(tenant_of(made))
        async with database.sessions(tenant_id) as session:
            await nodes.change(session, tenant_id, node_id(made), certificate_expires_at=now() + timedelta(hours=1))
        issued = await asyncio.gather(*(made.fetch_credentials() for _ in range(4)))
        async with database.sessions(tenant_id) as session:
            found = await nodes.get(session, tenant_id, node_id(made))
    assert found
    serials = {f"{load_pem_x509_certificate(each.certificate_pem.encode()).serial_number:x}" for each in issued}
    assert serials <= {serial for serial, _, _ in found.leaves}


async def test_revoked_nodes_are_forgotten_in_the_end(app: FastAPI, user: httpx.AsyncClient, database: Database) -> None:
    async with admitted(app, user, "a") as made, admitted(app, user, "a", "node-2") as other:
        tenant_id = UUID(tenant_of(made))
        async with database.sessions(tenant_id) as session:
            await nodes.revoke(session, tenant_id, [node_id(made)], 1, now())
            await nodes.forget_revoked(session, tenant_id, now() - timedelta(days=1))
            assert await nodes.get(session, tenant_id, node_id(made))
            await nodes.forget_revoked(session, tenant_id, now() + timedelta(days=1))
            assert tuple(await session.scalars(select(NodeRow.id).filter_by(tenant_id=tenant_id))) == (node_id(other),)


async def test_failures_are_counted(app: FastAPI, anonymous: httpx.AsyncClient) -> None:
    @app.get("/broken")
    async def broken() -> None:
        raise ZeroDivisionError

    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="https://controlplane.test") as client:
        assert (await client.get("/broken")).json() == {"code": 13, "message": "internal error", "details": []}
    assert 'isthmus_http_requests_total{method="GET",route="/broken",status="500"} 1.0' in (await anonymous.get("/metrics")).text
