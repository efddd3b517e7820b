"""Fabrics in which things fail, with the load that crosses them."""

import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bench.load import Load
from lab.api import NAMESPACE
from lab.fabric import MESH, Fabric
from lab.site import Edge, Node, Site
from lab.specs import http_loadbalancer, k8s_pool, tcp_loadbalancer
from lab.wait import until

ECHO = (sys.executable, "-m", "lab.echo")
ALIVE = {
    "http_health_check": {"path": "/health", "use_origin_server_name": {}},
    "interval": 1,
    "timeout": 1,
    "healthy_threshold": 1,
    "unhealthy_threshold": 2,
}
CONNECTS = {"tcp_health_check": {}, "interval": 1, "timeout": 1, "healthy_threshold": 1, "unhealthy_threshold": 2}
HTTP_PORT = 8080
TCP_PORTS = {"only": 9000, "both": 9001, "apart": 9002}
SERVED_BY = {"only": ("b",), "both": ("b", "c")}
APART = {"only": ("b",), "apart": ("c",)}
"""Where c is in no mesh with a: only regional edges lead there."""

Say = Callable[[str], None]


@dataclass
class Scene:
    """Site `a` calls `only`, which b serves, and `both`, which b and c serve; with regional edges, `apart`, which c serves."""

    fabric: Fabric
    say: Say
    note: str = ""
    """What a row has to add to its figures."""
    caught_up_s: float | None = None
    """Its own figure, see `Outage`."""

    @property
    def a(self) -> Site:
        return self.fabric.site("a")

    @property
    def b(self) -> Site:
        return self.fabric.site("b")

    @property
    def c(self) -> Site:
        return self.fabric.site("c")

    @property
    def callers(self) -> tuple[Node, ...]:
        return self.a.nodes

    async def path(self, to: str) -> str:
        """How a reaches a site now, as the control plane tells it: `direct`, `reverse`, or the name of an edge."""
        answer = await self.fabric.api.request("GET", f"/api/data/namespaces/system/topology/path?from=a&to={to}")
        return str(answer["path"])

    async def edge_in_use(self) -> Edge:
        """By which a reaches c."""

        async def known() -> str:
            found = await self.path("c")
            return found if found in self.fabric.edges else ""

        return self.fabric.edge(await until(known, "a to reach c by an edge", within_s=60))

    async def settled(self, service: str) -> None:
        """Until nothing is left of the fault before: what can go directly does so again, which may take a minute."""
        if self.fabric.edges:
            wanted = {"only": ("b", {"direct"}), "apart": ("c", set(self.fabric.edges))}[service]

            async def is_so() -> bool:
                return await self.path(wanted[0]) in wanted[1]

            await until(is_so, f"a to reach {wanted[0]} by {' or '.join(sorted(wanted[1]))}", within_s=120, every_s=0.5)
        if self.fabric.ipsec:

            async def in_ipsec() -> bool:
                return await self.path("b") == "ipsec"

            await until(in_ipsec, "a to reach b by IPsec", within_s=120, every_s=0.5)

    def load(self, service: str) -> Load:
        return Load(self.callers, f"{service}.test", HTTP_PORT, TCP_PORTS[service])


@asynccontextmanager
async def mesh(say: Say) -> AsyncIterator[Scene]:
    """Three sites of one node in one site mesh group."""
    async with Fabric(("a", "b", "c"), replicas=2, progress=say) as fabric:
        yield await _furnished(Scene(fabric, say))


@asynccontextmanager
async def nodes(say: Say) -> AsyncIterator[Scene]:
    """The same, with three nodes at b."""
    async with Fabric(("a", "b", "c"), nodes={"b": 3}, progress=say) as fabric:
        yield await _furnished(Scene(fabric, say))


@asynccontextmanager
async def databases(say: Say) -> AsyncIterator[Scene]:
    """The control plane stores everything in one of two Postgres servers, of which one follows the other."""
    async with Fabric(("a", "b", "c"), standby=True, progress=say) as fabric:
        yield await _furnished(Scene(fabric, say))


@asynccontextmanager
async def edges(say: Say) -> AsyncIterator[Scene]:
    """Sites a and b are in a mesh, with two regional edges as their backup; c is reached through these alone."""
    async with Fabric(("a", "b", "c"), edges=("e1", "e2"), mesh=False, progress=say) as fabric:
        members = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["ves.io/siteName in (a, b)"]}}
        await fabric.api.create("namespace", NAMESPACE, {})
        await fabric.api.create("virtual_site", "all", members, namespace="shared")
        await fabric.api.create("site_mesh_group", "all", {**MESH, "enable_re_fallback": {}})
        yield await _furnished(Scene(fabric, say), APART)


@asynccontextmanager
async def ipsec(say: Say) -> AsyncIterator[Scene]:
    """Two sites that are joined by IPsec, with SSL as its backup."""
    async with Fabric(("a", "b"), ipsec=("a", "b"), progress=say) as fabric:
        yield await _furnished(Scene(fabric, say), {"only": ("b",)})


@asynccontextmanager
async def brief(say: Say) -> AsyncIterator[Scene]:
    """Two sites whose certificates are valid for half a minute."""
    async with Fabric(("a", "b"), controlplane_env={"CONTROLPLANE_NODE_CERTIFICATE_LIFE_S": "30"}, progress=say) as fabric:
        yield await _furnished(Scene(fabric, say), {"only": ("b",)})


async def _furnished(scene: Scene, served_by: Mapping[str, Sequence[str]] = SERVED_BY) -> Scene:
    api = scene.fabric.api
    await api.create("healthcheck", "alive", ALIVE)
    await api.create("healthcheck", "connects", CONNECTS)
    for name, sites in served_by.items():
        for site in sites:
            await scene.fabric.site(site).cluster.deploy(name, ECHO)
            await scene.fabric.site(site).cluster.deploy(f"{name}-bytes", [*ECHO, "--tcp"], port=9000)
        await api.create("origin_pool", name, k8s_pool(name, sites, healthcheck=[{"name": "alive"}]))
        await api.create("origin_pool", f"{name}-bytes", k8s_pool(f"{name}-bytes", sites, port=9000, healthcheck=[{"name": "connects"}]))
        await api.create("http_loadbalancer", name, http_loadbalancer(f"{name}.test", [name], ["a"], HTTP_PORT))
        await api.create("tcp_loadbalancer", f"{name}-bytes", tcp_loadbalancer([f"{name}-bytes"], ["a"], TCP_PORTS[name]))
        await api.applied("http_loadbalancer", name)
        await api.applied("tcp_loadbalancer", f"{name}-bytes")
    return scene


SCENES = {"mesh": mesh, "edges": edges, "nodes": nodes, "databases": databases, "ipsec": ipsec, "brief": brief}
