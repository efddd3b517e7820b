"""Sites that consist of an Envoy alone, and pods, on loopback addresses: what `render` makes is judged by what goes through it."""

import asyncio
import json
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h11
import httpx
from cryptography import x509

from agent.envoy.bootstrap import bootstrap
from agent.envoy.inputs import Addresses, AgentSnapshot, Endpoint, Item, ItemId, LocalState, NodeIdentity, OriginId, PeerView
from agent.envoy.render import render
from agent.protocol.base import Body, content_hash
from agent.protocol.items import (
    EDGES,
    Export,
    ExportUse,
    Forward,
    Gateway,
    HttpLoadBalancer,
    ItemKind,
    LabelRequirement,
    Listener,
    Origin,
    OriginPool,
    Peer,
    PodSelector,
    Policy,
    PolicyRule,
    Route,
    RouteMatch,
    Site,
    TcpLoadBalancer,
    WeightedPool,
)
from agent.proxy import LISTENER_DRAIN_S, Proxy, find_envoy
from agent.xds import Outcome, XdsServer
from controlplane import pki

TENANT = "0a000000-0000-4000-8000-000000000001"
TRUST_DOMAIN = "fabric.test"
WORKERS = 2
"""Of each Envoy."""


@dataclass(frozen=True)
class Trust:
    """The authority of one tenant, or of regional edges."""

    tenant_id: str
    authority: pki.Authority

    @staticmethod
    def now() -> datetime:
        return datetime.now(UTC)  # noqa: TID251  # a test is an edge

    @classmethod
    def create(cls, tenant_id: str = TENANT, root: pki.Authority | None = None) -> "Trust":
        root = root or pki.create_root(TRUST_DOMAIN, cls.now())
        return cls(tenant_id, pki.create_tenant_authority(root, tenant_id, TRUST_DOMAIN, cls.now()))

    @classmethod
    def of_edges(cls, root: pki.Authority) -> "Trust":
        return cls(EDGES, pki.create_edges_authority(root, TRUST_DOMAIN, cls.now()))

    def node(self, site_id: str, site_name: str) -> NodeIdentity:
        key = pki.create_key()
        identity = pki.NodeIdentity(TRUST_DOMAIN, self.tenant_id, site_id, f"node-of-{site_name}")
        certificate = pki.issue_node(self.authority, identity, key.public_key(), self.now())
        return NodeIdentity(
            node_id=identity.node_id,
            node_name="n1",
            site_id=site_id,
            site_name=site_name,
            certificate_pem=pki.to_pem(certificate),
            private_key_pem=pki.private_key_pem(key),
        )


def item(kind: ItemKind, key: str, body: Body) -> Item:
    return Item(ItemId(kind, key), content_hash(body.canonical()), body)


def site_of(live: "LiveSite", **changed: object) -> Item:
    (known,) = [each for each in live.snapshot.items.values() if each.id.kind is ItemKind.SITE]
    return item(ItemKind.SITE, live.site_id, known.body.model_copy(update=changed))


def serial(node: NodeIdentity) -> int:
    return x509.load_pem_x509_certificate(node.certificate_pem.encode()).serial_number


def pool(key: str, *sites: str, **fields: Any) -> Item:
    """One origin, `pods`, at these sites."""
    origin = Origin(key="pods", type="k8s_service", service=f"{key.partition('/')[2]}.shop", port=80, sites=tuple(sorted(sites)))
    return item(ItemKind.ORIGIN_POOL, key, OriginPool(origins=(origin,), **fields))


def forward(*pools: str | WeightedPool, **fields: Any) -> Forward:
    weighted = tuple(pool if isinstance(pool, WeightedPool) else WeightedPool(pool=pool) for pool in pools)
    return Forward(pools=weighted, **fields)


def http(key: str, domain: str, *routes: Route | Forward, **fields: Any) -> Item:
    """A Forward stands for the default route."""
    normal = tuple(route if isinstance(route, Route) else Route(match=RouteMatch(prefix="/"), forward=route) for route in routes)
    return item(ItemKind.HTTP_LOADBALANCER, key, HttpLoadBalancer(domains=(domain,), routes=normal, **fields))


