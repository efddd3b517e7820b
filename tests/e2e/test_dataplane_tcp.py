"""TCP between three sites: `a` is where connections enter, `b` and `c` serve."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from agent.envoy.inputs import Endpoint, PeerView, body
from agent.protocol.items import NAMESPACE_LABEL, ItemKind, Origin, OriginPool, OriginTls, Policy, PolicyRule, WeightedPool
from tests.e2e.certificates import Authority
from tests.e2e.dataplane_sites import (
    LiveSite,
    World,
    export,
    free_port,
    item,
    labelled,
    listener,
    policy,
    pool,
    tcp,
    tcp_pod,
    three_sites,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with three_sites() as world:
        yield world


def named(name: str) -> Serve:
    """Says its name, then repeats what it hears until the client is done, and says goodbye after that."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(name.encode())
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write(b"bye")
        writer.close()

    return serve


async def hangs_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Ends its half after a greeting, as servers that close first do."""
    writer.write(b"hello")
    writer.close()


async def tcp_service(world: World, name: str, pods: dict[LiveSite, Serve], **fields: object) -> int:
    """A pool with one pod at each of the sites, and a load balancer at a port of `a`, which is returned."""
    key, port = f"shop/{name}", free_port(world.a.host)
    world.shared(pool(key, *(site.site_id for site in pods), **fields.pop("pool", {})))  # type: ignore[arg-type]  # a dict of fields
    for site, serve in pods.items():
        endpoint = await world.stack.enter_async_context(tcp_pod(site.host, serve))
        site.endpoints(key, "pods", [endpoint])
        if site is not world.a:
            site.knows(export(key, world.use(key, "tcp")))
    world.a.knows(tcp(key, key, **fields), listener(port, key, protocol="tcp"))
    await world.apply()
    return port


async def greeting(world: World, port: int, length: int = 1, *, source: str = "") -> str:
    """What the server says first; empty if the connection is closed without a word."""
    reader, writer = await asyncio.open_connection(world.a.host, port, local_addr=(source, 0) if source else None)
    try:
        async with asyncio.timeout(5):
            return (await reader.readexactly(length)).decode()
    except (asyncio.IncompleteReadError, ConnectionError):
        return ""
    finally:
        writer.close()


async def greeted(world: World, port: int) -> str:
    """The first greeting: paths between sites take a moment to be found healthy."""

    async def condition() -> str:
        return await greeting(world, port)

    answer: str = await until(condition, f"port {port} answering")
    return answer


async def test_bytes_cross_and_both_halves_close_on_their_own(world: World) -> None:
    port = await tcp_service(world, "echo", {world.b: named("b")})
    assert await greeted(world, port) == "b"
    reader, writer = await asyncio.open_connection(world.a.host, port)
    assert await reader.readexactly(1) == b"b"
    sent = bytes(range(256)) * 8192
    writer.write(sent)
    writer.write_eof()
    assert await reader.read(-1) == sent + b"bye"
    writer.close()


async def test_a_server_that_closes_first_is_heard_out(world: World) -> None:
    port = await tcp_service(world, "first", {world.b: hangs_up})
    await greeted(world, port)
    reader, writer = await asyncio.open_connection(world.a.host, port)
    async with asyncio.timeout(5):
        assert await reader.read(-1) == b"hello"
    writer.close()


async def test_connections_are_spread_over_sites_by_weight(world: World) -> None:
    port = await tcp_service(world, "spread", {world.b: named("b"), world.c: named("c")})
    await greeted(world, port)
    exports = {world.b: 1, world.c: 3}
    world.a.sees({site.site_id: PeerView(reachable=True, exports={"shop/spread": healthy}) for site, healthy in exports.items()})
    await world.a.apply()
    answers = [await greeting(world, port) for _ in range(60)]
    assert 30 <= answers.count("c") <= 58
    assert answers.count("b") + answers.count("c") == 60
    world.a.sees({world.c.site_id: PeerView(reachable=True, exports={"shop/spread": 0})})
    await world.a.apply()

    async def avoided() -> bool:
        return {await greeting(world, port) for _ in range(6)} == {"b"}

    await until(avoided, "nobody to be sent to c")
    world.a.sees({})
    await world.a.apply()


async def test_local_pods_are_preferred_until_none_is_left(world: World) -> None:
    both = {world.a: named("a"), world.b: named("b")}
    port = await tcp_service(world, "near-tcp", both, pool={"selection": "LOCAL_PREFERRED"})
    assert await greeted(world, port) == "a"
    world.a.endpoints("shop/near-tcp", "pods", [])
    await world.a.apply()

    async def moved() -> bool:
        return await greeting(world, port) == "b"

    await until(moved, "b to serve")


async def test_a_dead_pod_is_skipped(world: World) -> None:
    port = await tcp_service(world, "half-dead-tcp", {world.b: named("b")})
    await greeted(world, port)
    alive = next(endpoints for origin, endpoints in world.b.local.endpoints.items() if origin.pool == "shop/half-dead-tcp")
    world.b.endpoints("shop/half-dead-tcp", "pods", [*alive, Endpoint(world.b.host, free_port(world.b.host))])
    await world.b.apply()
    assert {await greeting(world, port) for _ in range(10)} == {"b"}


async def test_a_pool_of_lower_priority_stands_by(world: World) -> None:
    await tcp_service(world, "one", {world.b: named("b")})
    await tcp_service(world, "two", {world.c: named("c")})
    for site, key in ((world.b, "shop/one"), (world.c, "shop/two")):
        site.knows(export(key, world.use(key, "tcp"), world.use("shop/ranked-tcp", "tcp")))
    port = free_port(world.a.host)
    pools = (WeightedPool(pool="shop/one", priority=1), WeightedPool(pool="shop/two", priority=2))
    world.a.knows(tcp("shop/ranked-tcp", *pools), listener(port, "shop/ranked-tcp", protocol="tcp"))
    await world.apply()
    assert await greeted(world, port) == "b"
    world.a.sees({world.b.site_id: PeerView(reachable=False)})
    await world.a.apply()

    async def stood_in() -> bool:
        return await greeting(world, port) == "c"

    await until(stood_in, "c to stand in")
    world.a.sees({})
    await world.a.apply()


async def test_connections_are_spread_over_pools_by_weight(world: World) -> None:
    await tcp_service(world, "heavy", {world.b: named("b")})
    await tcp_service(world, "light", {world.c: named("c")})
    for site, key in ((world.b, "shop/heavy"), (world.c, "shop/light")):
        site.knows(export(key, world.use(key, "tcp"), world.use("shop/weighted-tcp", "tcp")))
    port = free_port(world.a.host)
    pools = (WeightedPool(pool="shop/heavy", weight=3), WeightedPool(pool="shop/light", weight=1))
    world.a.knows(tcp("shop/weighted-tcp", *pools), listener(port, "shop/weighted-tcp", protocol="tcp"))
    await world.apply()
    await greeted(world, port)
    answers = [await greeting(world, port) for _ in range(60)]
    assert 30 <= answers.count("b") <= 58
    assert answers.count("b") + answers.count("c") == 60


RULES = {
    "anyone": (PolicyRule(name="r", action="ALLOW", prefixes=("0.0.0.0/0",)), True),
    "someone-else": (PolicyRule(name="r", action="ALLOW", prefixes=("203.0.113.7",)), False),
    "all-but-one": (PolicyRule(name="r", action="ALLOW", prefixes=("203.0.113.7/32",), prefixes_invert=True), True),
    "other-site": (PolicyRule(name="r", action="ALLOW", sites=()), False),
    "a-path": (PolicyRule(name="r", action="ALLOW", path_prefixes=("/",)), False),
}


@pytest.mark.parametrize("place", ["ingress", "destination"])
async def test_policies_hold_where_connections_enter_and_again_where_they_are_served(world: World, place: str) -> None:
    name = f"judged-tcp-{place}"
    key = f"shop/{name}"
    port = await tcp_service(world, name, {world.b: named("b")})
    await greeted(world, port)
    for case, (rule, allowed) in RULES.items():
        rules = policy(f"shop/tcp-rules-{place}", rule)
        if place == "ingress":
            world.a.knows(rules, tcp(key, key, policies=(rules.id.key,)))
        else:
            world.b.knows(rules, export(key, world.use(key, "tcp", policies=(rules.id.key,))))
        await world.apply()

        async def judged(allowed: bool = allowed) -> bool:
            return bool(await greeting(world, port)) is allowed

        await until(judged, case)


WEB, SHOP = labelled("app", "web"), labelled(NAMESPACE_LABEL, "shop")


@pytest.mark.parametrize("place", ["ingress", "destination"])
async def test_policies_tell_pods_apart_before_a_server_speaks(world: World, place: str) -> None:
    name = f"pods-tcp-{place}"
    key = f"shop/{name}"
    web, batch, outside = "127.92.0.1", "127.92.0.2", "127.92.0.3"
    port = await tcp_service(world, name, {world.b: named("b")})
    await greeted(world, port)
    rules = policy(key, PolicyRule(name="web", action="ALLOW", pods=WEB), PolicyRule(name="shop", action="DENY", pods=SHOP))
    open_to_all = policy(key, *(rule.model_copy(update={"sites": ()}) for rule in body(rules, Policy).rules), default="ALLOW")
    world.a.knows(rules if place == "ingress" else open_to_all, tcp(key, key, policies=(key,)))
    enforced = (key,) if place == "destination" else None
    world.b.knows(rules, export(key, world.use(key, "tcp", policies=enforced)))
    world.a.pods({WEB: (web,), SHOP: (web, batch)})
    await world.apply()

    async def judged() -> dict[str, bool]:
        return {source: bool(await greeting(world, port, source=source)) for source in (web, batch, outside)}

    async def settled() -> bool:
        return await judged() == {web: True, batch: False, outside: False}

    await until(settled, "just the pod to be served")
    reader, writer = await asyncio.open_connection(world.a.host, port, local_addr=(web, 0))
    assert await reader.readexactly(1) == b"b"
    world.a.pods({WEB: (web, outside), SHOP: (web,)})
    await world.a.apply()
    assert await judged() == {web: True, batch: False, outside: True}
    writer.write(b"still here")
    assert await reader.readexactly(10) == b"still here"
    writer.close()


@pytest.mark.parametrize("by_host", [True, False])
async def test_an_origin_with_a_certificate_for_another_name_gets_no_connection(world: World, tmp_path: Path, by_host: bool) -> None:
    authority = Authority.create()
    verified = OriginTls(sni_from_host=by_host, verify="custom", trusted_ca_pem=authority.pem)
    ports = {}
    for name in ("db.test", "evil.test"):
        key, ports[name] = f"shop/tls-{name}-{by_host}", free_port(world.a.host)
        origin = Origin(key="pods", type="dns", address="db.test", port=5432, sites=(world.a.site_id,))
        world.a.knows(item(ItemKind.ORIGIN_POOL, key, OriginPool(origins=(origin,), tls=verified)))
        world.a.knows(tcp(key, key), listener(ports[name], key, protocol="tcp"))
        endpoint = Endpoint(world.a.host, free_port(world.a.host))
        context = authority.issue(name).server_context(tmp_path)
        server = await asyncio.start_server(named("t"), endpoint.address, endpoint.port, ssl=context)
        world.stack.callback(server.close)
        world.a.endpoints(key, "pods", [endpoint])
    await world.a.apply()
    assert await greeted(world, ports["db.test"]) == "t"
    assert await greeting(world, ports["evil.test"]) == ""


async def test_a_site_may_use_an_export_only_through_load_balancers_that_name_it(world: World) -> None:
    port = await tcp_service(world, "foreign", {world.b: named("b")})
    await greeted(world, port)
    world.b.knows(export("shop/foreign", world.use("shop/another", "tcp")))
    await world.b.apply()
    assert await greeting(world, port) == ""
