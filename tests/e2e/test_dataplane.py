"""Requests and connections between three sites whose Envoys run what `render` made: `a` is where they enter, `b` and `c` serve."""

import asyncio
import collections
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import httpx
import pytest
import pytest_asyncio

from agent.envoy import stats
from agent.envoy.inputs import Endpoint, PeerView, body
from agent.protocol.items import (
    NAMESPACE_LABEL,
    DirectResponse,
    ExportUse,
    HashPolicy,
    HeaderEdits,
    HeaderMatch,
    HeaderValue,
    Policy,
    PolicyRule,
    QueryMatch,
    Redirect,
    Route,
    RouteMatch,
    WeightedPool,
)
from tests.e2e.dataplane_sites import (
    World,
    export,
    forward,
    free_port,
    http,
    labelled,
    policy,
    pool,
    three_sites,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

Reply = httpx.Response


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with three_sites() as world:
        yield world


def pods_of(replies: list[Reply]) -> collections.Counter[str]:
    return collections.Counter(reply.headers.get("x-pod", str(reply.status_code)) for reply in replies)


async def test_requests_on_one_connection_are_spread_over_all_pods_of_both_sites(world: World) -> None:
    replies = [await world.call("shop.test") for _ in range(24)]
    assert set(pods_of(replies)) == {"b1", "b2", "c1", "c2"}


async def test_origins_see_the_real_client_and_nothing_that_only_nodes_may_say(world: World) -> None:
    forged = {
        "x-isthmus-lb": "shop/other",
        "x-isthmus-peer": "spiffe://evil",
        "x-isthmus-anything": "1",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-max-retries": "9",
        "x-envoy-internal": "true",
        "x-forwarded-client-cert": "By=spiffe://evil",
        "x-forwarded-for": "6.6.6.6",
        "x-forwarded-proto": "https",
    }
    reply = await world.call("shop.test:8080", "/a//b/../c?d=e", headers=forged)
    seen = reply.json()
    names = set(seen["headers"])
    assert not {name for name in names if name.startswith(("x-isthmus-", "x-envoy-"))}
    assert "x-forwarded-client-cert" not in names
    assert seen["headers"]["x-forwarded-for"].startswith("6.6.6.6,")
    assert seen["headers"]["x-forwarded-for"].split(",")[-1].strip() not in {"6.6.6.6", world.a.host}
    assert seen["headers"]["x-forwarded-proto"] == "http"
    assert seen["headers"]["host"] == "shop.test"
    assert seen["path"] == "/a/c?d=e"


@pytest.mark.parametrize(("path", "headers"), [("/a%2Fb", {}), ("/", {"x_y": "1"})])
async def test_ambiguous_requests_are_refused(world: World, path: str, headers: dict[str, str]) -> None:
    assert (await world.call("shop.test", path, headers=headers)).status_code == 400


async def test_a_request_that_one_site_lets_in_is_not_too_large_for_the_next(world: World) -> None:
    added = HeaderEdits(request_add=tuple(HeaderValue(name=f"x-added-{number}", value="v" * 8_096) for number in range(32)))
    host = await world.single_pool("large", world.b, lb={"max_request_header_kib": 96, "headers": added})
    world.b.endpoints("shop/large", "pods", [world.pods["b1"].endpoint])
    world.pods["b1"].most_header_bytes = 1 << 20
    await world.apply()
    await world.answers(host)
    for count, length in ((90, 8), (10, 9_000)):
        reply = await world.call(host, headers={f"x-h-{number}": "v" * length for number in range(count)})
        assert reply.status_code == 200, (count, length)


async def test_clients_never_see_the_marker(world: World) -> None:
    reply = await world.call("shop.test", "/marker")
    assert reply.status_code == 200
    assert not [name for name in reply.headers if name.startswith("x-isthmus")]


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_dead_pod_costs_no_request(world: World, method: str) -> None:
    host = await world.single_pool(f"half-dead-{method.lower()}", world.b)
    alive = world.pods["b1"].endpoint
    world.b.endpoints(f"shop/half-dead-{method.lower()}", "pods", [alive, Endpoint(world.b.host, free_port(world.b.host))])
    await world.apply()
    await world.answers(host)
    replies = [await world.call(host, method=method) for _ in range(20)]
    assert pods_of(replies) == {"b1": 20}


async def test_a_site_whose_pods_are_all_dead_hands_even_posts_to_the_next(world: World) -> None:
    host = await world.single_pool("dead-in-b", world.b, world.c)
    world.b.endpoints("shop/dead-in-b", "pods", [Endpoint(world.b.host, free_port(world.b.host))])
    world.c.endpoints("shop/dead-in-b", "pods", [world.pods["c1"].endpoint])
    await world.apply()
    await world.answers(host)
    replies = [await world.call(host, method="POST", content=b"x") for _ in range(12)]
    assert pods_of(replies) == {"c1": 12}
    assert not [name for reply in replies for name in reply.headers if name.startswith("x-isthmus")]


async def test_what_an_origin_may_have_seen_is_repeated_only_if_idempotent(world: World) -> None:
    def attempts(method: str) -> int:
        return sum(seen["path"] == f"/reset/{method}" for pod in world.pods.values() for seen in pod.seen)

    posted = await world.call("shop.test", "/reset/POST", method="POST", content=b"pay")
    got = await world.call("shop.test", "/reset/GET")
    assert (posted.status_code, got.status_code) == (503, 503)
    assert attempts("POST") == 1
    assert attempts("GET") > 1


@pytest.mark.parametrize(
    "view", [PeerView(reachable=True, exports={"shop/cart": 0}), PeerView(reachable=False)], ids=["unhealthy", "unreachable"]
)
async def test_a_site_that_cannot_serve_is_not_chosen(world: World, view: PeerView) -> None:
    world.a.sees({world.b.site_id: view})
    await world.a.apply()
    replies = [await world.call("shop.test") for _ in range(12)]
    assert set(pods_of(replies)) == {"c1", "c2"}
    world.a.sees({})
    await world.a.apply()


async def test_a_site_that_freezes_costs_no_idempotent_request(world: World) -> None:
    """Nothing but the keepalive of tunnels can notice, and nobody has told the node yet."""
    assert world.b.proxy.pid is not None
    os.kill(world.b.proxy.pid, signal.SIGSTOP)
    try:
        replies = await asyncio.gather(*(world.call("shop.test") for _ in range(40)))
        assert {reply.status_code for reply in replies} == {200}
        assert set(pods_of(replies)) <= {"c1", "c2"}
    finally:
        os.kill(world.b.proxy.pid, signal.SIGCONT)

    async def back() -> bool:
        return "b1" in pods_of([await world.call("shop.test") for _ in range(8)])

    await until(back, "b serving again")


async def test_sites_get_requests_by_their_healthy_endpoints(world: World) -> None:
    exports = {"shop/cart": 1}, {"shop/cart": 4}
    world.a.sees({site.site_id: PeerView(reachable=True, exports=some) for site, some in zip((world.b, world.c), exports, strict=True)})
    await world.a.apply()
    replies = [await world.call("shop.test") for _ in range(50)]
    count = sum(number for pod, number in pods_of(replies).items() if pod.startswith("c"))
    assert 34 <= count <= 46
    world.a.sees({})
    await world.a.apply()


async def test_local_pods_see_no_private_headers_either(world: World) -> None:
    host = await world.single_pool("near", world.a, lb={"policies": ("shop/near",)})
    world.a.knows(policy("shop/near", PolicyRule(name="all", action="ALLOW", headers=(HeaderMatch(name="x-key", exact="1"),))))
    near = await world.pod(world.a, "a0")
    world.a.endpoints("shop/near", "pods", [near.endpoint])
    await world.apply()
    reply = await world.answers(host, headers={"x-key": "1"})
    assert not [name for name in reply.json()["headers"] if name.startswith("x-isthmus")]


async def test_local_pods_are_preferred_until_none_is_left(world: World) -> None:
    host = await world.single_pool("preferred", world.a, world.b, selection="LOCAL_PREFERRED")
    near = await world.pod(world.a, "a1")
    world.a.endpoints("shop/preferred", "pods", [near.endpoint])
    world.b.endpoints("shop/preferred", "pods", [world.pods["b1"].endpoint])
    await world.apply()
    await world.answers(host)
    assert pods_of([await world.call(host) for _ in range(10)]) == {"a1": 10}
    world.a.endpoints("shop/preferred", "pods", [])
    await world.a.apply()
    assert pods_of([await world.call(host) for _ in range(10)]) == {"b1": 10}


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_request_goes_from_a_dead_local_pod_to_the_next_site(world: World, method: str) -> None:
    name = f"falls-over-{method.lower()}"
    host = await world.single_pool(name, world.a, world.b, selection="LOCAL_PREFERRED", lb={"policies": ("shop/all",)})
    world.shared(policy("shop/all", default="ALLOW"))
    world.b.knows(export(f"shop/{name}", world.use(f"shop/{name}", policies=("shop/all",))))
    world.a.endpoints(f"shop/{name}", "pods", [Endpoint(world.a.host, free_port(world.a.host))])
    world.b.endpoints(f"shop/{name}", "pods", [world.pods["b1"].endpoint])
    await world.apply()
    await world.answers(host)
    assert pods_of([await world.call(host, method=method) for _ in range(10)]) == {"b1": 10}


async def test_a_pool_of_lower_priority_stands_by(world: World) -> None:
    world.shared(pool("shop/first", world.b.site_id), pool("shop/second", world.c.site_id))
    pools = [WeightedPool(pool="shop/first", priority=1), WeightedPool(pool="shop/second", priority=2)]
    world.listens(http("shop/ranked", "ranked.test", forward(*pools)))
    world.b.knows(export("shop/first", world.use("shop/ranked")))
    world.c.knows(export("shop/second", world.use("shop/ranked")))
    world.b.endpoints("shop/first", "pods", [world.pods["b1"].endpoint])
    world.c.endpoints("shop/second", "pods", [world.pods["c1"].endpoint])
    await world.apply()
    await world.answers("ranked.test")
    assert pods_of([await world.call("ranked.test") for _ in range(6)]) == {"b1": 6}
    world.a.sees({world.b.site_id: PeerView(reachable=True, exports={"shop/first": 0})})
    await world.a.apply()
    assert pods_of([await world.call("ranked.test") for _ in range(6)]) == {"c1": 6}
    world.a.sees({})
    await world.a.apply()


async def test_requests_with_equal_hash_reach_the_same_pod_of_another_site(world: World) -> None:
    sticky = {"hash_policies": (HashPolicy(header="x-user"), HashPolicy(cookie="user"))}
    host = await world.single_pool("sticky", world.b, lb=sticky, algorithm="LB_OVERRIDE")
    world.b.endpoints("shop/sticky", "pods", [world.pods["b1"].endpoint, world.pods["b2"].endpoint])
    await world.apply()
    await world.answers(host)
    for by in ("x-user: {}", "cookie: other=1; user={}"):
        name, _, value = by.partition(": ")
        by_user = [pods_of([await world.call(host, headers={name: value.format(user)}) for _ in range(4)]) for user in range(12)]
        assert all(len(pods) == 1 for pods in by_user)
        assert {pod for pods in by_user for pod in pods} == {"b1", "b2"}


POLICY_CASES = [
    ("/public/x", {}, "GET", 200),
    ("/public/x?y=/admin", {}, "GET", 200),
    ("/public/secret", {}, "GET", 403),
    ("/other", {}, "GET", 403),
    ("/other", {"x-key": "open"}, "GET", 200),
    ("/other", {"x-key": "open"}, "DELETE", 403),
    ("/other?Pass[0]=a&y=b", {}, "GET", 403),
    ("/other?y=b&Pass[0]=ab", {}, "GET", 200),
]
RULES = (
    PolicyRule(name="no-secrets", action="DENY", path_suffixes=("/secret",)),
    PolicyRule(name="public", action="ALLOW", path_prefixes=("/public/",)),
    PolicyRule(name="keyed", action="ALLOW", methods=("GET", "POST"), headers=(HeaderMatch(name="X-Key", exact="open"),)),
    PolicyRule(name="passed", action="ALLOW", query=(QueryMatch(name="Pass[0]", regex=".*b"),)),
)


@pytest.mark.parametrize("place", ["ingress", "destination"])
async def test_policies_hold_where_requests_enter_and_again_where_they_are_served(world: World, place: str) -> None:
    key, host = f"shop/judged-{place}", f"judged-{place}.test"
    rewritten = forward(key, prefix_rewrite="/rewritten/")
    edits = HeaderEdits(request_remove=("x-key",))
    world.shared(pool(key, world.b.site_id), policy("shop/rules", *RULES))
    world.listens(http(key, host, rewritten, policies=("shop/rules",), headers=edits))
    if place == "destination":
        # The site where requests enter was told, or pretends, that everything is allowed.
        never = {"headers": (HeaderMatch(name="x-key", exact="never"),), "query": (QueryMatch(name="Pass[0]", exact="never"),)}
        look = PolicyRule(name="look", action="ALLOW", **never)
        world.a.knows(policy("shop/rules", look, default="ALLOW"))
    enforced = ("shop/rules",) if place == "destination" else None
    world.b.knows(export(key, world.use(key, policies=enforced, policy_headers=("x-key",))))
    world.b.endpoints(key, "pods", [world.pods["b1"].endpoint])
    await world.apply()
    await world.answers(host, "/public/")
    for path, headers, method, status in POLICY_CASES:
        reply = await world.call(host, path, method, headers=headers)
        assert reply.status_code == status, (path, headers, method)
    world.a.knows(policy("shop/rules", *RULES))
    await world.a.apply()


@pytest.mark.parametrize("place", ["ingress", "destination"])
async def test_a_policy_knows_a_domain_however_a_client_writes_it(world: World, place: str) -> None:
    key, zone = f"shop/zone-{place}", f"{place}.test"
    exactly = PolicyRule(name="admin", action="DENY", domains_exact=(f"admin.{zone}",))
    like = PolicyRule(name="internal", action="DENY", domains_regex=(f"int|[a-m]{{4}}\\.{place}\\.test",))
    world.shared(pool(key, world.b.site_id), policy(key, exactly, like, default="ALLOW"))
    world.listens(http(key, f"*.{zone}", forward(key), policies=(key,)))
    if place == "destination":
        world.a.knows(policy(key, default="ALLOW"))
    world.b.knows(export(key, world.use(key, policies=(key,) if place == "destination" else None)))
    world.b.endpoints(key, "pods", [world.pods["b1"].endpoint])
    await world.apply()
    await world.answers(f"Shop.{zone}.:")
    for host in (
        f"admin.{zone}",
        f"ADMIN.{zone.title()}",
        f"admin.{zone}.",
        f"admin.{zone}:",
        f"Admin.{zone}.:80",
        f"admin.{zone}:1:2",
        f"BACK.{zone}.:",
    ):
        assert (await world.call(host)).status_code == 403, host
    # Envoy itself lets no user through a tunnel.
    assert (await world.call(f"Shop@admin.{zone}")).status_code == (403 if place == "ingress" else 503)


async def test_a_policy_can_go_on_to_the_next_one_and_without_a_verdict_all_is_denied(world: World) -> None:
    host = await world.single_pool("chained", world.b, lb={"policies": ("shop/one", "shop/two")})
    one = policy(
        "shop/one",
        PolicyRule(name="leave", action="NEXT_POLICY", path_prefixes=("/next",)),
        PolicyRule(name="not-two", action="DENY", path_prefixes=("/next/denied", "/denied")),
        PolicyRule(name="here", action="ALLOW", sites=(world.a.site_id,), path_prefixes=("/here",)),
        PolicyRule(name="elsewhere", action="ALLOW", sites=(world.b.site_id,)),
    )
    two = policy("shop/two", PolicyRule(name="two", action="ALLOW", path_prefixes=("/next",)))
    world.shared(one, two)
    world.b.endpoints("shop/chained", "pods", [world.pods["b1"].endpoint])
    await world.apply()
    await world.answers(host, "/here")
    statuses = {path: (await world.call(host, path)).status_code for path in ("/here", "/next/denied", "/denied", "/unknown")}
    assert statuses == {"/here": 200, "/next/denied": 200, "/denied": 403, "/unknown": 403}


async def test_the_destination_judges_by_source_site_and_client_address(world: World) -> None:
    host = await world.single_pool("by-source", world.b)
    world.b.endpoints("shop/by-source", "pods", [world.pods["b1"].endpoint])
    rules = {
        "site": (PolicyRule(name="a", action="ALLOW", sites=(world.a.site_id,)), 200),
        "other-site": (PolicyRule(name="c", action="ALLOW", sites=(world.c.site_id,)), 403),
        "address": (PolicyRule(name="net", action="ALLOW", prefixes=("0.0.0.0/0",)), 200),
        "not-address": (PolicyRule(name="net", action="ALLOW", prefixes=("0.0.0.0/0",), prefixes_invert=True), 403),
        "other-address": (PolicyRule(name="net", action="ALLOW", prefixes=("203.0.113.0/24",)), 403),
    }
    await world.apply()
    await world.answers(host)
    for name, (rule, status) in rules.items():
        world.b.knows(policy("shop/source", rule), export("shop/by-source", world.use("shop/by-source", policies=("shop/source",))))
        await world.b.apply()

        async def judged(status: int = status) -> bool:
            reply = await world.call(host)
            return reply.status_code == status

        await until(judged, name)


@pytest.mark.parametrize("hidden", [True, False])
async def test_the_destination_knows_a_client_whose_address_origins_are_not_told(world: World, hidden: bool) -> None:
    key, host = f"shop/known-{hidden}", f"known-{hidden}.test"
    edits = HeaderEdits(request_remove=("x-forwarded-for",) if hidden else ())
    told = (await world.call("shop.test")).json()["headers"]["x-forwarded-for"]
    rules = policy(key, PolicyRule(name="any", action="ALLOW", prefixes=("0.0.0.0/0",)))
    world.shared(pool(key, world.b.site_id), rules)
    world.listens(http(key, host, forward(key), policies=(key,), headers=edits))
    world.b.knows(export(key, world.use(key, policies=(key,))))
    world.b.endpoints(key, "pods", [world.pods["b1"].endpoint])
    await world.apply()
    seen = (await world.answers(host)).json()["headers"]
    assert seen.get("x-forwarded-for") == (None if hidden else told)
    assert not [name for name in seen if name.startswith("x-isthmus-")]


WEB, SHOP = labelled("app", "web"), labelled(NAMESPACE_LABEL, "shop")


async def from_addresses(world: World, host: str, *addresses: str, **fields: Any) -> dict[str, int]:
    """Statuses of requests from these addresses."""
    found = {}
    for address in addresses:
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(local_address=address)) as client:
            reply = await client.get(f"http://{world.a.host}:{world.http_port}", headers={"host": host, **fields})
            found[address] = reply.status_code
    return found


