"""The deployment patterns, mixed: site `a` is an agent that one command installed in its cluster, site `b` one outside of any cluster's network."""

import json
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from lab.fabric import Fabric
from lab.installed import NAMESPACE, NODE_PORT
from lab.kubernetes.client import Client
from lab.process import with_files
from lab.site import GATEWAY_PORT
from lab.specs import advertise, k8s_pool
from lab.traffic import Traffic
from lab.wait import until
from tests.e2e.certificates import Authority, inline
from tests.e2e.two_sites import TwoSites, locator, to

pytestmark = [
    pytest.mark.root,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(180),
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, which installs the agent"),
]

ECHO = (sys.executable, "-m", "lab.echo")
GATEWAY = "isthmus-gateway"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def sites(show_logs_of: list[Fabric]) -> AsyncIterator[TwoSites]:
    """Each has a service `echo` in its cluster, which the other calls at `echo-a.test` and `echo-b.test`."""
    async with Fabric(("a", "b"), installed=("a",)) as fabric:
        show_logs_of.append(fabric)
        sites = TwoSites(fabric)
        for here, there in (("a", "b"), ("b", "a")):
            await fabric.site(here).cluster.deploy("echo", ECHO, replicas=2)
            await fabric.api.create("origin_pool", f"echo-{here}", k8s_pool("echo", [here]))
            domain = await sites.load_balancer(f"echo-{here}", f"echo-{here}", sites=[there])
            await answered(sites, domain, there)
        try:
            yield sites
        finally:
            sites.close()


@pytest_asyncio.fixture(loop_scope="module")
async def api(sites: TwoSites) -> AsyncIterator[Client]:
    """Of the cluster of `a`, as its administrator."""
    async with httpx2.AsyncClient(**sites.fabric.site("a").cluster.connection) as http:
        yield Client(http)


async def answered(sites: TwoSites, domain: str, site: str) -> None:
    async def answers() -> bool:
        return (await sites.call(domain, site=site)).status_code == 200

    await until(answers, f"{domain} to be answered at {site}")


def told(sites: TwoSites) -> Any:
    """What the agent in the cluster says of itself."""
    return json.loads((sites.fabric.site("a").agent.directory / "tmp/run/status.json").read_text())


async def advertises(sites: TwoSites, *gateways: str) -> None:
    async def does() -> bool:
        return bool(told(sites)["gateways"] == list(gateways))

    await until(does, f"the agent to advertise {gateways}")


async def test_both_call_each_other_and_the_installed_one_needs_no_more_than_it_was_given(sites: TwoSites) -> None:
    for here, there in (("a", "b"), ("b", "a")):
        pods = {pod.name for pod in sites.fabric.site(here).cluster.services["echo"].pods}
        answers = [await sites.call(f"echo-{here}.test", site=there) for _ in range(12)]
        assert {answer.headers["x-pod"] for answer in answers} == pods
    said = told(sites)
    assert said["discoveries"] == {"in-cluster": {"connected": True, "reason": ""}}
    assert (said["warnings"], said["rejected"]) == ([], [])
    assert said["gateways"] == [f"{sites.fabric.site('a').place.underlay}:{NODE_PORT}"]


async def test_peers_follow_the_address_of_the_gateways_service_and_lose_no_request_when_the_old_one_ends(
    sites: TwoSites, api: Client
) -> None:
    fabric, place = sites.fabric, sites.fabric.site("a").place
    machine = fabric.site("a").tap
    assert machine is not None
    balancer, other_port = await fabric.tap(place), await fabric.node_port(place, NODE_PORT + 1)
    client = await fabric.site("b").node.http(8080, "echo-a.test")
    async with Traffic(client, "/", rate=50) as traffic:
        await traffic.more(20)
        crossed = balancer.record()
        await api.patch("Service", GATEWAY, {"spec": {"type": "LoadBalancer"}}, NAMESPACE)
        status = {"loadBalancer": {"ingress": [{"ip": balancer.address[0]}]}}
        await api.patch("Service", f"{GATEWAY}/status", {"status": status}, NAMESPACE)
        await advertises(sites, f"{balancer.address[0]}:{GATEWAY_PORT}")
        await dialled(crossed)
        await machine.cut()
        await traffic.more(50)

        crossed = other_port.record()
        ports = [{"name": "gateway", "port": GATEWAY_PORT, "targetPort": "gateway", "nodePort": NODE_PORT + 1}]
        await api.patch("Service", GATEWAY, {"spec": {"type": "NodePort", "ports": ports}}, NAMESPACE)
        await advertises(sites, f"{place.underlay}:{NODE_PORT + 1}")
        await dialled(crossed)
        await balancer.cut()
        await traffic.more(50)
    assert traffic.failures == []
    machine.mend()