def tcp(key: str, *pools: str | WeightedPool, **fields: Any) -> Item:
    return item(ItemKind.TCP_LOADBALANCER, key, TcpLoadBalancer(pools=forward(*pools).pools, **fields))


def listener(port: int, *load_balancers: str, protocol: Any = "http") -> Item:
    body = Listener(network="inside", port=port, protocol=protocol, load_balancers=load_balancers)
    return item(ItemKind.LISTENER, f"inside/*/{port}", body)


def export(key: str, *uses: ExportUse) -> Item:
    return item(ItemKind.EXPORT, key, Export(pool=key, uses=uses))


def policy(key: str, *rules: PolicyRule, default: Any = None) -> Item:
    return item(ItemKind.POLICY, key, Policy(rules=rules, default=default))


def labelled(key: str, value: str) -> PodSelector:
    return PodSelector(requirements=(LabelRequirement(key=key, operator="in", values=(value,)),))


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(eq=False)
class LiveSite:
    """An Envoy with what it is told."""

    name: str
    site_id: str
    host: str
    trust: Trust
    run_dir: Path
    xds: XdsServer
    proxy: Proxy
    local: LocalState
    gateway: Gateway
    snapshot: AgentSnapshot = field(default_factory=AgentSnapshot)

    async def apply(self) -> Outcome:
        """Render, hand over, and wait until nothing is warming."""
        resources = render(self.snapshot, self.local)
        assert resources.problems == (), resources.problems
        outcome = await self.xds.apply(resources)
        assert outcome.accepted, outcome
        await until(self._nothing_warms, "nothing warming")
        return outcome

    async def _nothing_warms(self) -> bool:
        return await self.proxy.admin.warming() == 0

    def knows(self, *items: Item) -> None:
        self.snapshot = self.snapshot.with_items(items)

    def peer(self) -> Item:
        return item(ItemKind.PEER, self.site_id, Peer(site_id=self.site_id, name=self.name, gateways=(self.gateway,)))

    def endpoints(self, pool: str, origin: str, endpoints: Iterable[Endpoint]) -> None:
        known = {**self.local.endpoints, OriginId(pool, origin): tuple(sorted(endpoints))}
        self.local = replace(self.local, endpoints=known)

    def pods(self, found: Mapping[PodSelector, tuple[str, ...] | None]) -> None:
        """Addresses for which each selector holds."""
        self.local = replace(self.local, pods={selector.id: addresses for selector, addresses in found.items()})

    def sees(self, peers: Mapping[str, PeerView]) -> None:
        self.local = replace(self.local, peers=peers)


@asynccontextmanager
async def live_site(
    name: str,
    number: int,
    trust: Trust,
    *,
    edges: Trust | None = None,
    host: str | None = None,
    site_id: str = "",
    log_level: str = "warning",
) -> AsyncIterator[LiveSite]:
    """`number`, of one digit, gives the site an id in a shard of its own, unless it is a node of another one, and a loopback address. With `trust` of edges it is one."""
    host = host or f"127.{60 + number}.0.1"
    site_id = site_id or f"{number:0<8}-0000-4000-8000-000000000000"
    run_dir = Path(tempfile.mkdtemp(prefix="isth-"))
    node = trust.node(site_id, name)
    gateway = Gateway(node_id=node.node_id, host=host, port=free_port(host), workers=WORKERS)
    addresses = Addresses(gateway_host=host, gateway_port=gateway.port, inside=host, outside=host)
    local = LocalState(node=node, addresses=addresses, run_dir=str(run_dir))
    connected = asyncio.Event()
    xds = XdsServer(run_dir / "xds.sock", connected.set)
    await xds.start()
    log = run_dir / "envoy.log"
    proxy = Proxy(find_envoy(None), run_dir, log, bootstrap(node, str(run_dir)), concurrency=WORKERS, log_level=log_level, drain_s=0)
    running = asyncio.create_task(proxy.run())
    site = LiveSite(name, site_id, host, trust, run_dir, xds, proxy, local, gateway)
    site.knows(
        item(
            ItemKind.SITE,
            site_id,
            Site(
                tenant_id=trust.tenant_id,
                tenant="acme",
                site_id=site_id,
                name=name,
                kind="regional_edge" if trust.tenant_id == EDGES else "customer_edge",
                trust_domain=TRUST_DOMAIN,
                peer_anchor_pem="" if trust.tenant_id == EDGES else trust.authority.certificate_pem,
                edge_anchor_pem=edges.authority.certificate_pem if edges else "",
            ),
        )
    )
    try:
        async with asyncio.timeout(20):
            await connected.wait()
        yield site
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await proxy.stop()
        await proxy.admin.close()
        await xds.stop()
        shutil.rmtree(run_dir)


