"""Pods call names of their own cluster, and pods of another cluster answer; and it is seen which pods call."""

import asyncio
import http.client
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
import pytest_asyncio
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own

from lab.cluster import API_PORT
from lab.fabric import MESH, Fabric
from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.network import can_use_namespaces
from lab.site import Site
from lab.specs import http_loadbalancer, k8s_pool
from lab.wait import until

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.skipif(not can_use_namespaces(), reason="needs root and network namespaces: pods cannot be led to loopback addresses"),
]

NAME = "backend.shop"
ECHO = (sys.executable, "-m", "lab.echo")
DEFINITIONS = sorted((Path(__file__).parents[2] / "deploy/kubernetes/multicluster").glob("service*.yaml"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fabric(show_logs_of: list[Fabric]) -> AsyncIterator[Fabric]:
    """Its clusters know the Multi-Cluster Services API."""
    async with Fabric(("a", "b")) as fabric:
        show_logs_of.append(fabric)
        for site in fabric.sites.values():
            async with cluster_of(site) as cluster:
                for definition in DEFINITIONS:
                    await cluster.create(yaml.safe_load(definition.read_text()))
        yield fabric


async def eventually(condition: Callable[[], Awaitable[Any]], what: str) -> None:
    await until(condition, what, within_s=60)


async def publish(*sites: Site) -> None:
    """Switch it on, where it is not."""
    for site in sites:
        if "AGENT_PUBLISH" not in site.agent.env:
            site.agent.env = {**site.agent.env, "AGENT_PUBLISH": "true"}
            await site.agent.stop()
            await site.agent.start()


def published(*sites: str) -> dict[str, Any]:
    service = {"service": "backend", "namespace": "shop"}
    where = [{"vk8s_service": {"site": {"namespace": "system", "name": site}}, "publish": service} for site in sites]
    return http_loadbalancer(NAME, ["backend"], [], 80, advertise_custom={"advertise_where": where})


@asynccontextmanager
async def cluster_of(site: Site) -> AsyncIterator[Client]:
    host, port = await site.fabric.reach(site.place, (site.place.cluster, API_PORT))
    async with httpx2.AsyncClient(base_url=f"http://{host}:{port}", trust_env=False) as client:
        yield Client(client)


async def endpoints(cluster: Client, name: str = "backend") -> list[tuple[str, int]]:
    """Where the cluster's own proxies lead who calls the Service."""
    services = (await cluster.list("Service", "shop"))["items"]
    if name not in {service["metadata"]["name"] for service in services}:
        return []
    slices = (await cluster.list("EndpointSlice", "shop", labelSelector=f"kubernetes.io/service-name={name}"))["items"]
    return [
        (address, port["port"]) for each in slices for one in each["endpoints"] for address in one["addresses"] for port in each["ports"]
    ]


async def call(site: Site, endpoint: tuple[str, int]) -> httpx.Response:
    host, port = await site.reach(endpoint[1], endpoint[0])
    return await site.fabric.client(f"http://{host}:{port}", {"host": NAME}).get("/")


async def test_a_pod_calls_another_cluster_by_a_name_of_its_own(fabric: Fabric) -> None:
    async with cluster_of(fabric.site("a")) as cluster:
        a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
        await b.cluster.deploy("backend", ECHO)
        await api.create("origin_pool", "backend", k8s_pool("backend", ["b"]))
        await api.create("http_loadbalancer", "backend", published("a"))

        async def refused() -> bool:
            return "AGENT_PUBLISH" in str(await api.status("http_loadbalancer", "backend"))

        await eventually(refused, "the site to say that publishing is off")
        await publish(a)
        await eventually(lambda: endpoints(cluster), "the Service")
        assert (await api.applied("http_loadbalancer", "backend"))["applied"]
        (endpoint,) = await endpoints(cluster)
        assert endpoint == (a.place.service, 80)
        answer = await call(a, endpoint)
        assert answer.status_code == 200
        assert b.cluster.services["backend"].pods[0].name in answer.text

        await fabric.replicas[0].process.kill()
        await cluster.delete("Service", "backend", "shop")
        await cluster.delete("EndpointSlice", (await cluster.list("EndpointSlice", "shop"))["items"][0]["metadata"]["name"], "shop")
        await eventually(lambda: endpoints(cluster), "the Service to be back without the control plane")
        assert (await call(a, endpoint)).status_code == 200
        await fabric.replicas[0].process.start()

        async def gone() -> bool:
            return not (await cluster.list("Service", "shop"))["items"] and not await endpoints(cluster)

        await eventually(lambda: deleted(fabric), "the control plane to be back")
        await eventually(gone, "the Service to go with its load balancer")


async def deleted(fabric: Fabric) -> bool:
    try:
        await fabric.api.delete("http_loadbalancer", "backend")
    except httpx.TransportError as error:
        raise ConnectionError(str(error)) from error
    return True


async def export(site: Site, cluster: Client, name: str) -> None:
    """A service with a pod, and an address of its own, which the lab's services do not have by themselves."""
    await site.cluster.deploy(name, ECHO)
    await cluster.delete("Service", name, "shop")
    await cluster.create(objects.service(name, "shop", ports=[{"name": "main", "port": 8080}]))
    await cluster.create(objects.service_export(name, "shop"))


async def conditions(cluster: Client, export: str) -> dict[str, str]:
    said = (await cluster.get("ServiceExport", export, "shop")).get("status", {}).get("conditions", ())
    return {condition["type"]: condition["status"] for condition in said}


async def test_a_service_that_one_cluster_exports_is_called_in_the_other_by_its_own_name(fabric: Fabric) -> None:
    a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
    async with cluster_of(a) as at_a, cluster_of(b) as at_b:
        await publish(a, b)
        await export(b, at_b, "till")

        async def waits() -> bool:
            return await conditions(at_b, "till") == {"Valid": "True", "Ready": "False"}

        await eventually(waits, "the export to wait for a mesh group that allows it")
        assert not (await at_a.list("ServiceImport", "shop"))["items"]
        await api.replace("site_mesh_group", "all", {**MESH, "enable_multi_cluster_services": {}})
        await eventually(lambda: endpoints(at_a, "till"), "the Service")
        (endpoint,) = await endpoints(at_a, "till")

        async def imported() -> bool:
            return bool((await at_a.get("ServiceImport", "till", "shop")).get("status"))

        await eventually(imported, "the ServiceImport")
        found = await at_a.get("ServiceImport", "till", "shop")
        service = await at_a.get("Service", "till", "shop")
        assert found["spec"] == {
            "type": "ClusterSetIP",
            "ips": [service["spec"]["clusterIP"]],
            "ports": [{"name": "main", "protocol": "TCP", "port": 8080}],
        }
        assert found["status"] == {"clusters": [{"cluster": "b"}]}
        assert (await call(a, endpoint)).text.count(b.cluster.services["till"].pods[0].name) == 1
        ready = {"Valid": "True", "Conflict": "False", "Ready": "True"}

        async def said() -> bool:
            return await conditions(at_b, "till") == ready

        await eventually(said, "the export to be said to be ready")
        shown = (await api.status("site_mesh_group", "all"))["multi_cluster_services"]
        assert shown["clusters"] == [{"site": name, "offered": True, "reason": ""} for name in ("a", "b")]
        (service,) = shown["services"]
        assert (service["name"], service["namespace"], service["exported_by"]) == ("till", "shop", ["b"])
        assert service["imported_by"] == ["a", "b"]
        await at_b.delete("ServiceExport", "till", "shop")

        async def gone() -> bool:
            return not await endpoints(at_a, "till") and not (await at_a.list("ServiceImport", "shop"))["items"]

        await eventually(gone, "the Service to go with its export")


async def test_a_service_that_two_clusters_export_fails_over_between_them(fabric: Fabric) -> None:
    a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
    async with cluster_of(a) as at_a, cluster_of(b) as at_b:
        await publish(a, b)
        await api.replace("site_mesh_group", "all", {**MESH, "enable_multi_cluster_services": {}})
        for site, cluster in ((a, at_a), (b, at_b)):
            await export(site, cluster, "vault")

        async def both() -> bool:
            imports = [await cluster.list("ServiceImport", "shop") for cluster in (at_a, at_b)]
            clusters = [[one.get("status", {}).get("clusters") for one in found["items"]] for found in imports]
            return clusters == [[[{"cluster": "a"}, {"cluster": "b"}]]] * 2

        await eventually(both, "both clusters to be imported in both")
        await eventually(lambda: endpoints(at_a, "vault-clusterset"), "the Service beside the cluster's own")
        (endpoint,) = await endpoints(at_a, "vault-clusterset")

        async def answered_by(site: Site) -> bool:
            return site.cluster.services["vault"].pods[0].name in (await call(a, endpoint)).text

        await eventually(lambda: answered_by(a), "a pod of the own cluster to answer")
        await a.cluster.scale("vault", 0)
        await eventually(lambda: answered_by(b), "a pod of the other cluster to answer")


async def call_from(site: Site, source: str, port: int, host: str) -> int:
    """Status of a request from an address of the site's pods."""

    def work() -> int:
        with closing(http.client.HTTPConnection(site.place.inside, port, timeout=10, source_address=(source, 0))) as connection:
            connection.request("GET", "/", headers={"Host": host})
            return connection.getresponse().status

    return await asyncio.to_thread(site.place.call, work)


async def test_policies_tell_pods_of_the_calling_cluster_apart_and_deny_where_they_cannot_be_read(fabric: Fabric) -> None:
    a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
    web, batch = f"{a.place.pods}201", f"{a.place.pods}202"
    async with cluster_of(a) as cluster:
        await cluster.create(objects.pod("web-1", "shop", web, {"app": "web"}))
        await cluster.create(objects.pod("batch-1", "shop", batch, {"app": "batch"}))
        await b.cluster.deploy("ledger", ECHO)
        await api.create("origin_pool", "ledger", k8s_pool("ledger", ["b"]))
        rule = {"action": "ALLOW", "client_pod_selector": {"expressions": ["ves.io/namespace = shop, app = web"]}}
        policy = {"rule_list": {"rules": [{"metadata": {"name": "web"}, "spec": rule}]}}
        await api.create("service_policy", "web-only", policy)
        active = {"active_service_policies": {"policies": [{"namespace": "lab", "name": "web-only"}]}}
        await api.create("http_loadbalancer", "ledger", http_loadbalancer("ledger.test", ["ledger"], ["a"], 8088, **active))
        assert (await api.applied("http_loadbalancer", "ledger"))["applied"]

        async def judged(by_pod: int, by_other: int) -> bool:
            return [await call_from(a, source, 8088, "ledger.test") for source in (web, batch)] == [by_pod, by_other]

        await eventually(lambda: judged(200, 403), "the one pod to be served")
        await cluster.patch("Pod", "batch-1", {"metadata": {"labels": {"app": "web"}}}, "shop")
        await eventually(lambda: judged(200, 200), "the other one, which has the label now")
        await cluster.fault("rules", forbidden=["pods@shop"])
        await cluster.fault("disconnect")
        await eventually(lambda: judged(403, 403), "everybody to be denied")

        async def said() -> bool:
            return "pods cannot be read" in str(await api.status("service_policy", "web-only"))

        await eventually(said, "the policy to say why")
        await cluster.fault("rules", forbidden=[])
        await eventually(lambda: judged(200, 200), "pods to be known again")
