"""Origin pools: how origins are found, chosen among, checked and spared; requests enter at `a`."""

import asyncio
import sys
from base64 import b64encode
from typing import Any

import httpx
import httpx2
import pytest

from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.process import Process
from lab.specs import k8s_pool
from lab.wait import until
from tests.e2e.origins import Origin
from tests.e2e.two_sites import TwoSites, locator, simple

pytestmark = [pytest.mark.asyncio(loop_scope="package"), pytest.mark.timeout(120)]

ECHO = (sys.executable, "-m", "lab.echo")


@pytest.fixture
def sites(shared_sites: TwoSites) -> TwoSites:
    return shared_sites


async def pair(sites: TwoSites, name: str, *at: str) -> list[Origin]:
    """Origins `<name>-1`, `<name>-2` … at these sites."""
    return [await sites.origin(site, f"{name}-{number}") for number, site in enumerate(at, 1)]


# Kinds of origins


async def test_private_addresses_and_names_and_public_names_lead_to_origins(sites: TwoSites) -> None:
    await sites.serve("by-address", await sites.origin("b", "address"))
    assert await sites.who("by-address.test", 2) == {"address"}
    there = await sites.origin("b", "there", address="127.0.0.1", port=0)
    here = await sites.origin("a", "here", address="127.0.0.1", port=0)
    private = {"private_name": {"dns_name": "localhost", "site_locator": locator("b"), "inside_network": {}}}
    public = {"public_name": {"dns_name": "localhost"}}
    for name, server, port in (("private-name", private, there.port), ("public-name", public, here.port)):
        await sites.fabric.api.create("origin_pool", name, {"origin_servers": [server], "port": port})
    assert await sites.who(await sites.load_balancer("private-name", "private-name"), 2) == {"there"}
    assert await sites.who(await sites.load_balancer("public-name", "public-name"), 2) == {"here"}


async def test_kubernetes_services_are_used_here_and_there(sites: TwoSites) -> None:
    for name in ("a", "b"):
        await sites.fabric.site(name).cluster.deploy("echo", ECHO, replicas=2)
        await sites.fabric.api.create("origin_pool", f"echo-{name}", k8s_pool("echo", [name]))
        domain = await sites.load_balancer(f"echo-{name}", f"echo-{name}")
        pods = {pod.name for pod in sites.fabric.site(name).cluster.services["echo"].pods}

        async def all_answer(domain: str = domain, pods: set[str] = pods) -> bool:
            return {(await sites.call(domain)).headers.get("x-pod") for _ in range(8)} == pods

        await until(all_answer, f"the pods of {name}")


# Algorithms


@pytest.mark.parametrize("site", ["a", "b"])
@pytest.mark.parametrize("algorithm", ["ROUND_ROBIN", "LEAST_REQUEST", "RING_HASH", "RANDOM", "LB_OVERRIDE"])
async def test_every_algorithm_is_accepted_and_serves(sites: TwoSites, algorithm: str, site: str) -> None:
    name = f"{algorithm.lower().replace('_', '-')}-{site}"
    origins = await pair(sites, name, site, site)
    domain = await sites.serve(name, *origins, pool={"loadbalancer_algorithm": algorithm}, random={})
    found = await sites.who(domain, 24)
    assert found <= {origin.name for origin in origins}
    if algorithm != "RING_HASH":
        assert len(found) == 2


@pytest.mark.parametrize("site", ["a", "b"])
async def test_clients_stick_to_an_origin_by_header_cookie_and_address(sites: TwoSites, site: str) -> None:
    origins = await pair(sites, f"sticky-{site}", site, site, site)
    await sites.pool(f"ring-{site}", *origins, loadbalancer_algorithm="RING_HASH")
    await sites.pool(f"override-{site}", *origins, loadbalancer_algorithm="LB_OVERRIDE")
    by_header = await sites.load_balancer(
        f"by-header-{site}", f"ring-{site}", ring_hash={"hash_policy": [{"header_name": "x-user", "terminal": True}]}
    )
    by_cookie = await sites.load_balancer(f"by-cookie-{site}", f"override-{site}", cookie_stickiness={"name": "session", "ttl": 0})
    by_source = await sites.load_balancer(f"by-source-{site}", f"override-{site}", source_ip_stickiness={})
    users = [{"x-user": f"user {number}"} for number in range(12)]
    assert [len(await sites.who(by_header, 4, headers=user)) for user in users] == [1] * 12
    assert len({next(iter(await sites.who(by_header, 1, headers=user))) for user in users}) > 1
    sessions = [{"cookie": f"other=1; session=s{number}"} for number in range(12)]
    assert [len(await sites.who(by_cookie, 4, headers=session)) for session in sessions] == [1] * 12
    assert len({next(iter(await sites.who(by_cookie, 1, headers=session))) for session in sessions}) > 1
    assert len(await sites.who(by_source, 12)) == 1


