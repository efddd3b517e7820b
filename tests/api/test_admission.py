"""Many agents at once: they are served in turn, and those beyond are asked to come later."""

import asyncio
import time
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI

from agent.protocol.enrolment import Proof
from agent.protocol.manifest import MANIFEST_PATH
from controlplane.errors import TooManyRequests
from controlplane.services.admission import Gate
from controlplane.services.agents import Agent
from tests.api.enrolled import Node, admitted
from tests.api.test_delivery import publish, tenant_of
from tests.backend import client_of


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
