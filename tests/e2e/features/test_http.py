"""HTTP load balancers, from the object a user writes to what reaches the origin; origins are in `b` and requests enter at `a`."""

import asyncio
import os
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from lab.specs import advertise, k8s_pool
from tests.e2e.certificates import Authority, Pair, inline
from tests.e2e.origins import Origin
from tests.e2e.two_sites import TwoSites, simple, to

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(120)]

PERCENT = 'a "quoted" 100%, %REQ(authorization)% and %%'


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def sites(shared_sites: TwoSites) -> TwoSites:
    """Pools `first` and `second`, each with one origin of that name in `b`."""
    for name in ("first", "second"):
        await shared_sites.pool(name, await shared_sites.origin("b", name))
    return shared_sites


@pytest.fixture
def first(sites: TwoSites) -> Origin:
    return next(origin for origin in sites.origins if origin.name == "first")


async def origin_of(sites: TwoSites, domain: str, path: str, **more: Any) -> str:
    answer = await sites.call(domain, path, **more)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-origin"]


@pytest.mark.parametrize(
    ("match", "hits", "misses"),
    [
        ({"path": {"prefix": "/api"}}, ["/api", "/api/x?y=1", "/apiary"], ["/", "/x/api"]),
        ({"path": {"path": "/exact"}}, ["/exact", "/exact?q"], ["/exact/", "/exactly"]),
        ({"path": {"regex": "/v[0-9]+/.*"}}, ["/v1/a", "/v22/"], ["/v/a", "/x/v1/a"]),
    ],
    ids=["prefix", "exact", "regex"],
)
async def test_routes_match_paths(sites: TwoSites, match: dict[str, Any], hits: list[str], misses: list[str]) -> None:
    name = f"by-{next(iter(match['path']))}"
    domain = await sites.load_balancer(name, "first", routes=[{"simple_route": {**match, "origin_pools": to("second")}}])
    assert {path: await origin_of(sites, domain, path) for path in hits} == dict.fromkeys(hits, "second")
    assert {path: await origin_of(sites, domain, path) for path in misses} == dict.fromkeys(misses, "first")


async def test_routes_match_methods(sites: TwoSites) -> None:
    domain = await sites.load_balancer("by-method", "first", routes=[simple("/", "second", http_method="POST")])
    assert [await origin_of(sites, domain, "/", method=method) for method in ("POST", "GET", "PUT")] == ["second", "first", "first"]


@pytest.mark.parametrize(
    ("header", "hit", "miss"),
    [
        ({"name": "x-tier", "exact": "gold"}, {"x-tier": "gold"}, {"x-tier": "golden"}),
        ({"name": "x-tier", "regex": "go.*"}, {"x-tier": "golden"}, {"x-tier": "silver"}),
        ({"name": "x-tier", "presence": True}, {"x-tier": "any"}, {}),
        ({"name": "x-tier", "exact": "gold", "invert_match": True}, {"x-tier": "silver"}, {"x-tier": "gold"}),
    ],
    ids=["exact", "regex", "presence", "invert"],
)
async def test_routes_match_headers(
    sites: TwoSites, header: dict[str, Any], hit: dict[str, str], miss: dict[str, str], request: pytest.FixtureRequest
) -> None:
    name = f"by-header-{request.node.callspec.id}"
    domain = await sites.load_balancer(name, "first", routes=[simple("/", "second", headers=[header])])
    assert await origin_of(sites, domain, "/", headers=hit) == "second"
    assert await origin_of(sites, domain, "/", headers=miss) == "first"


async def test_the_first_route_that_matches_is_taken(sites: TwoSites) -> None:
    domain = await sites.load_balancer("in-order", routes=[simple("/a", "second"), simple("/a/b", "first"), simple("/", "first")])
    assert [await origin_of(sites, domain, path) for path in ("/a/b", "/a", "/b")] == ["second", "second", "first"]


async def test_hosts_and_prefixes_are_rewritten(sites: TwoSites) -> None:
    rewritten = simple("/old/", "first", host_rewrite="inner.example", advanced_options={"prefix_rewrite": "/new/"})
    kept = simple("/kept", "first", disable_host_rewrite={})
    by_regex = simple(
        "/items/", "first", advanced_options={"regex_rewrite": {"pattern": "/items/([0-9]+)", "substitution": "/item?id=\\1"}}
    )
    domain = await sites.load_balancer("rewriting", "first", routes=[rewritten, kept, by_regex])
    said = (await sites.call(domain, "/old/x?y=1")).json()
    assert (said["path"], said["headers"]["host"]) == ("/new/x?y=1", "inner.example")
    assert (await sites.call(domain, "/kept")).json()["headers"]["host"] == domain
    assert (await sites.call(domain, "/items/7")).json()["path"] == "/item?id=7"