@pytest.mark.parametrize("at", ["aaa", "bbb", "aabb"], ids=["here", "there", "both"])
async def test_a_client_without_a_cookie_gets_one_that_makes_it_stick(sites: TwoSites, at: str) -> None:
    name = f"gets-cookie-{at}"
    origins = await pair(sites, name, *at)
    cookie = {"name": "session", "path": "/", "ttl": 60_000}
    domain = await sites.serve(name, *origins, pool={"loadbalancer_algorithm": "LB_OVERRIDE"}, cookie_stickiness=cookie)
    first = set()

    async def sticks() -> bool:
        """Not while the sites still learn of each other's origins, which moves shares of the clients."""
        answer = await sites.call(domain)
        first.add(answer.headers["x-origin"])
        (given,) = answer.headers.get_list("set-cookie")
        pair_, *attributes = given.split("; ")
        assert attributes == ["Max-Age=60", "Path=/", "HttpOnly"]
        (await sites.client("a")).cookies.clear()
        answers = [await sites.call(domain, headers={"cookie": f"other=1; {pair_}"}) for _ in range(4)]
        assert all("set-cookie" not in again.headers for again in answers)
        return {again.headers["x-origin"] for again in answers} == {answer.headers["x-origin"]}

    async def all_stick() -> bool:
        return all([await sticks() for _ in range(12)])

    await until(all_stick, "twelve clients in a row to stay where they are")
    assert len(first) > 1


@pytest.mark.parametrize(
    ("selection", "expected", "without_local"),
    [
        ("LOCAL_ONLY", {"local"}, None),
        ("LOCAL_PREFERRED", {"local"}, {"remote"}),
        ("DISTRIBUTED", {"local", "remote"}, {"remote"}),
    ],
)
async def test_endpoint_selection_decides_between_sites(
    sites: TwoSites, selection: str, expected: set[str], without_local: set[str] | None
) -> None:
    local, remote = await sites.origin("a", "local"), await sites.origin("b", "remote")
    pool = {"endpoint_selection": selection, "healthcheck": [{"name": "http"}]}
    domain = await sites.serve(selection.lower().replace("_", "-"), local, remote, pool=pool)
    await sites.settles(domain, expected)
    local.healthy = False
    if without_local:
        await sites.settles(domain, without_local)
    else:

        async def refuses() -> bool:
            return (await sites.call(domain)).status_code == 503

        await until(refuses, "no other site to be used")
        assert remote.seen == []


# Health


async def health(sites: TwoSites, kind: str, name: str, pool: str) -> dict[str, tuple[int, int]]:
    """By site: healthy and total origins, as the status says."""
    status = await sites.fabric.api.status(kind, name)
    return {
        at["site"]: (origin["healthy"], origin["total"]) for at in status["sites"] for origin in at["origins"] if origin["pool"] == pool
    }


async def status_says(sites: TwoSites, kind: str, name: str, expected: dict[str, tuple[int, int]]) -> None:
    async def says() -> bool:
        return await health(sites, kind, name, f"lab/{name}") == expected

    await until(says, f"the status of {kind} {name} to say {expected}")


async def test_unhealthy_origins_are_not_used_and_status_counts_them(sites: TwoSites) -> None:
    origins = await pair(sites, "checked", "a", "b", "b")
    domain = await sites.serve("checked", *origins, pool={"healthcheck": [{"name": "http"}]})
    await sites.settles(domain, {"checked-1", "checked-2", "checked-3"}, 24)
    await status_says(sites, "origin_pool", "checked", {"a": (1, 1), "b": (2, 2)})
    origins[2].healthy = False
    await sites.settles(domain, {"checked-1", "checked-2"}, 24)
    await status_says(sites, "origin_pool", "checked", {"a": (1, 1), "b": (1, 2)})
    status = await sites.fabric.api.status("http_loadbalancer", "checked")
    assert status["applied"]
    assert {at["site"]: at["state"] for at in status["sites"]} == {"a": "Applied", "b": "Applied"}