@pytest.mark.parametrize("place", ["ingress", "destination"])
async def test_policies_tell_pods_apart_where_requests_enter_and_again_where_they_are_served(world: World, place: str) -> None:
    key = f"shop/pods-{place}"
    host = f"pods-{place}.test"
    web, batch, foreign, outside = "127.91.0.1", "127.91.0.2", "127.91.0.3", "127.91.0.4"
    rules = policy(
        key,
        PolicyRule(name="web", action="ALLOW", pods=WEB, sites=(world.a.site_id,)),
        PolicyRule(name="shop", action="DENY", pods=SHOP),
        PolicyRule(name="keyed", action="ALLOW", headers=(HeaderMatch(name="x-key", exact="open"),)),
    )
    # In the destination's case the ingress allows everything, although it looks at the same selectors.
    never = tuple(rule.model_copy(update={"prefixes": ("203.0.113.1",)}) for rule in body(rules, Policy).rules)
    at_ingress = rules if place == "ingress" else policy(key, *never, default="ALLOW")
    world.shared(pool(key, world.b.site_id), rules)
    world.a.knows(at_ingress)
    world.listens(http(key, host, forward(key), policies=(key,)))
    enforced = (key,) if place == "destination" else None
    world.b.knows(export(key, world.use(key, policies=enforced, policy_headers=("x-key",))))
    world.b.endpoints(key, "pods", [world.pods["b1"].endpoint])
    world.a.pods({WEB: (web,), SHOP: (web, batch)})
    await world.apply()
    await world.answers(host, headers={"x-key": "open"})
    everybody = (web, batch, foreign, outside)
    forged = {"x-isthmus-pods": f"|{WEB.id}|"}
    assert await from_addresses(world, host, *everybody, **forged) == {web: 200, batch: 403, foreign: 403, outside: 403}
    opened = {"x-key": "open"}
    assert await from_addresses(world, host, *everybody, **opened) == {web: 200, batch: 403, foreign: 200, outside: 200}
    world.a.pods({WEB: (foreign, web), SHOP: ()})
    await world.a.apply()
    assert await from_addresses(world, host, *everybody) == {web: 200, batch: 403, foreign: 200, outside: 403}
    assert not any(name.startswith("x-isthmus-") for name in world.pods["b1"].seen[-1]["headers"])