async def test_headers_are_added_and_removed_literally(sites: TwoSites) -> None:
    edits = {
        "request_headers_to_add": [{"name": "x-added", "value": PERCENT}, {"name": "x-both", "value": "ours", "append": False}],
        "request_headers_to_remove": ["x-unwanted"],
        "response_headers_to_add": [{"name": "x-answered", "value": PERCENT}],
        "response_headers_to_remove": ["x-gone"],
    }
    secret = {"clear_secret_info": {"url": "string:///" + b64encode(b"50% of it").decode()}}
    whole = {"request_headers_to_add": [{"name": "x-secret", "secret_value": secret}]}
    domain = await sites.load_balancer("edits", "first", routes=[simple("/", "first", advanced_options=edits)], more_option=whole)
    answer = await sites.call(domain, headers={"x-unwanted": "1", "x-both": "theirs", "authorization": "hidden"})
    received = answer.json()["headers"]
    assert (received["x-added"], received["x-both"], received["x-secret"]) == (PERCENT, "ours", "50% of it")
    assert "x-unwanted" not in received
    assert answer.headers["x-answered"] == PERCENT
    assert "x-gone" not in answer.headers


async def test_a_request_that_takes_too_long_is_given_up(sites: TwoSites, first: Origin) -> None:
    domain = await sites.load_balancer("hasty", "first", routes=[simple("/slow", "first", advanced_options={"timeout": 300})])
    first.released.clear()
    assert (await sites.call(domain, "/slow")).status_code == 504
    first.released.set()
    assert (await sites.call(domain, "/slow")).status_code == 200


async def test_answers_are_retried_as_the_route_says(sites: TwoSites, first: Origin) -> None:
    policy = {"num_retries": 3, "retry_condition": ["5xx"], "back_off": {"base_interval": 5, "max_interval": 10}}
    routes = [
        simple("/again", "first", advanced_options={"retry_policy": policy}),
        simple("/once", "first", advanced_options={"no_retry_policy": {}}),
    ]
    domain = await sites.load_balancer("retrying", "first", routes=routes)
    for path, status, asked in (("/again", 200, 3), ("/once", 503, 1)):
        first.failing, before = 2, len(first.seen)
        assert (await sites.call(domain, path)).status_code == status
        assert len(first.seen) - before == asked
    first.failing = 0


@pytest.mark.parametrize("at", ["aa", "bb", "ab"])
async def test_what_broke_is_repeated_by_its_method_or_as_the_route_says(sites: TwoSites, at: str) -> None:
    origins = [await sites.origin(site, f"breaking-{at}-{number}") for number, site in enumerate(at)]
    await sites.pool(f"breaking-{at}", *origins)

    def own(path: str, **options: Any) -> dict[str, Any]:
        return simple(path, f"breaking-{at}", advanced_options=options)

    routes = [
        own("/reset/never", no_retry_policy={}),
        own("/reset/unreached", retry_policy={"num_retries": 2, "retry_condition": ["connect-failure"]}),
        own("/reset/always", retry_policy={"num_retries": 2, "retry_condition": ["reset"]}),
        own("/"),
    ]
    domain = await sites.load_balancer(f"breaking-{at}", routes=routes)

    async def attempts(method: str, path: str) -> int:
        before = sum(len(origin.seen) for origin in origins)
        assert (await sites.call(domain, path, method)).status_code == 503
        return sum(len(origin.seen) for origin in origins) - before

    for path, got, posted in (("/reset/never", 1, 1), ("/reset/unreached", 1, 1), ("/reset/always", 3, 3), ("/reset", 3, 1)):
        assert (await attempts("GET", path), await attempts("POST", path)) == (got, posted), path