async def test_tcp_health_checks_find_who_does_not_listen(sites: TwoSites) -> None:
    origins = await pair(sites, "listening", "b", "b")
    domain = await sites.serve("listening", *origins, pool={"healthcheck": [{"name": "tcp"}]})
    await sites.settles(domain, {"listening-1", "listening-2"})
    origins[1].stop()
    await status_says(sites, "origin_pool", "listening", {"b": (1, 2)})


@pytest.mark.parametrize("site", ["a", "b"])
async def test_an_origin_that_keeps_failing_is_ejected(sites: TwoSites, site: str) -> None:
    origins = await pair(sites, f"ejecting-{site}", site, site)
    origins[1].status = 500
    detection = {"consecutive_5xx": 2, "interval": 100, "base_ejection_time": 60_000, "max_ejection_percent": 50}
    domain = await sites.serve(f"ejecting-{site}", *origins, pool={"advanced_options": {"outlier_detection": detection}})
    await sites.settles(domain, {f"ejecting-{site}-1"}, 10)


@pytest.mark.parametrize("site", ["a", "b"])
async def test_a_circuit_breaker_limits_what_is_under_way(sites: TwoSites, site: str) -> None:
    origin = await sites.origin(site, f"busy-{site}")
    options = {"advanced_options": {"circuit_breaker": {"connection_limit": 1, "max_requests": 1, "pending_requests": 1}}}
    route = simple("/", f"busy-{site}", advanced_options={"no_retry_policy": {}})
    domain = await sites.serve(f"busy-{site}", origin, pool=options, routes=[route])
    slow = [asyncio.create_task(sites.call(domain, "/slow")) for _ in range(6)]
    done, waiting = await asyncio.wait(slow, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    assert {task.result().status_code for task in done} == {503}

    async def arrived() -> bool:
        return len(origin.seen) > 0

    await until(arrived, "one request to arrive")
    origin.released.set()
    answers = [answer.status_code for answer in await asyncio.gather(*done, *waiting)]
    assert 200 in answers
    assert 503 in answers
    assert (await sites.call(domain)).status_code == 200


# Discovery


class Kubernetes:
    """A second cluster beside the one of site `b`, with an API that wants a token; service `far` in it."""

    def __init__(self, sites: TwoSites) -> None:
        place = sites.fabric.site("b").place
        self.address = f"{place.pods}250"
        directory = sites.fabric.directory / "second"
        self.kubeconfig = directory / "kubeconfig"
        argv = [sys.executable, "-m", "lab.kubernetes", "--listen", f"{self.address}:6443", "--tls", "--token", "let-me-in"]
        self.process: Process = sites.fabric.process("kubernetes", [*argv, "--kubeconfig-out", str(self.kubeconfig)], place, directory)
        self.sites = sites

    async def start(self) -> None:
        await self.process.start()

        async def written() -> bool:
            self.process.check()
            return self.kubeconfig.exists()

        await until(written, "the second cluster")
        host, port = await self.sites.fabric.site("b").reach(6443, self.address)
        self.client = httpx.AsyncClient(
            base_url=f"https://{host}:{port}", headers={"authorization": "Bearer let-me-in"}, verify=False, trust_env=False
        )

    async def post(self, path: str, body: dict[str, Any]) -> None:
        (await self.client.post(path, json=body)).raise_for_status()

    async def add_service(self, pod: Origin, node: Origin) -> None:
        """`far.elsewhere`: one pod, and one node whose node port leads to it."""
        await self.post("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "elsewhere"}})
        ready = [{"type": "Ready", "status": "True"}]
        status = {"addresses": [{"type": "InternalIP", "address": node.address}], "conditions": ready}
        await self.post("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, "status": status})
        port = {"name": "main", "port": 80, "targetPort": pod.port, "nodePort": node.port, "protocol": "TCP"}
        service = {"metadata": {"name": "far", "namespace": "elsewhere"}, "spec": {"type": "NodePort", "ports": [port]}}
        await self.post("/api/v1/namespaces/elsewhere/services", {"apiVersion": "v1", "kind": "Service", **service})
        slice_ = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "far-1", "namespace": "elsewhere", "labels": {"kubernetes.io/service-name": "far"}},
            "addressType": "IPv4",
            "ports": [{"name": "main", "port": pod.port, "protocol": "TCP"}],
            "endpoints": [{"addresses": [pod.address], "nodeName": "n1", "conditions": {"ready": True}}],
        }
        await self.post("/apis/discovery.k8s.io/v1/namespaces/elsewhere/endpointslices", slice_)

    async def add_ingress(self, controller: Origin, host: str) -> None:
        """An ingress controller behind a load balancer, which knows `far` by this host."""
        status = {"loadBalancer": {"ingress": [{"ip": controller.address}]}}
        service = objects.service("nginx", "elsewhere", controller.port, type="LoadBalancer") | {"status": status}
        await self.post("/api/v1/namespaces/elsewhere/services", service)
        ingress = objects.ingress("far", "elsewhere", {host: ("far", 80)})
        await self.post("/apis/networking.k8s.io/v1/namespaces/elsewhere/ingresses", ingress)


async def test_services_of_another_cluster_are_found_by_its_kubeconfig_and_id(sites: TwoSites) -> None:
    """Those of the site's own cluster that have the same name stay apart."""
    pod, ingress, own = [await sites.origin("b", name) for name in ("pod", "ingress", "own")]
    node = await sites.origin("b", "node", port=30_080)
    cluster = Kubernetes(sites)
    await cluster.start()
    await cluster.add_service(pod, node)
    await cluster.add_ingress(ingress, "far-through.test")
    async with httpx2.AsyncClient(**sites.fabric.site("b").cluster.connection) as http:
        api = Client(http)
        await api.create(objects.namespace("elsewhere"))
        await api.create(objects.service("far", "elsewhere"))
        await api.set_endpoints("far", "elsewhere", [own.address], own.port)
    kubeconfig = "string:///" + b64encode(cluster.kubeconfig.read_bytes()).decode()
    controller = {"service_name": "nginx.elsewhere", "port": 8080, "ingress_class": "nginx"}
    deliveries: dict[str, tuple[str, dict[str, Any]]] = {
        "open": ("reachable", {}),
        "shut": ("isolated", {}),
        "through": ("ingress_controller", controller),
    }
    for cluster_id, (delivery, how) in deliveries.items():
        access = {"kubeconfig_url": {"clear_secret_info": {"url": kubeconfig}}, delivery: how}
        where = {"site": {"ref": [{"namespace": "system", "name": "b"}], "network_type": "VIRTUAL_NETWORK_SITE_LOCAL"}}
        spec = {"where": where, "cluster_id": cluster_id, "discovery_k8s": {"access_info": access, "publish_info": {"disable": {}}}}
        await sites.make("discovery", cluster_id, spec, namespace="system")
        read = await sites.fabric.api.get("discovery", cluster_id, namespace="system")
        assert read["spec"]["discovery_k8s"]["access_info"]["kubeconfig_url"].keys() == {"blindfold_secret_info"}
        assert "let-me-in" not in str(read)
        assert kubeconfig not in str(read)
        await far(sites, f"far-{cluster_id}", f"far.elsewhere:{cluster_id}")
    await far(sites, "far-own", "far.elsewhere")
    await sites.settles("far-open.test", {"pod"}, 2)
    await sites.settles("far-shut.test", {"node"}, 2)
    await sites.settles("far-through.test", {"ingress"}, 2)
    assert ingress.seen[-1].headers["host"] == "far-through.test"
    await sites.settles("far-own.test", {"own"}, 2)
    assert await deliveries_shown(sites) == {
        "": ("reachable", []),
        "open": ("reachable", []),
        "shut": ("isolated", []),
        "through": ("ingress_controller", ["far-through.test"]),
    }
    await cluster.client.aclose()


async def far(sites: TwoSites, name: str, service: str) -> None:
    """A load balancer `<name>.test` for a service of a cluster that `b` discovers."""
    server = {"service_name": service, "site_locator": locator("b"), "inside_network": {}}
    await sites.fabric.api.create("origin_pool", name, {"origin_servers": [{"k8s_service": server}], "port": 80})
    await sites.load_balancer(name, name)


async def deliveries_shown(sites: TwoSites) -> dict[str, tuple[str, list[str]]]:
    """By cluster id: how `far` is delivered, and under which hosts."""
    shown: dict[str, tuple[str, list[str]]] = {}

    async def all_four() -> bool:
        answer = await sites.fabric.api.request("GET", "/api/discovery/namespaces/system/discovered_services?service=far&site=b")
        services = [item["get_spec"]["k8s_service"] for item in answer["items"]]
        shown.update({each["cluster_id"]: (each["delivery"], each["hosts"]) for each in services})
        return len(shown) == 4

    await until(all_four, "the services to be reported")
    return shown
