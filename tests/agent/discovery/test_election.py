"""One node of a site at a time, by a Lease in an emulated cluster."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import pytest

from agent import election
from agent.discovery.kubeconfig import ClusterAccess, from_kubeconfig
from agent.election import Election
from agent.leases import LEASE_S, Leases
from agent.published import Publisher
from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.kubernetes.running import Emulator
from lab.wait import until
from tests.agent.discovery.watching import allowed


@dataclass
class Clock:
    now: float = 0.0


@dataclass
class Node:
    election: Election
    told: list[bool] = field(default_factory=list)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(election, "PACE_S", 0.05)


@asynccontextmanager
async def running(load: Callable[[], ClusterAccess] | None, name: str, clock: Clock) -> AsyncIterator[Node]:
    leases = Leases(Publisher("s1", name, None), lambda: clock.now)
    node = Node(Election(leases, "discovery", load, lambda: node.told.append(node.election.leads)))
    task = asyncio.create_task(node.election.run())
    try:
        yield node
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def leads(node: Node) -> None:
    async def does() -> bool:
        return node.election.leads

    await until(does, "the node to lead")


async def test_one_leads_until_it_resigns_or_its_lease_has_run_out(emulator: Emulator, api: Client) -> None:
    clock = Clock()
    load = lambda: from_kubeconfig(emulator.kubeconfig.read_bytes())  # noqa: E731  # as settings give it
    async with AsyncExitStack() as stack:
        async with running(load, "n1", clock) as first:
            await leads(first)
            second = await stack.enter_async_context(running(load, "n2", clock))
            third = await stack.enter_async_context(running(load, "n3", clock))
            (lease,) = (await api.list("Lease"))["items"]
            assert (lease["metadata"]["name"], lease["spec"]["holderIdentity"]) == ("isthmus-s1-discovery", "n1")
        await first.election.resign()
        others = (second, third)

        async def one_of_them() -> bool:
            return [node.election.leads for node in others].count(True) == 1

        await until(one_of_them, "another node to lead")
    successor, other = sorted(others, key=lambda node: not node.election.leads)
    assert other.told == []
    async with running(load, "n4", clock) as fourth:
        (lease,) = (await api.list("Lease"))["items"]

        async def seen() -> bool:
            return bool(fourth.election.leases._seen)

        await until(seen, "the Lease to be looked at")
        assert not fourth.election.leads, f"{successor} has it still"
        clock.now += LEASE_S + 1
        await leads(fourth)


async def test_where_leases_are_forbidden_every_node_leads_and_says_why(emulator: Emulator, api: Client) -> None:
    load = await allowed(emulator, api, objects.rule("", "services", "list"))
    async with running(load, "n1", Clock()) as first, running(load, "n2", Clock()) as second:
        for node in (first, second):
            await leads(node)
            assert "no node can be elected for discovery: 403 leases" in (node.election.warning or "")


async def test_without_a_cluster_to_elect_in_every_node_leads() -> None:
    async with running(None, "n1", Clock()) as node:
        assert node.election.leads
        await node.election.resign()