async def test_redirects_and_direct_responses_come_from_the_proxy(sites: TwoSites) -> None:
    def redirect(prefix: str, **how: Any) -> dict[str, Any]:
        return {"redirect_route": {"path": {"prefix": prefix}, "route_redirect": how}}

    body = "string:///" + b64encode(b"gone for 100%").decode()
    direct = {"path": {"path": "/gone"}, "route_direct_response": {"response_code": 410, "response_body_encoded": body}}
    routes = [
        redirect("/there", host_redirect="there.example", path_redirect="/new", proto_redirect="https"),
        redirect("/other", host_redirect="there.example", response_code=307, remove_all_params={}),
        redirect("/query", host_redirect="there.example", path_redirect="/q", response_code=302, replace_params="a=1"),
        redirect("/swap", host_redirect="there.example", prefix_rewrite="/swapped"),
        {"direct_response_route": direct},
    ]
    domain = await sites.load_balancer("elsewhere", "first", routes=routes)
    expected = {
        "/there?x=1": (301, "https://there.example/new?x=1"),
        "/other/y?x=1": (307, "http://there.example/other/y"),
        "/query?x=1": (302, "http://there.example/q?a=1"),
        "/swap/y?x=1": (301, "http://there.example/swapped/y?x=1"),
    }
    answers = {path: await sites.call(domain, path) for path in expected}
    assert {path: (answer.status_code, answer.headers["location"]) for path, answer in answers.items()} == expected
    gone = await sites.call(domain, "/gone")
    assert (gone.status_code, gone.text) == (410, "gone for 100%")


