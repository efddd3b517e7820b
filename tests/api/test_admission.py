"""Many agents at once: they are served in turn, and those beyond are asked to come later."""

import asyncio
import time
from datetime import timedelta
from uuid import UUID, uuid4

import httpx
import pytest
from fastapi import FastAPI

from agent.errors import Busy
from agent.protocol.enrolment import Proof
from agent.protocol.items import Gateway
from agent.protocol.manifest import MANIFEST_PATH
from agent.protocol.report import GatewayListener, Heartbeat
from controlplane.errors import TooManyRequests
from controlplane.services.admission import Gate, calls, changes
from controlplane.services.agents import Agent
from controlplane.services.heartbeats import FORGOTTEN_AFTER, Heartbeats
from tests.api.enrolled import Node, admitted, caught_up
from tests.api.test_delivery import publish, tenant_of
from tests.backend import client_of, now


async def test_beyond_those_that_wait_agents_are_asked_to_come_later_but_signs_of_life_are_taken(
    app: FastAPI, user: httpx.AsyncClient
) -> None:
    async with admitted(app, user, "a") as made, client_of(app, None) as client:
        object.__setattr__(app.state.services, "gate", Gate(at_once=1, most_waiting=0))
        assert made.control.signer
        request = httpx.Request("GET", f"https://controlplane.test{MANIFEST_PATH}")
        answer = await client.get(MANIFEST_PATH, headers={"Authorization": made.control.signer.authorization(request, time.time())})
        assert (answer.status_code, 2 <= int(answer.headers["Retry-After"]) <= 10) == (429, True)
        assert (await made.beat()).pace_s == 3.0


async def test_a_gate_lets_in_so_many_at_once_and_the_rest_in_turn() -> None:
    gate, inside, most = Gate(at_once=2, most_waiting=3), 0, 0

    async def pass_through() -> None:
        nonlocal inside, most
        async with gate.place():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    results = await asyncio.gather(*(pass_through() for _ in range(20)), return_exceptions=True)
    assert most == 2
    assert all(isinstance(result, TooManyRequests) for result in results if result)
    assert sum(result is None for result in results) >= 3
    await pass_through()


def test_a_node_may_call_often_for_a_while_and_then_at_its_pace() -> None:
    allowance, hasty, other, at = calls(per_s=2, at_once=10), uuid4(), uuid4(), 1000.0
    for _ in range(10):
        allowance.spend(hasty, at)
    with pytest.raises(TooManyRequests) as refusal:
        allowance.spend(hasty, at)
    assert refusal.value.retry_after_s == 0.5
    allowance.spend(other, at)
    for number in range(1, 10):
        allowance.spend(hasty, at + number / 2)
    for _ in range(10):
        allowance.spend(hasty, at + 60)


async def test_a_node_that_calls_too_often_is_asked_to_come_later_and_no_other(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made, admitted(app, user, "b") as other:
        object.__setattr__(app.state.services, "calls", calls(per_s=0.001, at_once=2))
        await made.beat()
        await made.manifest()
        for call in (made.beat, made.manifest, made.report):
            with pytest.raises(Busy, match="too often"):
                await call()
        await other.beat()


async def test_a_node_whose_gateways_change_too_often_is_asked_to_come_later_with_the_latest(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made, admitted(app, user, "b") as other:
        object.__setattr__(app.state.services, "changes", changes(per_s=0.001, at_once=3))
        agent = await _agent(app, made)
        before = agent.cache.view.revision
        for host in ("10.0.0.1", "10.0.0.2", "10.0.0.3"):
            await made.report(gateways=(Gateway(node_id="", host=host, port=1),), gateway_listener=GatewayListener(address=host, port=1))
        with pytest.raises(Busy, match="changes too often"):
            await made.report(gateways=(Gateway(node_id="", host="10.0.0.4", port=1),))
        await made.report(gateways=(Gateway(node_id="", host="10.0.0.3", port=1),), origins=())
        await other.report(gateways=(Gateway(node_id="", host="10.0.1.1", port=1),))
        await caught_up(app, tenant_of(made))
        assert agent.cache.view.revision - before == 4
        object.__setattr__(app.state.services, "changes", changes())
        await made.report(gateways=(Gateway(node_id="", host="10.0.0.5", port=1),))
        await caught_up(app, tenant_of(made))
        assert [gateway["host"] for gateway in agent.cache.view.fleet.nodes[agent.node.id].gateways] == ["10.0.0.5"]


async def test_nodes_that_were_silent_for_long_are_forgotten(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as gone, admitted(app, user, "b") as made:
        heartbeats, later = app.state.services.heartbeats, now() + FORGOTTEN_AFTER
        await gone.report()
        for boot in (gone.boot_id, "second", gone.boot_id):
            await gone.beat(boot_id=boot)
        agent = await _agent(app, made)
        await heartbeats.take(agent, Heartbeat(boot_id="b", sequence=1, sent_at=later.timestamp()), later)
        await heartbeats.flush(later)
        assert _known(heartbeats) > {agent.node.id}
        heartbeats.forget(later + timedelta(minutes=1))
        assert _known(heartbeats) == {agent.node.id}


def _known(heartbeats: Heartbeats) -> set[UUID]:
    """Nodes of which it remembers anything."""
    return {node_id for kept in vars(heartbeats).values() if isinstance(kept, dict) for node_id in kept}


async def test_proofs_that_come_together_are_spent_together_and_each_once(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as made, admitted(app, user, "b") as other:
        await publish(user, "a")
        await asyncio.gather(*(each.manifest() for each in (made, other) for _ in range(20)))
        proofs, agent = app.state.services.proofs, await _agent(app, made)
        results = await asyncio.gather(*(proofs.spend(agent) for _ in range(3)), return_exceptions=True)
        assert sum(result is None for result in results) == 1
        with pytest.raises(Exception, match="used before"):
            await proofs.spend(agent)


async def test_what_fails_fails_for_those_who_waited_for_it_alone(
    app: FastAPI, user: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with admitted(app, user, "a") as made:
        agent, proofs = await _agent(app, made), app.state.services.proofs
        with monkeypatch.context() as broken:
            broken.setattr(app.state.services.database, "sessions", lambda tenant_id: _gone())
            with pytest.raises(OSError, match="gone"):
                await proofs.spend(agent)
        await proofs.spend(agent)


def _gone() -> None:
    raise OSError("gone")


async def _agent(app: FastAPI, made: Node) -> Agent:
    """As one whose call was recognised."""
    assert made.credentials
    cache = await app.state.services.delivery.cache(UUID(tenant_of(made)))
    await app.state.services.delivery.catch_up(cache)
    node = cache.view.fleet.nodes[UUID(made.credentials.node_id)]
    return Agent(cache, node, Proof(aud="", htm="", htu="", bsh="", iat=int(time.time()), jti="once"))