async def test_where_pods_cannot_be_read_what_a_rule_about_them_could_match_is_denied(world: World) -> None:
    host = await world.single_pool("unreadable", world.a, lb={"policies": ("shop/unreadable",)})
    public = PolicyRule(name="public", action="ALLOW", path_prefixes=("/public/",))
    batch = PolicyRule(name="batch", action="DENY", pods=SHOP, path_prefixes=("/orders/",))
    world.a.knows(policy("shop/unreadable", public, batch, default="ALLOW"))
    world.a.endpoints("shop/unreadable", "pods", [(await world.pod(world.a, "unreadable")).endpoint])
    for readable, status in ((None, 403), ((), 200)):
        world.a.pods({SHOP: readable})
        await world.apply()
        await world.answers(host, "/public/")
        assert (await world.call(host, "/orders/")).status_code == status
        assert (await world.call(host, "/else")).status_code == 200


async def test_a_peer_that_is_no_longer_allowed_is_refused_on_its_open_connections(world: World) -> None:
    host = await world.single_pool("revoked", world.b)
    world.b.endpoints("shop/revoked", "pods", [world.pods["b1"].endpoint])
    await world.apply()
    await world.answers(host)
    stranger = ExportUse(load_balancer="shop/revoked", protocol="http", peers=(world.c.site_id,))
    world.b.knows(export("shop/revoked", stranger))
    await world.b.apply()

    async def refused() -> bool:
        reply = await world.call(host)
        return reply.status_code == 403

    await until(refused, "refusal")


