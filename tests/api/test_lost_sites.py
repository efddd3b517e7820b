"""Sites that fall silent: what becomes of them in the snapshots of those that call them, and what users see."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI

from agent.protocol.items import ItemKind, OriginPool, Peer
from controlplane.services.leases import Leases
from tests.api.enrolled import Node, admitted, caught_up
from tests.api.test_delivery import tenant_of
from tests.api.test_objects import BALANCERS, POOLS, balancer, pool
from tests.api.test_status import status
from tests.backend import now

SITE_STATUS = "/api/config/namespaces/system/sites/{}/status"


@asynccontextmanager
async def fleet(app: FastAPI, user: httpx.AsyncClient, *sites: str, **choice: Any) -> AsyncIterator[dict[str, Node]]:
    """Sites that were just heard of; `a` calls `b`."""
    async with AsyncExitStack() as stack:
        nodes = {site: await stack.enter_async_context(admitted(app, user, site)) for site in sites}
        assert (await user.post(POOLS, json=pool("cart", "b"))).status_code == 200
        body = balancer("cart", "cart.test", where={"site": {"site": {"name": "a"}, "network": "SITE_NETWORK_INSIDE"}})
        body["spec"] |= {"default_route_pools": [{"pool": {"name": "cart"}}], **choice}
        answer = await user.post(BALANCERS, json=body)
        assert answer.status_code == 200, answer.text
        await caught_up(app, tenant_of(nodes["a"]))
        for each in nodes.values():
            await each.beat()
        await app.state.services.heartbeats.flush(now())
        yield nodes


def leases_of(app: FastAPI) -> Leases:
    found: Leases = app.state.services.observer.leases
    return found


async def pass_time(app: FastAPI, until: datetime) -> None:
    """As the loop does; so far in the future that a whole lease was healthy."""
    leases = leases_of(app)
    leases.heartbeats.healthy_since = until - timedelta(minutes=1)
    await leases.look(until)


async def item(app: FastAPI, made: Node, kind: ItemKind, of: type[Any]) -> Any:
    await caught_up(app, tenant_of(made))
    (entry,) = (entry for entry in (await made.manifest()).entries if entry.kind == kind)
    (body,) = await made.control.items([entry.hash])
    return of.read(body.body.encode())


async def test_a_site_that_falls_silent_is_lost_for_its_callers_and_back_when_it_is_heard(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with fleet(app, user, "a", "b", "c") as nodes:
        a, b, c = nodes.values()
        assert not (await item(app, a, ItemKind.PEER, Peer)).lost
        later = now() + timedelta(seconds=10)
        await _hear(app, a, c, at=later)
        await pass_time(app, later)
        assert (await item(app, a, ItemKind.PEER, Peer)).lost
        (condition,) = (await status(user, SITE_STATUS.format("b")))["conditions"]
        assert condition["type"] == "Lost"
        await _hear(app, b, at=later)
        await pass_time(app, later)
        assert not (await item(app, a, ItemKind.PEER, Peer)).lost
        assert (await status(user, SITE_STATUS.format("b")))["conditions"] == []


async def test_nothing_is_lost_before_a_whole_lease_of_health(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with fleet(app, user, "a", "b", "c") as nodes:
        a, _, c = nodes.values()
        later = now() + timedelta(seconds=10)
        await _hear(app, a, c, at=later)
        leases = leases_of(app)
        leases.heartbeats.healthy_since = later - timedelta(seconds=5)
        await leases.look(later)
        assert not (await item(app, a, ItemKind.PEER, Peer)).lost


async def test_a_replica_that_was_frozen_does_not_judge(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with fleet(app, user, "a", "b", "c") as nodes:
        a, _, c = nodes.values()
        leases = leases_of(app)
        await leases.look(now())
        later = now() + timedelta(minutes=10)
        await _hear(app, a, c, at=later)
        leases.heartbeats.healthy_since = now()
        await leases.look(later)
        assert leases.heartbeats.healthy_since == later
        assert not (await item(app, a, ItemKind.PEER, Peer)).lost


async def test_when_most_sites_fall_silent_none_is_lost_and_users_and_operators_are_told(
    app: FastAPI, user: httpx.AsyncClient, operator: httpx.AsyncClient
) -> None:
    async with fleet(app, user, "a", "b", "c") as nodes:
        a, b, c = nodes.values()
        later = now() + timedelta(seconds=10)
        await _hear(app, a, at=later)
        await pass_time(app, later)
        assert not (await item(app, a, ItemKind.PEER, Peer)).lost
        (condition,) = (await status(user, SITE_STATUS.format("b")))["conditions"]
        assert (condition["type"], "1 other" in condition["message"]) == ("EvictionStopped", True)
        name = (await app.state.services.delivery.cache(UUID(tenant_of(a)))).view.intent.tenant.name
        assert f'isthmus_eviction_stopped{{tenant="{name}"}} 0.0' in (await operator.get("/metrics")).text, (
            "nobody is silent yet by this clock"
        )
        families = await leases_of(app).exposition(later)
        told = {
            (sample.name, sample.labels.get("state")): sample.value
            for family in families
            for sample in family.samples
            if sample.labels["tenant"] == name
        }
        assert told["isthmus_eviction_stopped", None] == 1
        assert [told["isthmus_sites", state] for state in ("live", "held", "lost", "unknown")] == [1, 2, 0, 0]
        await _hear(app, b, c, at=later)
        await pass_time(app, later)
        assert (await status(user, SITE_STATUS.format("b")))["conditions"] == []


POLICIES = {"deprioritize_lost_sites": "deprioritise", "evict_lost_sites": "evict", "keep_lost_sites": "keep"}


@pytest.mark.parametrize("choice", POLICIES)
async def test_a_load_balancer_says_what_becomes_of_its_pools_at_lost_sites(app: FastAPI, user: httpx.AsyncClient, choice: str) -> None:
    async with fleet(app, user, "a", "b", **{choice: {}}) as nodes:
        assert (await item(app, nodes["a"], ItemKind.ORIGIN_POOL, OriginPool)).lost_sites == POLICIES[choice]
        assert (await user.get(f"{BALANCERS}/cart")).json()["spec"][choice] == {}


async def _hear(app: FastAPI, *nodes: Node, at: datetime) -> None:
    """Heartbeats that the control plane takes at that time."""
    services = app.state.services
    cache = await services.delivery.cache(UUID(tenant_of(nodes[0])))
    for each in nodes:
        await each.beat()
    pending = services.heartbeats._pending[cache.id]
    for node_id, taken in pending.items():
        object.__setattr__(taken.status, "last_heartbeat_at", at)
        assert taken.status.node_id == node_id
    await services.heartbeats.flush(at)