async def test_a_websocket_crosses(sites: TwoSites) -> None:
    routes = [simple("/socket", "first", advanced_options={"web_socket_config": {"use_websocket": True}})]
    domain = await sites.load_balancer("socket", "first", routes=routes)

    async def upgraded(path: str) -> tuple[bytes, asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await sites.fabric.site("a").connect(8080)
        asked = f"GET {path} HTTP/1.1\r\nhost: {domain}\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\r\n"
        writer.write(asked.encode())
        return await reader.readuntil(b"\r\n\r\n"), reader, writer

    head, reader, writer = await upgraded("/socket")
    assert head.startswith(b"HTTP/1.1 101")
    for message in (b"\x81\x05hello", os.urandom(100_000)):
        writer.write(message)
        assert await reader.readexactly(len(message)) == message
    writer.close()
    head, _, writer = await upgraded("/elsewhere")
    assert not head.startswith(b"HTTP/1.1 101")
    writer.close()


async def test_pools_share_requests_by_weight(sites: TwoSites) -> None:
    pools = [{"pool": {"name": name}, "weight": weight, "priority": 1} for name, weight in (("first", 3), ("second", 1))]
    domain = await sites.load_balancer("weighted", default_route_pools=pools)
    answers = [(await sites.call(domain)).headers["x-origin"] for _ in range(120)]
    assert 65 <= answers.count("first") <= 112
    assert answers.count("second") == 120 - answers.count("first")


async def test_the_next_priority_is_used_while_the_first_has_no_healthy_origin(sites: TwoSites) -> None:
    primary, backup = await sites.origin("b", "primary"), await sites.origin("a", "backup")
    checked = {"healthcheck": [{"name": "http"}]}
    await sites.pool("primary", primary, **checked)
    await sites.pool("backup", backup, **checked)
    pools = [{"pool": {"name": name}, "weight": 1, "priority": priority} for name, priority in (("primary", 1), ("backup", 2))]
    domain = await sites.load_balancer("failing-over", default_route_pools=pools)
    await sites.settles(domain, {"primary"})
    primary.healthy = False
    await sites.settles(domain, {"backup"})
    primary.healthy = True
    await sites.settles(domain, {"primary"})


async def test_what_clients_say_of_themselves_has_no_effect(sites: TwoSites, first: Origin) -> None:
    slow = simple("/slow", "first", advanced_options={"timeout": 5_000, "no_retry_policy": {}})
    domain = await sites.load_balancer("mistrust", "first", routes=[slow, simple("/", "first", advanced_options={"no_retry_policy": {}})])
    honest = (await sites.call(domain)).json()["headers"]
    spoofed = {
        "x-forwarded-client-cert": "By=spiffe://x;URI=spiffe://y",
        "x-envoy-internal": "true",
        "x-envoy-original-path": "/admin",
        "x-envoy-external-address": "9.9.9.9",
        "x-envoy-upstream-rq-timeout-ms": "1",
        "x-envoy-max-retries": "5",
        "x-envoy-retry-on": "5xx",
        "x-isthmus-lb": "lab/other",
        "x-isthmus-exempt": "1",
        "x-isthmus-export": "second.lab.http",
        "x-isthmus-peer": "spiffe://y",
        "x-isthmus-origin-host": "1",
        "x-isthmus-hash": "1",
    }
    received = (await sites.call(domain, headers=spoofed)).json()["headers"]
    assert received.keys() - honest.keys() == set()
    assert [name for name in received if name.startswith(("x-isthmus-", "x-envoy-"))] == []
    forwarded = (await sites.call(domain, headers={"x-forwarded-for": "9.9.9.9", "x-forwarded-proto": "https"})).json()["headers"]
    assert forwarded["x-forwarded-for"].rpartition(",")[2].strip() == honest["x-forwarded-for"]
    assert forwarded["x-forwarded-proto"] == "http"
    first.failing, before = 1, len(first.seen)
    assert (await sites.call(domain, headers=spoofed)).status_code == 503
    assert len(first.seen) - before == 1
    assert (await sites.call(domain, headers={"x_under": "score"})).status_code == 400
    assert (await sites.call(domain, "/a%2fb")).status_code == 400
    assert "x-isthmus-failed" not in (await sites.call(domain, "/forge")).headers


async def test_no_origin_can_have_its_requests_taken_to_another(sites: TwoSites) -> None:
    """By an answer that looks like one of a node which reached nobody: not one of this site alone, among others, or of another site."""
    retried = {"retry_policy": {"num_retries": 3, "retry_condition": ["reset"]}}
    for name, at in (("here", "aa"), ("among", "ab"), ("there", "bb")):
        origins = [await sites.origin(site, f"forger-{name}-{number}") for number, site in enumerate(at)]
        await sites.pool(f"forger-{name}", *origins)
        domain = await sites.load_balancer(f"forger-{name}", routes=[simple("/", f"forger-{name}", advanced_options=retried)])
        for path in ("/forge", "/forge/as?value=unreached@http", "/forge/as?value=broken@http"):
            before = sum(len(origin.seen) for origin in origins)
            answers = [await sites.call(domain, path, method) for method in ("GET", "POST") for _ in range(6)]
            assert {answer.status_code for answer in answers} == {200}
            assert sum(len(origin.seen) for origin in origins) - before == len(answers)


# TLS


def https(pair: Pair, port: int = 8443, **more: Any) -> dict[str, Any]:
    return {"http": None, "https": {"port": port, "tls_parameters": {"tls_certificates": [pair.as_field()]}, **more}}


async def over_tls(sites: TwoSites, authority: Authority, domain: str, *, sni: str | None = None, port: int = 8443) -> httpx.Response:
    host, reached = await sites.fabric.site("a").reach(port)
    async with httpx.AsyncClient(verify=authority.client_context(), trust_env=False) as client:
        named = {"sni_hostname": sni or domain}
        return await client.get(f"https://{host}:{reached}/", headers={"host": domain}, extensions=named)


async def test_two_load_balancers_share_a_tls_port_by_server_name(sites: TwoSites) -> None:
    authority = Authority.create()
    one = await sites.load_balancer("tls-one", "first", **https(authority.issue("tls-one.test"), add_hsts=True))
    two = await sites.load_balancer("tls-two", "second", **https(authority.issue("tls-two.test")))
    answers = [await over_tls(sites, authority, domain) for domain in (one, two)]
    assert [answer.headers["x-origin"] for answer in answers] == ["first", "second"]
    assert answers[0].headers["strict-transport-security"].startswith("max-age=")
    assert "strict-transport-security" not in answers[1].headers
    assert answers[0].json()["headers"]["x-forwarded-proto"] == "https"
    assert (await over_tls(sites, authority, one, sni=two)).status_code == 421
    with pytest.raises(httpx.TransportError):
        await over_tls(sites, authority, "nobody.test")


async def test_a_request_on_the_connection_of_another_load_balancer_is_sent_to_a_new_one(sites: TwoSites) -> None:
    """As browsers have it, which take a connection for all names of its certificate."""
    authority, port = Authority.create(), 8444
    any_, own = "any.tls-wild.test", "own.tls-wild.test"
    for name, origin, domain in (("tls-wild", "first", "*.tls-wild.test"), ("tls-own", "second", own)):
        await sites.load_balancer(name, origin, domains=[domain], **https(authority.issue(domain), port))
    answers = [await over_tls(sites, authority, domain, sni=sni, port=port) for domain in (any_, own) for sni in (any_, own)]
    assert [answer.headers.get("x-origin", answer.status_code) for answer in answers] == ["first", 421, 421, "second"]


async def test_a_load_balancer_for_every_name_is_alone_at_its_tls_port(sites: TwoSites) -> None:
    authority = Authority.create()
    await sites.load_balancer("tls-all", "first", domains=["*"], **https(authority.issue("all.test"), 8445))
    assert (await over_tls(sites, authority, "unheard-of.test", sni="all.test", port=8445)).headers["x-origin"] == "first"


async def test_the_private_key_of_a_certificate_is_not_read_back(sites: TwoSites) -> None:
    pair = Authority.create().issue("kept-key.test")
    await sites.load_balancer("kept-key", "first", **https(pair))
    read = await sites.fabric.api.get("http_loadbalancer", "kept-key")
    (certificate,) = read["spec"]["https"]["tls_parameters"]["tls_certificates"]
    assert certificate["certificate_url"] == pair.as_field()["certificate_url"]
    assert certificate["private_key"].keys() == {"blindfold_secret_info"}
    await sites.change("http_loadbalancer", "kept-key", read["spec"])


@pytest.mark.skipif(os.geteuid() != 0, reason="port 80 needs root")
async def test_http_is_redirected_to_https(sites: TwoSites) -> None:
    authority = Authority.create()
    domain = await sites.load_balancer("upgraded", "first", **https(authority.issue("upgraded.test"), http_redirect=True))
    answer = await sites.call(domain, "/x?y=1", port=80)
    assert (answer.status_code, answer.headers["location"]) == (301, f"https://{domain}:8443/x?y=1")
    assert (await over_tls(sites, authority, domain)).status_code == 200


async def test_origins_with_tls_are_verified_and_told_the_name(sites: TwoSites, tmp_path: Path) -> None:
    authority, stranger = Authority.create(), Authority.create()
    origin = await sites.origin("b", "sealed", tls=authority.issue("sealed.internal").server_context(tmp_path))

    def pool(trusted: Authority | None, sni: dict[str, Any]) -> dict[str, Any]:
        verification = {"use_server_verification": {"trusted_ca_url": inline(trusted.pem)}} if trusted else {"volterra_trusted_ca": {}}
        return {"use_tls": {"tls_config": {"default_security": {}}, **sni, **verification, "no_mtls": {}}}

    trusted = await sites.serve("trusted", origin, pool=pool(authority, {"sni": "sealed.internal"}))
    other_name = await sites.serve("other-name", origin, pool=pool(authority, {"sni": "other.internal"}))
    untrusted = await sites.serve("untrusted", origin, pool=pool(stranger, {"sni": "sealed.internal"}))
    public = await sites.serve("public", origin, pool=pool(None, {"sni": "sealed.internal"}))
    assert (await sites.call(trusted)).status_code == 200
    assert origin.seen[-1].sni == "sealed.internal"
    before = len(origin.seen)
    assert [(await sites.call(domain)).status_code for domain in (other_name, untrusted, public)] == [503, 503, 503]
    assert len(origin.seen) == before
    unverified: dict[str, Any] = {
        "tls_config": {"default_security": {}},
        "use_host_header_as_sni": {},
        "skip_server_verification": {},
        "no_mtls": {},
    }
    domain = await sites.serve("unverified", origin, pool={"use_tls": unverified})
    assert (await sites.call(domain)).status_code == 200
    assert origin.seen[-1].sni == domain


async def test_grpc_crosses_in_one_message_and_in_streams(sites: TwoSites) -> None:
    service = await sites.fabric.site("b").cluster.deploy("rpc", [sys.executable, "-m", "tests.e2e.rpc_pod"], port=9000)
    options = {"advanced_options": {"http2_options": {"enabled": True}}}
    await sites.fabric.api.create("origin_pool", "rpc", k8s_pool("rpc", ["b"], port=9000, **options))
    domain = await sites.load_balancer("rpc", "rpc")
    host, port = await sites.fabric.site("a").reach(8080)
    pod = service.pods[0].name.encode()
    async with grpc.aio.insecure_channel(f"{host}:{port}", options=[("grpc.default_authority", domain)]) as channel:
        assert await channel.unary_unary("/test.Echo/Once")(b"one", timeout=10) == pod + b":one"
        call = channel.stream_stream("/test.Echo/Each")(timeout=10)
        for message in (b"1", b"2"):
            await call.write(message)
            assert await call.read() == pod + b":" + message
        await call.done_writing()
        assert await call.code() == grpc.StatusCode.OK


async def test_one_load_balancer_answers_for_several_domains_and_patterns(sites: TwoSites) -> None:
    spec = {
        "domains": ["several.test", "*.several.test"],
        "http": {"port": 8080},
        "advertise_custom": advertise(["a"]),
        "default_route_pools": to("first"),
    }
    await sites.make("http_loadbalancer", "several", spec)
    assert [(await sites.call(host)).status_code for host in ("several.test", "x.several.test", "X.SEVERAL.test:8080", "severaltest")] == [
        200,
        200,
        200,
        404,
    ]