async def test_routes_match_rewrite_redirect_and_answer(world: World) -> None:
    world.shared(pool("shop/routed", world.b.site_id))
    routes = (
        Route(match=RouteMatch(path="/teapot"), response=DirectResponse(status=418, body="100% tea")),
        Route(match=RouteMatch(prefix="/old/"), redirect=Redirect(prefix_rewrite="/new/", response_code=308)),
        Route(match=RouteMatch(prefix="/query"), redirect=Redirect(query="replace:v=2%")),
        Route(match=RouteMatch(prefix="/moved"), redirect=Redirect(host="else.test", path="/there", scheme="https", response_code=302)),
        Route(
            match=RouteMatch(regex="/v[0-9]+/.*", headers=(HeaderMatch(name="x-beta", present=True),), methods=("GET",)),
            forward=forward("shop/routed", prefix_rewrite="/beta", host_rewrite="inner.test", timeout=5_000),
            headers=HeaderEdits(
                request_add=(HeaderValue(name="x-added", value="100%"),), response_add=(HeaderValue(name="x-more", value="%DURATION%"),)
            ),
        ),
        Route(match=RouteMatch(prefix="/elsewhere", incoming_ports=((1, 1),)), response=DirectResponse(status=404)),
        Route(match=RouteMatch(prefix="/"), forward=forward("shop/routed", auto_host_rewrite=True)),
    )
    world.listens(http("shop/routes", "routes.test", *routes))
    world.b.knows(export("shop/routed", world.use("shop/routes")))
    world.b.endpoints("shop/routed", "pods", [world.pods["b1"].endpoint])
    await world.apply()
    seen = (await world.answers("routes.test", "/elsewhere")).json()
    assert seen["headers"]["host"] == "routed.shop"
    teapot = await world.call("routes.test", "/teapot")
    assert (teapot.status_code, teapot.text) == (418, "100% tea")
    moved = await world.call("routes.test", "/old/x?y=1")
    assert (moved.status_code, moved.headers["location"]) == (308, f"http://routes.test:{world.http_port}/new/x?y=1")
    moved = await world.call("routes.test", "/query/x?y=1")
    assert (moved.status_code, moved.headers["location"]) == (301, f"http://routes.test:{world.http_port}/query/x?v=2%")
    moved = await world.call("routes.test", "/moved?y=1")
    assert (moved.status_code, moved.headers["location"]) == (302, "https://else.test/there?y=1")
    beta = await world.call("routes.test", "/v1/x", headers={"x-beta": ""})
    assert beta.headers["x-more"] == "%DURATION%"
    assert (beta.json()["headers"]["host"], beta.json()["headers"]["x-added"]) == ("inner.test", "100%")


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_has_no_body_does_not_spoil_the_next_one_on_its_connection(world: World, status: int) -> None:
    route = Route(match=RouteMatch(path="/nothing"), response=DirectResponse(status=status, body="something"))
    world.listens(http(f"shop/bodiless-{status}", f"bodiless-{status}.test", route, forward("shop/cart")))
    for site in (world.b, world.c):
        site.knows(export("shop/cart", world.use("shop/front"), world.use(f"shop/bodiless-{status}")))
    await world.apply()
    for path, expected in (("/nothing", status), ("/", 200)):
        assert (await world.call(f"bodiless-{status}.test", path)).status_code == expected