async def until(condition: Callable[[], Awaitable[Any]], what: str, *, within_s: float = 15) -> Any:
    """The first true result; a refused connection counts as not yet."""
    last: object = None
    try:
        async with asyncio.timeout(within_s):
            while True:
                try:
                    if last := await condition():
                        return last
                except (OSError, httpx.TransportError) as error:
                    last = error
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"after {within_s:g} s still waiting for {what}; last: {last!r}") from None


@dataclass
class Pod:
    """Answers every HTTP/1.1 request with what it saw, as JSON; knows a few paths that misbehave."""

    name: str
    endpoint: Endpoint
    seen: list[dict[str, Any]] = field(default_factory=list)
    most_header_bytes: int = 64 << 10

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, self.most_header_bytes)
        try:
            while (request := await _request(connection, reader)) is not None:
                if not await self._answer(connection, request, reader, writer):
                    break
                connection.start_next_cycle()
        except (h11.RemoteProtocolError, h11.LocalProtocolError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()

    async def _answer(
        self, connection: h11.Connection, request: h11.Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        headers = {name.decode(): value.decode() for name, value in request.headers}
        path = request.target.decode()
        self.seen.append({"pod": self.name, "method": request.method.decode(), "path": path, "headers": headers})
        if path.startswith("/reset"):
            return False
        if headers.get("upgrade") == "websocket":
            return await self._echo(connection, reader, writer)
        status = int(path.partition("/status/")[2] or 200)
        body = json.dumps(self.seen[-1]).encode()
        extra = [("x-isthmus-failed", "unreached")] if path.startswith("/marker") else []
        head = h11.Response(status_code=status, headers=[("content-length", str(len(body))), ("x-pod", self.name), *extra])
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            writer.write(connection.send(event) or b"")
        await writer.drain()
        return connection.our_state is h11.DONE

    async def _echo(self, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """As good as a WebSocket to a proxy: bytes both ways after 101."""
        upgraded = h11.InformationalResponse(status_code=101, headers=[("upgrade", "websocket"), ("connection", "upgrade")])
        writer.write(connection.send(upgraded) or b"")
        early, _ = connection.trailing_data
        writer.write(early)
        while data := await reader.read(65536):
            writer.write(data)
        return False


async def _request(connection: h11.Connection, reader: asyncio.StreamReader) -> h11.Request | None:
    request: h11.Request | None = None
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Request):
            request = event
        elif event is h11.PAUSED or isinstance(event, h11.EndOfMessage):
            return request
        elif isinstance(event, h11.ConnectionClosed):
            return None


@asynccontextmanager
async def http_pod(name: str, host: str) -> AsyncIterator[Pod]:
    pod = Pod(name, Endpoint(host, free_port(host)))
    server = await asyncio.start_server(pod.serve, host, pod.endpoint.port)
    try:
        yield pod
    finally:
        server.close()


Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def upgraded(address: str, port: int, host: str) -> Connection:
    """A WebSocket to a load balancer."""
    reader, writer = await asyncio.open_connection(address, port)
    writer.write(f"GET / HTTP/1.1\r\nhost: {host}\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n".encode())
    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def spoken(connection: Connection) -> bytes:
    """What comes back of a word."""
    reader, writer = connection
    writer.write(b"?")
    return await reader.read(1)


async def ended(connection: Connection) -> None:
    """Wait until the other end has closed it, as it does some time after its listener has changed."""
    async with asyncio.timeout(LISTENER_DRAIN_S + 10):
        with suppress(ConnectionError):
            assert await connection[0].read(1) == b""


@asynccontextmanager
async def tcp_pod(host: str, serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> AsyncIterator[Endpoint]:
    endpoint = Endpoint(host, free_port(host))
    server = await asyncio.start_server(serve, host, endpoint.port)
    try:
        yield endpoint
    finally:
        server.close()


@dataclass
class World:
    """Three sites, and the ports of `a`."""

    a: LiveSite
    b: LiveSite
    c: LiveSite
    stack: AsyncExitStack
    http_port: int
    client: httpx.AsyncClient
    pods: dict[str, Pod] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    async def pod(self, site: LiveSite, name: str) -> Pod:
        self.pods[name] = await self.stack.enter_async_context(http_pod(name, site.host))
        return self.pods[name]

    def shared(self, *items: Item) -> None:
        """What all three sites know."""
        for site in (self.a, self.b, self.c):
            site.knows(*items)

    def listens(self, *load_balancers: Item) -> None:
        """Load balancers at the HTTP port of `a`."""
        self.names += [item.id.key for item in load_balancers if item.id.key not in self.names]
        self.a.knows(*load_balancers, listener(self.http_port, *self.names))

    async def apply(self) -> None:
        await self.c.apply()
        await self.b.apply()
        await self.a.apply()

    async def call(self, host: str, path: str = "/", method: str = "GET", **fields: Any) -> httpx.Response:
        headers = {"host": host, **fields.pop("headers", {})}
        return await self.client.request(method, f"http://{self.a.host}:{self.http_port}{path}", headers=headers, **fields)

    async def answers(self, host: str, path: str = "/", **fields: Any) -> httpx.Response:
        """Once the first request succeeds: paths between sites take a moment to be found healthy."""

        async def succeeded() -> httpx.Response | None:
            reply = await self.call(host, path, **fields)
            return reply if reply.status_code == 200 else None

        reply: httpx.Response = await until(succeeded, f"{host} answering")
        return reply

    def use(self, load_balancer: str, protocol: Any = "http", **fields: Any) -> ExportUse:
        return ExportUse(load_balancer=load_balancer, protocol=protocol, peers=(self.a.site_id,), **fields)

    async def single_pool(self, name: str, *sites: LiveSite, lb: dict[str, Any] | None = None, **fields: Any) -> str:
        """A pool of its own with a load balancer of its own, exported by the sites other than `a`; returns the host."""
        key, host = f"shop/{name}", f"{name}.test"
        self.shared(pool(key, *(site.site_id for site in sites), **fields))
        self.listens(http(key, host, forward(key), **(lb or {})))
        for site in sites:
            if site is not self.a:
                site.knows(export(key, self.use(key)))
        return host


@asynccontextmanager
async def three_sites(trust: Trust | None = None) -> AsyncIterator[World]:
    """With two pods each in `b` and `c`, behind the load balancer `shop/front` for `shop.test` at `a`."""
    trust = trust or Trust.create()
    async with AsyncExitStack() as stack:
        a, b, c = [await stack.enter_async_context(live_site(name, number, trust)) for number, name in enumerate("abc", 1)]
        client = await stack.enter_async_context(httpx.AsyncClient(timeout=10))
        world = World(a, b, c, stack, free_port(a.host), client)
        world.shared(a.peer(), b.peer(), c.peer())
        for site in (a, b, c):
            site.snapshot = site.snapshot.without([site.peer().id])
        for site in (b, c):
            for number in (1, 2):
                pod = await world.pod(site, f"{site.name}{number}")
                known = site.local.endpoints.values()
                site.endpoints("shop/cart", "pods", [*(endpoint for some in known for endpoint in some), pod.endpoint])
        world.shared(pool("shop/cart", b.site_id, c.site_id))
        world.listens(http("shop/front", "shop.test", forward("shop/cart")))
        for site in (b, c):
            site.knows(export("shop/cart", world.use("shop/front")))
        await world.apply()
        await world.answers("shop.test")
        yield world
