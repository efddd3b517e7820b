"""The failure matrix as data: what breaks, for how long, under which load, and what may come of it."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.memory import enrol_all
from bench.outage import Outage
from bench.scenes import HTTP_PORT, Scene
from bench.storm import Returning, living
from lab import faults
from lab.api import Refused
from lab.network import Place
from lab.postgres import Postgres
from lab.site import Node
from lab.specs import http_loadbalancer, tcp_loadbalancer
from lab.wait import until

Fault = Callable[[Scene], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class Aim:
    """What is promised; None: nothing is, and the row only tells."""

    failed: int | None = None
    stall_s: float | None = None
    recovered_s: float | None = None
    caught_up_s: float | None = None
    caught_up: str = "agents in sync"
    """What `caught_up_s` is about."""

    def missed(self, found: Outage) -> list[str]:
        """In words; nothing if it was met."""
        misses = []
        if self.failed is not None and found.failed > self.failed:
            misses.append(f"{found.failed} failed")
        if self.stall_s is not None and found.stall_s > self.stall_s:
            misses.append(f"stalled {found.stall_s:.1f} s")
        if self.recovered_s is not None and (found.recovered_s is None or found.recovered_s > self.recovered_s):
            misses.append("did not recover" if found.recovered_s is None else f"took {found.recovered_s:.1f} s")
        if self.caught_up_s is not None and (found.caught_up_s is None or found.caught_up_s > self.caught_up_s):
            misses.append(f"not {self.caught_up}" if found.caught_up_s is None else f"{self.caught_up} after {found.caught_up_s:.1f} s")
        return misses

    def __str__(self) -> str:
        said = [
            "no failed request" if self.failed == 0 else None,
            f"stall ≤ {self.stall_s:g} s" if self.stall_s is not None else None,
            f"recovered ≤ {self.recovered_s:g} s" if self.recovered_s is not None else None,
            f"{self.caught_up} ≤ {self.caught_up_s:g} s" if self.caught_up_s is not None else None,
        ]
        return ", ".join(part for part in said if part) or "none"


NOTHING = Aim(failed=0, stall_s=0.5)
"""Whoever calls does not notice."""
TUNNEL = Aim(failed=0, stall_s=1.5)
CLUSTER = Aim(recovered_s=3.0)
RENEWED = Aim(failed=0, stall_s=0.5, caught_up_s=30, caught_up="renewed")
RETURNED = Aim(failed=0, stall_s=0.5, caught_up_s=120, caught_up="back at it")
LOST = Aim(failed=0, caught_up_s=10, caught_up="out of use")


@dataclass(frozen=True)
class Row:
    """`service` is what the load calls: `only` is at b, `both` at b and c."""

    name: str
    scene: str
    service: str
    fault: Fault
    aim: Aim
    hold_s: float = 15
    quick_s: float = 5
    """How long the fault lasts, in the long and in the quick run."""
    settles_s: float = 8
    """What the load is watched for after the fault was undone."""


def _now(action: Callable[[Scene], Awaitable[object]], undo: Callable[[Scene], Awaitable[object]] | None = None) -> Fault:
    """A fault that is done once, and undone once."""

    @asynccontextmanager
    async def fault(scene: Scene) -> AsyncIterator[None]:
        await action(scene)
        try:
            yield
        finally:
            if undo:
                await undo(scene)

    return fault


# Tunnels


@asynccontextmanager
async def link_to_b(scene: Scene, how: faults.Link) -> AsyncIterator[None]:
    with how(_places(scene, "a"), _places(scene, "b")):
        yield


def _places(scene: Scene, site: str) -> list[Place]:
    return [node.place for node in scene.fabric.site(site).nodes]


@asynccontextmanager
async def flapping(scene: Scene) -> AsyncIterator[None]:
    """Every two seconds, the direct link is there or not."""

    async def flap() -> None:
        while True:
            async with link_to_b(scene, faults.silent):
                await asyncio.sleep(2)
            await asyncio.sleep(2)

    task = asyncio.create_task(flap())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def frozen_charon(scene: Scene) -> AsyncIterator[None]:
    with faults.frozen([scene.b.node.charon_pid()]):
        yield


async def kill_charon(scene: Scene) -> None:
    os.kill(scene.b.node.charon_pid(), signal.SIGKILL)


# Regional edges


@asynccontextmanager
async def edge_killed(scene: Scene) -> AsyncIterator[None]:
    edge = await scene.edge_in_use()
    await faults.kill(edge.nodes)
    yield
    await edge.agent.start()


@asynccontextmanager
async def edge_frozen(scene: Scene) -> AsyncIterator[None]:
    edge = await scene.edge_in_use()
    with faults.frozen(faults.programs(edge.nodes)):
        yield


@asynccontextmanager
async def edge_powered_off(scene: Scene) -> AsyncIterator[None]:
    edge = await scene.edge_in_use()
    with faults.unplugged(scene.fabric.network, edge.nodes):
        yield


@asynccontextmanager
async def edge_drained(scene: Scene) -> AsyncIterator[None]:
    edge = await scene.edge_in_use()
    await scene.fabric.api.replace("site", edge.name, {"site_type": "REGIONAL_EDGE", "drain": True})
    yield
    await scene.fabric.api.replace("site", edge.name, {"site_type": "REGIONAL_EDGE"})


@asynccontextmanager
async def both_edges_gone(scene: Scene) -> AsyncIterator[None]:
    nodes = [node for edge in scene.fabric.edges.values() for node in edge.nodes]
    await faults.kill(nodes)
    yield
    await asyncio.gather(*(node.agent.start() for node in nodes))


@asynccontextmanager
async def poisoned_edge(scene: Scene) -> AsyncIterator[None]:
    """A public load balancer on a port that something else has taken on the edge, which others share."""
    api, edge = scene.fabric.api, await scene.edge_in_use()
    where = [{"site": {"network": "SITE_NETWORK_OUTSIDE", "site": {"namespace": "system", "name": edge.name}}, "use_default_port": {}}]
    for name in ("poison.example", ":9099"):
        await api.request("POST", "/api/operator/public_names", {"name": name, "tenant": "default"})
    with edge.place.listen(edge.place.underlay, 9099):
        spec = {**http_loadbalancer("poison.example", ["apart"], [], 9099), "advertise_custom": {"advertise_where": where}}
        await api.create("http_loadbalancer", "poison", spec)

        async def is_named() -> bool:
            status = await api.status("http_loadbalancer", "poison")
            return any(site["state"] == "Rejected" and "9099" in str(site) for site in status["sites"])

        await until(is_named, "the poisoned object to be named", within_s=30)
        yield
    await api.delete("http_loadbalancer", "poison")


# Sites


@asynccontextmanager
async def frozen_gateway(scene: Scene) -> AsyncIterator[None]:
    with faults.frozen([scene.b.envoy_pid()]):
        yield


@asynccontextmanager
async def frozen_site(scene: Scene) -> AsyncIterator[None]:
    with faults.frozen(faults.programs(scene.b.nodes)):
        yield


@asynccontextmanager
async def powered_off(scene: Scene) -> AsyncIterator[None]:
    """The first node of b, without a word."""
    node = scene.b.node
    with faults.unplugged(scene.fabric.network, [node]):
        await faults.kill([node])
        yield
    await node.agent.start()


@asynccontextmanager
async def cluster_gone(scene: Scene) -> AsyncIterator[None]:
    """All of b is off the network."""
    with faults.unplugged(scene.fabric.network, scene.b.nodes, scene.b.cluster.place):
        yield


@asynccontextmanager
async def pods_killed(scene: Scene) -> AsyncIterator[None]:
    """All pods of b crash; Kubernetes still lists them."""
    services = list(scene.b.cluster.services.values())
    await faults.kill_pods([pod.process for service in services for pod in service.pods])
    yield
    for service in services:
        for pod in service.pods:
            await pod.process.start()


@asynccontextmanager
async def no_endpoints(scene: Scene) -> AsyncIterator[None]:
    """Kubernetes takes all pods of b away, as when someone scales to zero, and the control plane cannot hear of it."""
    cluster = scene.b.cluster
    replicas = [replica.process.pid for replica in scene.fabric.replicas]
    with faults.frozen(replicas):
        await asyncio.gather(*(cluster.scale(name, 0) for name in cluster.services))
        yield
        await asyncio.gather(*(cluster.scale(name, 1) for name in cluster.services))


@asynccontextmanager
async def silent_site(scene: Scene, policy: str) -> AsyncIterator[None]:
    """The agent of b is gone while its Envoy serves on, so that only the lease can take b out of use."""
    api, loop = scene.fabric.api, asyncio.get_running_loop()
    await api.replace("http_loadbalancer", "both", http_loadbalancer("both.test", ["both"], ["a"], HTTP_PORT, **{policy: {}}))
    await api.applied("http_loadbalancer", "both", timeout_s=30)
    await scene.b.agent.kill()
    began = loop.time()
    try:
        await until(partial(_has_condition, scene, "Lost"), "b to be lost", within_s=30)
        if policy == "keep_lost_sites":
            scene.note = f"lost after {loop.time() - began:.1f} s"
            await until(partial(_is_served_by, scene, {"b", "c"}), "b to be in use still", within_s=15)
        else:
            await until(partial(_is_served_by, scene, {"c"}), "b to be out of use", within_s=30)
            scene.caught_up_s = loop.time() - began
            scene.note = f"out of use after {scene.caught_up_s:.1f} s"
        yield
    finally:
        await scene.b.agent.start()
        await until(partial(_has_condition, scene, ""), "b to be back", within_s=60)


@asynccontextmanager
async def most_sites_silent(scene: Scene) -> AsyncIterator[None]:
    """The agents of b and c are gone while their Envoys serve on: then none may be evicted."""
    api, loop = scene.fabric.api, asyncio.get_running_loop()
    await api.replace("http_loadbalancer", "both", http_loadbalancer("both.test", ["both"], ["a"], HTTP_PORT, evict_lost_sites={}))
    await api.applied("http_loadbalancer", "both", timeout_s=30)
    sites = (scene.b, scene.c)
    with faults.frozen([site.agent.pid for site in sites]):
        began = loop.time()
        await until(partial(_has_condition, scene, "EvictionStopped"), "eviction to be stopped", within_s=30)
        scene.note = f"eviction stopped after {loop.time() - began:.1f} s"
        yield
        await until(partial(_is_served_by, scene, {"b", "c"}), "b and c to be in use still", within_s=15)
    await until(partial(_has_condition, scene, ""), "b to be back", within_s=60)


async def _has_condition(scene: Scene, kind: str) -> bool:
    """Whether site b has it; empty: neither of those that say that it is silent."""
    found = {condition["type"] for condition in (await scene.fabric.api.status("site", "b"))["conditions"]}
    return kind in found if kind else not found & {"Lost", "EvictionStopped"}


async def _is_served_by(scene: Scene, sites: set[str]) -> bool:
    """Whether exactly these answer."""
    client = await scene.a.http(HTTP_PORT, "both.test")
    answers = [await client.get("/") for _ in range(20)]
    return all(answer.is_success for answer in answers) and {answer.headers["x-pod"].split("-")[1] for answer in answers} == sites


async def kill_envoy_of_b(scene: Scene) -> None:
    os.kill(scene.b.envoy_pid(), signal.SIGKILL)


async def kill_envoy_of_a(scene: Scene) -> None:
    os.kill(scene.a.envoy_pid(), signal.SIGKILL)


async def kill_agents(scene: Scene) -> None:
    for site in (scene.a, scene.b):
        await site.agent.kill()


async def start_agents(scene: Scene) -> None:
    for site in (scene.a, scene.b):
        await site.agent.start()


@asynccontextmanager
async def node_restarts_alone(scene: Scene) -> AsyncIterator[None]:
    """Agent and Envoy of the calling site end and start while the control plane is away: what they need is on their disk."""
    for replica in scene.fabric.replicas:
        await replica.process.kill()
    await faults.kill([scene.a.node])
    await scene.a.agent.start()
    yield
    for replica in scene.fabric.replicas:
        await replica.start()


# Identity


@asynccontextmanager
async def certificates_expire(scene: Scene, *, broken: bool = False) -> AsyncIterator[None]:
    """The control plane is away until no node has a valid certificate, and with `broken` their tunnels are reset once then; it comes back in the end."""
    loop = asyncio.get_running_loop()
    nodes = [*scene.a.nodes, *scene.b.nodes]
    await kill_replicas(scene)
    await until(partial(_have_expired, nodes, {True}), "all certificates to have expired", within_s=120)
    if broken:
        async with link_to_b(scene, faults.reset):
            await asyncio.sleep(1)
    yield
    await start_replicas(scene)
    began = loop.time()
    await until(partial(_have_expired, nodes, {False}), "all nodes to have certificates again", within_s=120)
    client = await scene.a.http(HTTP_PORT, "only.test")

    async def answers() -> bool:
        return (await client.get("/")).is_success

    await until(answers, "b to be reached again", within_s=60)
    scene.caught_up_s = loop.time() - began
    scene.note = f"valid certificates and answers {scene.caught_up_s:.1f} s after the control plane was back"


async def _have_expired(nodes: Iterable[Node], expected: set[bool]) -> bool:
    """Whether that holds of the certificates of all or of none, as agents say."""
    return {any("certificate has expired" in warning for warning in _told(node)["warnings"]) for node in nodes} == expected


def _told(node: Node) -> dict[str, Any]:
    """What its agent says of itself."""
    told: dict[str, Any] = json.loads((node.state / "run" / "status.json").read_text())
    return told


# Control plane and database


async def kill_replicas(scene: Scene) -> None:
    for replica in scene.fabric.replicas:
        await replica.process.kill()


async def start_replicas(scene: Scene) -> None:
    for replica in scene.fabric.replicas:
        await replica.start()


@asynccontextmanager
async def frozen_replicas(scene: Scene) -> AsyncIterator[None]:
    with faults.frozen([replica.process.pid for replica in scene.fabric.replicas]):
        yield


@asynccontextmanager
async def preferred_replica_gone(scene: Scene) -> AsyncIterator[None]:
    """Agents name two URLs of the control plane, the first of which they prefer."""
    loop, nodes = asyncio.get_running_loop(), scene.fabric.nodes()
    first, second = scene.fabric.replicas
    await first.process.kill()
    await until(partial(_all_use, nodes, second.url), "all agents to use the other control plane", within_s=60)
    yield
    await first.start()
    began = loop.time()
    await until(partial(_all_use, nodes, first.url), "all agents to use the preferred control plane", within_s=180)
    scene.caught_up_s = loop.time() - began
    scene.note = f"all agents used it again {scene.caught_up_s:.0f} s after it was back"


async def _all_use(nodes: Iterable[Node], url: str) -> bool:
    return {_told(node)["control_plane"] for node in nodes} == {url}


@asynccontextmanager
async def postgres_gone(scene: Scene) -> AsyncIterator[None]:
    postgres: Postgres = scene.fabric.postgres
    await postgres.stop("immediate")
    yield
    await postgres.start()


async def restart_postgres(scene: Scene) -> None:
    await scene.fabric.postgres.restart()


@asynccontextmanager
async def database_fails_over(scene: Scene) -> AsyncIterator[None]:
    """And a change is made on the new server."""
    assert scene.fabric.databases is not None
    await scene.fabric.databases.fail_over()
    yield
    await _change_arrives(scene, "after-failover.test")


@asynccontextmanager
async def stale_replica(scene: Scene) -> AsyncIterator[None]:
    """One replica sleeps through a change, then wakes up as the only one: nobody may get from it what was before."""
    first, second = scene.fabric.replicas
    with faults.frozen([first.process.pid]):
        created = await second.api.create("http_loadbalancer", "newer", http_loadbalancer("newer.test", ["only"], ["a"]))
        await second.api.applied("http_loadbalancer", "newer", revision=created["revision"], timeout_s=60)
    with faults.frozen([second.process.pid]):
        client = await scene.a.http(8080, "newer.test")
        assert (await client.get("/")).is_success, "a replica with a stale cache took a change back"
        yield
        assert (await client.get("/")).is_success, "a replica with a stale cache took a change back"
    await first.api.delete("http_loadbalancer", "newer")


@asynccontextmanager
async def poisoned(scene: Scene) -> AsyncIterator[None]:
    """A load balancer on a port that something else has taken: only Envoy can find out, and it refuses."""
    api = scene.fabric.api
    with scene.a.place.listen(scene.a.node.place.inside, 9099):
        await api.create("tcp_loadbalancer", "poison", tcp_loadbalancer(["only-bytes"], ["a"], 9099))

        async def is_named() -> bool:
            status = await api.status("tcp_loadbalancer", "poison")
            return any(site["state"] == "Rejected" and "9099" in str(site) for site in status["sites"])

        await until(is_named, "the poisoned object to be named", within_s=30)
        await _change_arrives(scene, "beside-poison.test")
        yield
    await api.delete("tcp_loadbalancer", "poison")


@asynccontextmanager
async def storm(scene: Scene) -> AsyncIterator[None]:
    """The control plane is away for five seconds, then all agents come back at once and have a change to apply."""
    api, replica = scene.fabric.api, scene.fabric.replicas[0]
    sites = [f"site-{number}" for number in range(1, STORM_SITES + 1)]
    nodes = await enrol_all(scene.fabric, STORM_SITES, STORM_NODES)
    async with living(nodes, replica) as agents:
        await until(partial(_all_answered, agents, 2), "all agents to have a manifest and to have said so", within_s=120, every_s=0.5)
        await kill_replicas(scene)
        await asyncio.sleep(5)
        await start_replicas(scene)
        began = asyncio.get_running_loop().time()
        created = await api.create("http_loadbalancer", "storm", http_loadbalancer("storm.test", ["only"], sites))
        await until(partial(_is_applied, scene, "storm", created["revision"]), "all agents to say that they have the change", within_s=180)
        scene.caught_up_s = asyncio.get_running_loop().time() - began
        scene.note = f"{len(agents)} agents had a change applied {scene.caught_up_s:.1f} s after the control plane was back"
        yield
    await api.delete("http_loadbalancer", "storm")


async def _is_applied(scene: Scene, name: str, revision: int) -> bool:
    try:
        await scene.fabric.api.applied("http_loadbalancer", name, revision=revision)
    except Refused as refused:
        if refused.status != 504:
            raise
        return False
    return True


async def _all_answered(agents: Sequence[Returning], times: int) -> bool:
    for agent in agents:
        agent.check()
    return all(agent.answers >= times for agent in agents)


async def _change_arrives(scene: Scene, domain: str) -> None:
    name = domain.removesuffix(".test")
    created = await scene.fabric.api.create("http_loadbalancer", name, http_loadbalancer(domain, ["only"], ["a"]))
    await scene.fabric.api.applied("http_loadbalancer", name, revision=created["revision"], timeout_s=60)
    await scene.fabric.api.delete("http_loadbalancer", name)


LONG_S, QUICK_S = 600, 12
STORM_SITES, STORM_NODES = 10, 100

ROWS = (
    Row("destination gateway killed", "mesh", "only", _now(kill_envoy_of_b), CLUSTER),
    Row("destination gateway killed, another cluster serves too", "mesh", "both", _now(kill_envoy_of_b), CLUSTER),
    Row("destination gateway frozen, another cluster serves too", "mesh", "both", frozen_gateway, CLUSTER),
    Row("origin site frozen, another cluster serves too", "mesh", "both", frozen_site, CLUSTER),
    Row("origin node powered off, another cluster serves too", "mesh", "both", powered_off, CLUSTER),
    Row("one of three origin nodes killed", "nodes", "only", _now(lambda s: faults.kill([s.b.node]), lambda s: s.b.agent.start()), CLUSTER),
    Row("one of three origin nodes powered off", "nodes", "only", powered_off, CLUSTER),
    Row("all pods of the origin crash, another cluster serves too", "mesh", "both", pods_killed, CLUSTER),
    Row("origin scaled to zero while the control plane is frozen, HTTP and TCP", "mesh", "both", no_endpoints, CLUSTER),
    Row("whole origin cluster gone, another serves too", "mesh", "both", cluster_gone, CLUSTER),
    Row("link to one cluster cut by reset, another serves too", "mesh", "both", partial(link_to_b, how=faults.reset), TUNNEL),
    Row("link to one cluster drops everything, another serves too", "mesh", "both", partial(link_to_b, how=faults.silent), TUNNEL),
    Row("link to one cluster drops one direction, another serves too", "mesh", "both", partial(link_to_b, how=faults.dropped), TUNNEL),
    Row("direct tunnel cut by reset, edges left", "edges", "only", partial(link_to_b, how=faults.reset), TUNNEL),
    Row("edge killed, another left", "edges", "apart", edge_killed, TUNNEL),
    Row("direct tunnel drops everything, edges left", "edges", "only", partial(link_to_b, how=faults.silent), TUNNEL),
    Row("edge frozen, another left", "edges", "apart", edge_frozen, TUNNEL),
    Row("direct tunnel drops one direction, edges left", "edges", "only", partial(link_to_b, how=faults.dropped), TUNNEL),
    Row("edge powered off, another left", "edges", "apart", edge_powered_off, TUNNEL),
    Row("direct tunnel cannot be dialled, edges left", "edges", "only", partial(link_to_b, how=faults.undiallable), TUNNEL),
    Row("edge drained, another left", "edges", "apart", edge_drained, NOTHING),
    Row("direct tunnel flaps every two seconds, edges left", "edges", "only", flapping, TUNNEL, 60, 12),
    Row("an object that Envoy rejects, on a shared edge", "edges", "apart", poisoned_edge, NOTHING),
    Row("both edges gone, direct tunnel left", "edges", "only", both_edges_gone, NOTHING, settles_s=15),
    Row("both edges gone, nothing left", "edges", "apart", both_edges_gone, Aim(), settles_s=15),
    Row("origin site falls silent, to be evicted", "mesh", "both", partial(silent_site, policy="evict_lost_sites"), LOST),
    Row("origin site falls silent, to be used last", "mesh", "both", partial(silent_site, policy="deprioritize_lost_sites"), LOST),
    Row("origin site falls silent, to be kept", "mesh", "both", partial(silent_site, policy="keep_lost_sites"), NOTHING),
    Row("most sites fall silent at once, to be evicted", "mesh", "both", most_sites_silent, NOTHING),
    Row("agents killed", "mesh", "only", _now(kill_agents, start_agents), NOTHING),
    Row("Envoy of the caller killed", "mesh", "only", _now(kill_envoy_of_a), CLUSTER),
    Row("caller's node restarted without a control plane", "mesh", "only", node_restarts_alone, Aim(recovered_s=10)),
    Row("node certificates expire without a control plane", "brief", "only", certificates_expire, RENEWED),
    Row(
        "node certificates expire without a control plane, then tunnels are reset",
        "brief",
        "only",
        partial(certificates_expire, broken=True),
        Aim(caught_up_s=30, caught_up="renewed"),
    ),
    Row("control plane killed", "mesh", "only", _now(kill_replicas, start_replicas), NOTHING, LONG_S, QUICK_S),
    Row("control plane frozen", "mesh", "only", frozen_replicas, NOTHING, LONG_S, QUICK_S),
    Row("preferred control plane gone, another left", "mesh", "only", preferred_replica_gone, RETURNED),
    Row("Postgres gone", "mesh", "only", postgres_gone, NOTHING, LONG_S, QUICK_S),
    Row("Postgres restarted", "mesh", "only", _now(restart_postgres), NOTHING),
    Row("Postgres failed over to another server", "databases", "only", database_fails_over, NOTHING),
    Row("a replica with a stale cache wakes up alone", "mesh", "only", stale_replica, NOTHING),
    Row("an object that Envoy rejects, on a site", "mesh", "only", poisoned, NOTHING),
    Row("IPsec cut, SSL left", "ipsec", "only", partial(link_to_b, how=faults.without_ipsec), TUNNEL),
    Row("IKE daemon of the destination killed, SSL left", "ipsec", "only", _now(kill_charon), TUNNEL),
    Row("IKE daemon of the destination frozen, SSL left", "ipsec", "only", frozen_charon, TUNNEL),
    Row("1,000 agents reconnect at once", "mesh", "only", storm, Aim(failed=0, caught_up_s=60)),
)