async def dialled(crossed: bytearray) -> None:
    """Until a peer has a tunnel where this is recorded."""

    async def has() -> bool:
        return len(crossed) > 2_000

    await until(has, "the new address to be dialled")


async def test_the_node_outside_is_an_egress_gateway_with_tls_policy_and_names_that_are_looked_up_again(
    sites: TwoSites, tmp_path: Path
) -> None:
    """A pod of cluster `a` calls an API on the internet, which only `b` can resolve and reach."""
    fabric, authority = sites.fabric, Authority.create()
    name, agent = "api.example.com", sites.fabric.site("b").agent
    hosts = tmp_path / "hosts"
    first, second = [
        await sites.origin("b", each, tls=authority.issue(name).server_context(tmp_path), address=f"127.0.0.{at}", port=443)
        for at, each in ((81, "first"), (82, "second"))
    ]
    hosts.write_text(f"127.0.0.1 localhost\n{first.address} {name}\n")
    await agent.stop()
    agent.argv = with_files(agent.argv, {"/etc/hosts": hosts})
    await agent.start()
    verified = {"use_server_verification": {"trusted_ca_url": inline(authority.pem)}}
    tls = {"tls_config": {"default_security": {}}, "sni": name, **verified, "no_mtls": {}}
    origin = {"private_name": {"dns_name": name, "site_locator": locator("b"), "outside_network": {}, "refresh_interval": 10}}
    await fabric.api.create("origin_pool", "egress", {"origin_servers": [origin], "port": 443, "use_tls": tls})
    rules = [
        {
            "metadata": {"name": "reads"},
            "spec": {"action": "ALLOW", "http_method": {"methods": ["GET"]}, "path": {"prefix_values": ["/v1/"]}},
        }
    ]
    await fabric.api.create("service_policy", "egress", {"algo": "FIRST_MATCH", "any_server": {}, "rule_list": {"rules": rules}})
    await sites.make(
        "http_loadbalancer",
        "egress",
        {
            "domains": [name],
            "http": {"port": 8080},
            "advertise_custom": advertise(["a"]),
            "default_route_pools": to("egress"),
            "active_service_policies": {"policies": [{"namespace": "lab", "name": "egress"}]},
        },
    )
    await sites.settles(name, {"first"}, 2, path="/v1/items")
    assert first.seen[-1].sni == name
    seen = len(first.seen)
    refused = [await sites.call(name, "/v2/items"), await sites.call(name, "/v1/items", "DELETE")]
    assert [answer.status_code for answer in refused] == [403, 403]
    assert len(first.seen) == seen
    hosts.write_text(f"127.0.0.1 localhost\n{second.address} {name}\n")
    await sites.settles(name, {"second"}, 4, path="/v1/items")


async def test_the_node_outside_is_a_secure_ingress_for_services_of_both_clusters(sites: TwoSites) -> None:
    fabric, authority = sites.fabric, Authority.create()
    certificate = authority.issue("shop.example.com").as_field()
    routes = [{"simple_route": {"path": {"prefix": f"/{each}"}, "origin_pools": to(f"echo-{each}")}} for each in ("a", "b")]
    spec = {
        "domains": ["shop.example.com"],
        "https": {"port": 8443, "tls_parameters": {"tls_certificates": [certificate]}},
        "advertise_custom": advertise(["b"], "SITE_NETWORK_OUTSIDE"),
        "routes": routes,
    }
    await sites.make("http_loadbalancer", "secure", spec)
    node = fabric.site("b").node
    host, port = await node.reach(8443, node.place.underlay)
    async with httpx2.AsyncClient(verify=authority.client_context(), trust_env=False) as outside:
        named: Any = {"sni_hostname": "shop.example.com"}
        for each in ("a", "b"):
            answer = await outside.get(f"https://{host}:{port}/{each}", headers={"host": "shop.example.com"}, extensions=named)
            assert (answer.status_code, answer.headers["x-pod"].rsplit("-", 2)[1]) == (200, each)
    with pytest.raises(ConnectionRefusedError):
        await node.place.dial((node.place.inside, 8443))