async def test_web_sockets_cross_when_the_route_allows_them(world: World) -> None:
    allowed = Route(match=RouteMatch(prefix="/ws"), forward=forward("shop/sockets", web_socket=True))
    world.shared(pool("shop/sockets", world.b.site_id))
    world.listens(http("shop/sockets", "sockets.test", allowed, forward("shop/sockets")))
    world.b.knows(export("shop/sockets", world.use("shop/sockets")))
    world.b.endpoints("shop/sockets", "pods", [world.pods["b1"].endpoint])
    await world.apply()
    await world.answers("sockets.test")

    async def upgrade(path: str) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection(world.a.host, world.http_port)
        head = f"GET {path} HTTP/1.1\r\nhost: sockets.test\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: x\r\n\r\n"
        writer.write(head.encode())
        status = (await reader.readuntil(b"\r\n\r\n")).splitlines()[0]
        if b" 101 " in status:
            writer.write(b"hello there")
            echoed = await reader.readexactly(11)
        else:
            echoed = b""
        writer.close()
        return status, echoed

    status, echoed = await upgrade("/ws")
    assert (b"101" in status, echoed) == (True, b"hello there")
    status, _ = await upgrade("/other")
    assert b"403" in status


async def test_grpc_crosses_to_an_http2_origin(world: World) -> None:
    async def echo(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        context.set_trailing_metadata((("x-trailer", "t"),))
        async for request in requests:
            yield request

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shop.Echo", {"Talk": handler}),))
    port = server.add_insecure_port(f"{world.b.host}:0")
    await server.start()
    try:
        host = await world.single_pool("grpc", world.b, http="http2")
        world.b.endpoints("shop/grpc", "pods", [Endpoint(world.b.host, port)])
        await world.apply()
        options = (("grpc.default_authority", host),)
        async with grpc.aio.insecure_channel(f"{world.a.host}:{world.http_port}", options=options) as channel:
            call = channel.stream_stream("/shop.Echo/Talk")(iter([b"one", b"two"]), wait_for_ready=True, timeout=5)
            answers = [answer async for answer in call]
            trailers = await call.trailing_metadata()
    finally:
        await server.stop(0)
    assert answers == [b"one", b"two"]
    assert ("x-trailer", "t") in [tuple(pair) for pair in trailers]


async def test_what_happened_is_counted_by_load_balancer_and_site(world: World) -> None:
    host = await world.single_pool("counted", world.b)
    world.b.endpoints("shop/counted", "pods", [world.pods["b1"].endpoint])
    await world.apply()
    await world.answers(host)

    async def reading() -> stats.Reading:
        return stats.parse(await world.a.proxy.admin.get(stats.PATH))

    async def settled(count: int) -> stats.Edge | None:
        """Histograms are merged when Envoy flushes."""
        edge = (await reading()).edges[key]
        return edge if edge.latency_ms.get("inf") == count else None

    key = stats.EdgeKey("http", "shop/counted", world.b.site_id)
    answered = sum((await reading()).edges[key].requests.values())
    await until(lambda: settled(answered), "the first request in the histogram")
    before = await reading()
    replies = [await world.call(host, f"/status/{status}", "POST", content=b"x" * 100) for status in (200, 301, 404, 500)]
    await until(lambda: settled(answered + 4), "four more requests in the histogram")
    (edge,) = [edge for edge in stats.difference(before, await reading()) if edge.load_balancer == "shop/counted"]
    assert edge.destination == world.b.site_id
    assert edge.requests == {"2xx": 1, "3xx": 1, "4xx": 1, "5xx": 1}
    assert (edge.bytes_received, edge.bytes_sent) == (400, sum(len(reply.content) for reply in replies))
    assert 0 < edge.latency_sum_ms < 4_000


async def test_a_peers_document_is_read_through_the_tunnel(world: World) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asker = next(line for line in head.splitlines() if line.startswith("x-isthmus-peer:")).partition(": ")[2]
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {len(asker)}\r\nconnection: close\r\n\r\n{asker}".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, world.b.run_dir / "peers.sock")
    transport = httpx.AsyncHTTPTransport(uds=str(world.a.run_dir / "probe.sock"))
    async with httpx.AsyncClient(transport=transport) as client:
        url = f"http://{world.b.site_id}/v1/exports"
        reply = await client.get(url, headers={"x-isthmus-peer": "someone else"})
        assert f"/site/{world.a.site_id}/" in reply.text
        assert (await client.get(f"http://{world.b.site_id}/v1/health")).status_code == 200
        assert (await client.get(f"http://{world.b.site_id}/elsewhere")).status_code in {403, 404}
    server.close()
