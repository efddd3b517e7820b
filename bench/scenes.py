"""Fabrics in which things fail, with the load that crosses them."""

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from bench.load import Load
from lab.fabric import Fabric
from lab.site import Node, Site
from lab.specs import http_loadbalancer, k8s_pool, tcp_loadbalancer

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
TCP_PORTS = {"only": 9000, "both": 9001}
SERVED_BY = {"only": ("b",), "both": ("b", "c")}

Say = Callable[[str], None]


@dataclass
class Scene:
    """Site `a` calls `only`, which b serves, and `both`, which b and c serve."""

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


async def _furnished(scene: Scene) -> Scene:
    api = scene.fabric.api
    await api.create("healthcheck", "alive", ALIVE)
    await api.create("healthcheck", "connects", CONNECTS)
    for name, sites in SERVED_BY.items():
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


SCENES = {"mesh": mesh, "nodes": nodes, "databases": databases}
