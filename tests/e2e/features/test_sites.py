"""Who may call what from where: policies, where load balancers appear, tenants, and listeners that change under load."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from agent.envoy.inputs import NodeIdentity
from agent.protocol.enrolment import Credentials
from agent.protocol.items import Gateway
from lab.api import Api, Refused
from lab.site import GATEWAY_PORT
from lab.specs import advertise, tcp_loadbalancer
from lab.wait import until
from tests.e2e.certificates import Authority
from tests.e2e.gateway_client import Http2, connect, dial, get, through
from tests.e2e.origins import Origin
from tests.e2e.two_sites import TwoSites, simple, to

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(120)]


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def sites(shared_sites: TwoSites) -> TwoSites:
    """Pool `far` with its origin in `b`."""
    await shared_sites.pool("far", await shared_sites.origin("b", "far"))
    return shared_sites


@pytest.fixture
def far(sites: TwoSites) -> Origin:
    return next(origin for origin in sites.origins if origin.name == "far")


# Policies


def rules(*specs: dict[str, Any]) -> dict[str, Any]:
    named = [{"metadata": {"name": f"rule-{number}"}, "spec": spec} for number, spec in enumerate(specs)]
    return {"algo": "FIRST_MATCH", "any_server": {}, "rule_list": {"rules": named}}


DENY: dict[str, Any] = {"action": "DENY"}
ALLOW: dict[str, Any] = {"action": "ALLOW"}


async def guarded(sites: TwoSites, name: str, policy: dict[str, Any], *, at: Sequence[str] = ("a", "b")) -> str:
    """A load balancer for pool `far` with this policy."""
    await sites.fabric.api.create("service_policy", name, policy)
    active: dict[str, Any] = {"active_service_policies": {"policies": [{"namespace": "lab", "name": name}]}}
    return await sites.load_balancer(name, "far", sites=at, **active)


@pytest.mark.parametrize(
    "client",
    [{"client_name": "b"}, {"client_selector": {"expressions": ["ves.io/siteName in (b)"]}}],
    ids=["name", "labels"],
)
async def test_a_source_site_is_allowed_or_denied(sites: TwoSites, client: dict[str, Any], request: pytest.FixtureRequest) -> None:
    by = request.node.callspec.id
    denying = await guarded(sites, f"deny-site-by-{by}", rules({**DENY, **client}, ALLOW))
    allowing = await guarded(sites, f"allow-site-by-{by}", rules({**ALLOW, **client}))
    assert [(await sites.call(denying, site=site)).status_code for site in ("a", "b")] == [200, 403]
    assert [(await sites.call(allowing, site=site)).status_code for site in ("a", "b")] == [403, 200]


async def test_addresses_of_clients_are_allowed_or_denied(sites: TwoSites) -> None:
    open_to_all = await sites.load_balancer("seen-from", "far")
    address = (await sites.call(open_to_all)).json()["headers"]["x-forwarded-for"]
    denied = await guarded(sites, "deny-address", rules({**DENY, "ip_prefix_list": {"ip_prefixes": [f"{address}/32"]}}, ALLOW))
    others = await guarded(sites, "allow-others", rules({**ALLOW, "ip_prefix_list": {"ip_prefixes": ["9.9.9.0/24"]}}))
    listed = await guarded(sites, "allow-list", {"allow_list": {"prefix_list": {"prefixes": [f"{address}/32"]}, "default_action_deny": {}}})
    assert [(await sites.call(domain)).status_code for domain in (denied, others, listed)] == [403, 403, 200]
    assert (await sites.call(others, headers={"x-forwarded-for": "9.9.9.9"})).status_code == 403


@pytest.mark.parametrize(
    ("condition", "denied", "allowed"),
    [
        ({"http_method": {"methods": ["DELETE"]}}, {"method": "DELETE"}, {}),
        ({"path": {"prefix_values": ["/admin"]}}, {"path": "/admin/x"}, {"path": "/x/admin"}),
        ({"path": {"regex_values": ["/v[0-9]+"]}}, {"path": "/v2"}, {"path": "/v2/x"}),
        ({"headers": [{"name": "x-who", "item": {"exact_values": ["eve"]}}]}, {"headers": {"x-who": "eve"}}, {"headers": {"x-who": "bob"}}),
    ],
    ids=["method", "prefix", "regex", "header"],
)
async def test_requests_are_denied_by_what_they_ask(
    sites: TwoSites,
    far: Origin,
    condition: dict[str, Any],
    denied: dict[str, Any],
    allowed: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    domain = await guarded(sites, f"deny-by-{request.node.callspec.id}", rules({**DENY, **condition}, ALLOW))
    before = len(far.seen)
    assert (await sites.call(domain, **denied)).status_code == 403
    assert len(far.seen) == before
    assert (await sites.call(domain, **allowed)).status_code == 200


async def test_a_change_of_a_policy_bites_at_once(sites: TwoSites) -> None:
    domain = await guarded(sites, "changing", rules(ALLOW))
    assert (await sites.call(domain)).status_code == 200
    await sites.change("service_policy", "changing", rules(DENY))
    assert (await sites.call(domain)).status_code == 403


# The destination


@asynccontextmanager
async def as_node_of_a(sites: TwoSites, directory: Path) -> AsyncIterator[Http2]:
    """A connection to the gateway of `b` with the real certificate and key of `a`, made by hand: nothing in `a` judges what it asks."""
    state = sites.fabric.site("a").agent.directory / "state"
    found = Credentials.model_validate_json((state / "credentials").read_bytes())
    key = (state / "node.key").read_text()
    node = NodeIdentity(found.node_id, found.node_name, found.site_id, found.site_name, found.certificate_pem, key)
    gateway = Gateway(node_id="", host=sites.fabric.site("b").place.underlay, port=GATEWAY_PORT)
    dialled = sites.fabric.site("a").place.socket()
    await asyncio.get_running_loop().sock_connect(dialled, (gateway.host, gateway.port))
    async with dial(gateway, node, directory, dialled=dialled) as client:
        yield client


async def test_the_destination_judges_again(sites: TwoSites, far: Origin, tmp_path: Path) -> None:
    """With the source out of the way."""
    denied = {**DENY, "path": {"prefix_values": ["/admin"]}}
    await guarded(sites, "judged", rules({**DENY, "client_name": "b"}, denied, ALLOW))
    await guarded(sites, "not-for-a", rules({**DENY, "client_name": "a"}, ALLOW))

    async def ask(load_balancer: str, path: str, *more: tuple[str, str]) -> int:
        async with as_node_of_a(sites, tmp_path) as client:
            headers = get("judged.test", path, ("x-isthmus-lb", f"lab/{load_balancer}"), ("x-isthmus-path", path), *more)
            return await through(client, "far.lab.http", headers)

    assert await ask("judged", "/fine") == 200
    before = len(far.seen)
    assert await ask("judged", "/admin/x") == 403
    assert await ask("judged", "/admin/x", ("x-isthmus-exempt", "1")) == 403
    assert await ask("not-for-a", "/fine") == 403
    assert await ask("unheard-of", "/fine") in {403, 404}
    assert len(far.seen) == before


async def test_a_route_without_policies_is_open_here_and_at_the_destination(sites: TwoSites, far: Origin, tmp_path: Path) -> None:
    await sites.fabric.api.create("service_policy", "but-health", rules(DENY))
    active: dict[str, Any] = {"active_service_policies": {"policies": [{"namespace": "lab", "name": "but-health"}]}}
    routes = [simple("/open", "far", advanced_options={"service_policy": {"disable": True}}), simple("/", "far")]
    domain = await sites.load_balancer("but-health", routes=routes, default_route_pools=[], **active)
    assert (await sites.call(domain, "/open/x")).status_code == 200
    before = len(far.seen)
    assert (await sites.call(domain, "/shut", headers={"x-isthmus-exempt": "1"})).status_code == 403
    async with as_node_of_a(sites, tmp_path) as client:
        headers = get(domain, "/shut", ("x-isthmus-lb", "lab/but-health"), ("x-isthmus-path", "/shut"))
        assert await through(client, "far.lab.http", headers) == 403
    assert len(far.seen) == before


async def test_a_node_opens_only_the_exports_that_are_for_its_site(sites: TwoSites, tmp_path: Path) -> None:
    await sites.pool("own", await sites.origin("b", "own"))
    await sites.load_balancer("own", "own", sites=["b"])
    async with as_node_of_a(sites, tmp_path) as client:
        assert await client.status(connect("own.lab.http")) in {403, 404}
        assert await client.status(connect("own.lab.tcp")) in {403, 404}
        assert await client.status(connect("nothing.lab.http")) in {403, 404}


# Where load balancers appear


async def listens(sites: TwoSites, site: str, port: int, host: str | None = None) -> bool:
    place = sites.fabric.site(site).place
    with place.socket() as probe:
        try:
            await asyncio.get_running_loop().sock_connect(probe, (host or place.inside, port))
        except ConnectionRefusedError:
            return False
    return True


async def answered_at(sites: TwoSites, site: str, host: str, port: int, domain: str) -> int:
    at, reached = await sites.fabric.site(site).reach(port, host)
    return (await sites.fabric.client(f"http://{at}:{reached}", {"host": domain}).get("/")).status_code


@pytest.mark.parametrize(
    ("network", "port", "hosts"),
    [
        ("SITE_NETWORK_INSIDE", 8201, {"inside"}),
        ("SITE_NETWORK_OUTSIDE", 8202, {"underlay"}),
        ("SITE_NETWORK_INSIDE_AND_OUTSIDE", 8203, {"inside", "underlay"}),
        ("SITE_NETWORK_SERVICE", 8204, {"service"}),
    ],
)
async def test_a_load_balancer_listens_on_the_networks_it_names(sites: TwoSites, network: str, port: int, hosts: set[str]) -> None:
    name = network.lower().replace("_", "-")
    domain = await sites.load_balancer(name, "far", port=port, advertise_custom=advertise(["a"], network))
    place = sites.fabric.site("a").place
    for each in ("inside", "underlay", "service"):
        host = getattr(place, each)
        assert await listens(sites, "a", port, host) == (each in hosts), each
        if each in hosts:
            assert await answered_at(sites, "a", host, port, domain) == 200
    assert not await listens(sites, "b", port)


async def test_a_changed_label_moves_an_advertisement_live(sites: TwoSites) -> None:
    api, port = sites.fabric.api, 8300

    async def label(site: str, **labels: str) -> None:
        read = await api.get("site", site)
        await api.replace("site", site, read["spec"], labels={**read["metadata"]["labels"], **labels})

    selector = {"site_type": "CUSTOMER_EDGE", "site_selector": {"expressions": ["door in (open)"]}}
    await api.create("virtual_site", "doors", selector)
    where = {"virtual_site": {"virtual_site": {"name": "doors"}, "network": "SITE_NETWORK_INSIDE"}, "port": port}
    domain = await sites.load_balancer("moving", "far", advertise_custom={"advertise_where": [where]})
    assert [await listens(sites, site, port) for site in ("a", "b")] == [False, False]
    for here, there in (("a", "b"), ("b", "a")):
        await label(there, door="closed")
        await label(here, door="open")

        async def moved(here: str = here, there: str = there) -> bool:
            return await listens(sites, here, port) and not await listens(sites, there, port)

        await until(moved, f"the load balancer to listen at {here} only")
        assert (await sites.call(domain, site=here, port=port)).status_code == 200
        status = await api.status("http_loadbalancer", "moving")
        assert {at["site"]: at["state"] for at in status["sites"]}[here] == "Applied"


# Tenants


async def test_tenants_do_not_see_each_other(sites: TwoSites) -> None:
    replica = sites.fabric.replicas[0]
    made = await sites.fabric.api.request("POST", "/api/operator/tenants", {"name": "other"})
    other = Api(replica.url, replica.ca, made["token"])

    async def refused(method: str, path: str, body: Any = None) -> int:
        with pytest.raises(Refused) as caught:
            await other.request(method, path, body)
        return caught.value.status

    pools = "/api/config/namespaces/lab/origin_pools"
    try:
        assert await refused("GET", f"{pools}/far") == 404
        assert await refused("GET", "/api/config/namespaces/system/sites/a") == 404
        assert await refused("DELETE", f"{pools}/far") == 404
        assert await refused("GET", "/api/operator/tenants") == 403
        in_default = await other.client.get(f"{pools}/far", headers={"x-volterra-apigw-tenant": "default"})
        assert in_default.status_code == 403
        await other.create("namespace", "lab", {})
        server = {"public_ip": {"ip": "192.0.2.1"}}
        await other.create("origin_pool", "far", {"origin_servers": [server], "port": 1})
        assert (await other.get("origin_pool", "far"))["spec"]["port"] == 1
        assert (await sites.fabric.api.get("origin_pool", "far"))["spec"]["port"] == 8080
        assert [item["name"] for item in (await other.request("GET", pools))["items"]] == ["far"]
        foreign = {
            "domains": ["foreign.test"],
            "http": {"port": 8080},
            "advertise_custom": advertise(["a"]),
            "default_route_pools": [{"pool": {"tenant": "default", "namespace": "lab", "name": "far"}, "weight": 1}],
        }
        body = {"metadata": {"name": "foreign", "namespace": "lab"}, "spec": foreign}
        assert await refused("POST", "/api/config/namespaces/lab/http_loadbalancers", body) == 400
    finally:
        await other.close()


# Listeners that change


class KeptAlive:
    """One connection of a client that never opens another: `asked` requests got their answers on it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, domain: str) -> None:
        self.reader, self.writer, self.domain, self.asked = reader, writer, domain, 0

    async def ask(self) -> None:
        """Raises `IncompleteReadError` or `ConnectionError` if the connection was closed."""
        self.writer.write(f"GET / HTTP/1.1\r\nhost: {self.domain}\r\n\r\n".encode())
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(line.partition(":")[2] for line in head.split("\r\n") if line.startswith("content-length:"))
        await self.reader.readexactly(int(length))
        assert head.startswith("http/1.1 200"), head
        assert "connection: close" not in head, self.domain
        self.asked += 1


