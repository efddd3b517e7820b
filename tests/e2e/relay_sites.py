"""Sites of two tenants and two regional edges, each an Envoy alone, with a forwarder before every gateway that can cut, freeze and record."""

from collections.abc import AsyncIterator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from agent.envoy.inputs import Item, PeerView
from agent.protocol.items import Edge, ExportUse, Gateway, ItemKind, Peer, Relay
from agent.protocol.peering import PEER_HEALTH_PATH, PROBE_PATH_HEADER
from controlplane import pki
from lab.forwarder import Forwarder
from lab.network import Place
from tests.e2e.dataplane_sites import (
    TRUST_DOMAIN,
    WORKERS,
    LiveSite,
    Pod,
    Trust,
    export,
    forward,
    free_port,
    http,
    http_pod,
    item,
    listener,
    live_site,
    pool,
    until,
)

PAYLOAD = bytes(300_000)
"""More than what goes by a path for other reasons."""
OTHER_TENANT = "0b000000-0000-4000-8000-000000000002"


@dataclass(eq=False)
class Relayed:
    """`a` calls and `b` serves `shop/cart` to it, directly or through the edges `e` and `f`; `x` is another tenant's, and none of theirs."""

    a: LiveSite
    b: LiveSite
    x: LiveSite
    e: LiveSite
    f: LiveSite
    taps: Mapping[LiveSite, Forwarder]
    pod: Pod
    port: int
    client: httpx.AsyncClient
    stack: AsyncExitStack
    threads: ThreadPoolExecutor
    edges: Trust
    ports: dict[str, int] = field(default_factory=dict)
    """Of load balancers at `a` that a test adds."""

    @property
    def sites(self) -> tuple[LiveSite, ...]:
        return (self.e, self.f, self.b, self.a, self.x)

    async def apply(self) -> None:
        for site in self.sites:
            await site.apply()

    def gateway(self, site: LiveSite) -> Gateway:
        """As others dial it."""
        host, port = self.taps[site].address
        return replace_gateway(site.gateway, host, port)

    def peer(self, site: LiveSite, **fields: Any) -> Item:
        fields = {"gateways": (self.gateway(site),), "edges": (self.e.site_id, self.f.site_id), **fields}
        return item(ItemKind.PEER, site.site_id, Peer(site_id=site.site_id, name=site.name, **fields))

    def edge(self, site: LiveSite, **fields: Any) -> Item:
        fields = {"home": True, **fields}
        return item(ItemKind.EDGE, site.site_id, Edge(site_id=site.site_id, name=site.name, gateways=(self.gateway(site),), **fields))

    def relays(self, *sites: LiveSite) -> None:
        """Both edges relay for these and no others."""
        for edge in (self.e, self.f):
            for tenant in {self.a.trust, self.x.trust}:
                ids = tuple(sorted(site.site_id for site in sites if site.trust is tenant))
                edge.knows(relay(tenant, ids))

    async def paths(self, **usable: bool) -> None:
        """What `a` thinks of its paths to `b`, by `direct`, `reverse`, `e` and `f`."""
        named = {"e": self.e.site_id, "f": self.f.site_id}
        view = PeerView(reachable=True, paths={named.get(path, path): use for path, use in usable.items()})
        self.a.sees({self.b.site_id: view} if usable else {})
        await self.a.apply()

    async def used(self) -> set[str]:
        """Names of the sites whose forwarder a request goes through."""
        recorded = {site.name: tap.record() for site, tap in self.taps.items()}
        assert (await self.call(method="POST", content=PAYLOAD)).status_code == 200
        return {name for name, seen in recorded.items() if len(seen) > len(PAYLOAD)}

    async def settles(self, name: str) -> None:
        """Until requests go through that forwarder."""

        async def does() -> bool:
            return await self.used() == {name}

        await until(does, f"requests to go through {name}")

    async def uses(self, name: str, **usable: bool) -> None:
        """Let `a` choose among these paths, until requests go through that forwarder."""

        async def does() -> bool:
            for other in ("e", "f"):
                await self.paths(direct=False, reverse=False, **{other: False})
            await self.paths(**usable)
            return await self.used() == {name}

        await until(does, f"requests to go through {name}")

    async def call(
        self, path: str = "/", *, port: int = 0, at: LiveSite | None = None, host: str = "shop.test", **fields: Any
    ) -> httpx.Response:
        where = f"http://{(at or self.a).host}:{port or self.port}{path}"
        return await self.client.request(fields.pop("method", "GET"), where, headers={"host": host, **fields.pop("headers", {})}, **fields)

    async def answers(self, **fields: Any) -> None:
        async def succeeded() -> bool:
            return (await self.call(**fields)).status_code == 200

        await until(succeeded, "an answer")

    async def probe(self, path: str, site: LiveSite | None = None) -> int:
        """The status with which `b`, or the site, answers by the path."""
        transport = httpx.AsyncHTTPTransport(uds=str(self.a.run_dir / "probe.sock"))
        async with httpx.AsyncClient(transport=transport, timeout=5) as client:
            headers = {PROBE_PATH_HEADER: path} if path else {}
            return (await client.get(f"http://{(site or self.b).site_id}{PEER_HEALTH_PATH}", headers=headers)).status_code

    async def leads(self, path: str) -> None:
        async def answered() -> bool:
            return await self.probe(path) == 200

        await until(answered, f"path {path} to lead to b")

    @asynccontextmanager
    async def node(self, site: LiveSite, number: int) -> AsyncIterator[LiveSite]:
        """Another node of the site, that serves the same and cannot be dialled."""
        async with live_site(f"{site.name}{number}", number, site.trust, edges=self.edges, site_id=site.site_id) as node:
            node.knows(*site.snapshot.items.values())
            node.local = replace(node.local, endpoints=site.local.endpoints, workers=WORKERS)
            await node.apply()
            yield node

    async def accepted(self, edge: LiveSite, node: LiveSite) -> bool:
        """Whether the edge has tunnels of that node."""
        return bool(
            (await edge.proxy.admin.get(f"/stats?filter=^accepted_tunnels.*{node.local.node.node_id}.{node.site_id}&usedonly")).strip()
        )

    async def tunnels(self, site: LiveSite, other: LiveSite) -> int:
        """How many reverse tunnels a site has open to the other, by its own count."""
        text = await site.proxy.admin.get(rf"/stats?filter=^dialled_tunnels\.worker_\d%2B\.cluster\.tunnels\|{other.site_id}\.connected$")
        return sum(int(line.rpartition(":")[2]) for line in text.splitlines() if line)


def relay(tenant: Trust, sites: Iterable[str]) -> Item:
    body = Relay(tenant_id=tenant.tenant_id, anchor_pem=tenant.authority.certificate_pem, sites=tuple(sites))
    return item(ItemKind.RELAY, tenant.tenant_id, body)


def replace_gateway(gateway: Gateway, host: str, port: int) -> Gateway:
    return gateway.model_copy(update={"host": host, "port": port})


@asynccontextmanager
async def forwarder(site: LiveSite, threads: ThreadPoolExecutor, host: str = "") -> AsyncIterator[Forwarder]:
    """Before the site's gateway, at an address of the site unless told otherwise."""
    place = Place(site.name, None, site.host, site.host, site.host, site.host, site.host, threads)
    tap = Forwarder(place.listen(host or site.host), place, (site.gateway.host, site.gateway.port))
    await tap.start()
    try:
        yield tap
    finally:
        await tap.cut()  # whoever dials again and again is refused at once
        await tap.stop()


@asynccontextmanager
async def relayed(number: int, **log_levels: str) -> AsyncIterator[Relayed]:
    """`number` keeps the addresses of worlds apart. All that there is leads from `a` to `b`; see that it does with `leads`."""
    root = pki.create_root(TRUST_DOMAIN, Trust.now())
    ours, theirs, edges = Trust.create(root=root), Trust.create(OTHER_TENANT, root), Trust.of_edges(root)
    async with AsyncExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(1))
        sites: dict[str, LiveSite] = {}
        for place, (name, trust) in enumerate({"a": ours, "b": ours, "x": theirs, "e": edges, "f": edges}.items(), number):
            sites[name] = await stack.enter_async_context(
                live_site(name, place, trust, edges=edges, log_level=log_levels.get(name, "warning"))
            )
            sites[name].local = replace(sites[name].local, workers=WORKERS)
        taps = {site: await stack.enter_async_context(forwarder(site, threads)) for site in sites.values()}
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=10))
        pod = await stack.enter_async_context(http_pod("b1", sites["b"].host))
        a, b, x, e, f = sites.values()
        world = Relayed(a, b, x, e, f, taps, pod, free_port(a.host), client, stack, threads, edges)
        world.relays(a, b, x)
        for site in (a, b, x):
            site.knows(world.edge(world.e), world.edge(world.f), pool("shop/cart", b.site_id))
        a.knows(world.peer(b), http("shop/front", "shop.test", forward("shop/cart")), listener(world.port, "shop/front"))
        b.knows(world.peer(a), export("shop/cart", use(a)))
        b.endpoints("shop/cart", "pods", [pod.endpoint])
        await world.apply()
        await world.answers()
        yield world


def use(*callers: LiveSite, load_balancer: str = "shop/front", protocol: Any = "http", edges: tuple[str, ...] = ()) -> ExportUse:
    return ExportUse(load_balancer=load_balancer, protocol=protocol, peers=tuple(site.site_id for site in callers), edges=edges)