@asynccontextmanager
async def steady(kept: Sequence[KeptAlive]) -> AsyncIterator[None]:
    """All of them ask without a pause; each got more answers after the body had ended than before."""
    over = asyncio.Event()

    async def load(each: KeptAlive) -> None:
        while not over.is_set():
            await each.ask()
        for _ in range(5):
            await each.ask()

    try:
        async with asyncio.TaskGroup() as group:
            for each in kept:
                group.create_task(load(each))
            yield
            over.set()
    finally:
        for each in kept:
            each.writer.close()


async def test_no_connection_is_lost_when_load_balancers_come_and_go(sites: TwoSites) -> None:
    authority, port, secure = Authority.create(), 8400, 8401
    plain = await sites.load_balancer("kept", "far", port=port)

    def tls(domain: str) -> dict[str, Any]:
        certificate = authority.issue(domain).as_field()
        return {"http": None, "https": {"port": secure, "tls_parameters": {"tls_certificates": [certificate]}}}

    sealed = await sites.load_balancer("kept-tls", "far", **tls("kept-tls.test"))
    kept = [KeptAlive(*await sites.fabric.site("a").connect(port), plain) for _ in range(4)]
    context: ssl.SSLContext = authority.client_context()
    for _ in range(4):
        dialled = sites.fabric.site("a").place.socket()
        await asyncio.get_running_loop().sock_connect(dialled, (sites.fabric.site("a").place.inside, secure))
        kept.append(KeptAlive(*await asyncio.open_connection(sock=dialled, ssl=context, server_hostname=sealed), sealed))
    async with steady(kept):
        await sites.load_balancer("beside", "far", port=port)
        await sites.load_balancer("another-port", "far", port=port + 2)
        await sites.load_balancer("beside-tls", "far", **tls("beside-tls.test"))
        await sites.make("tcp_loadbalancer", "bytes", tcp_loadbalancer(["far"], ["a"], port + 3))
        spec = (await sites.fabric.api.get("http_loadbalancer", "kept"))["spec"]
        await sites.change("http_loadbalancer", "kept", {**spec, "domains": [plain, "another.test"], "default_route_pools": to("far")})
        for kind, name in (("http_loadbalancer", "beside"), ("http_loadbalancer", "another-port"), ("tcp_loadbalancer", "bytes")):
            await sites.fabric.api.delete(kind, name)
        assert (await sites.call("another.test", port=port)).status_code == 200

        async def gone() -> bool:
            return not await listens(sites, "a", port + 2)

        await until(gone, "the other listener to be gone")
    assert min(each.asked for each in kept) > 5
