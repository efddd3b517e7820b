"""A pod calls `backend.shop`, a name of its own cluster, and a pod of another cluster answers."""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2
import pytest

from lab.cluster import API_PORT
from lab.fabric import Fabric
from lab.kubernetes.client import Client
from lab.network import can_use_namespaces
from lab.site import Site
from lab.specs import http_loadbalancer, k8s_pool
from lab.wait import until

NAME = "backend.shop"


def published(*sites: str) -> dict[str, Any]:
    service = {"service": "backend", "namespace": "shop"}
    where = [{"vk8s_service": {"site": {"namespace": "system", "name": site}}, "publish": service} for site in sites]
    return http_loadbalancer(NAME, ["backend"], [], 80, advertise_custom={"advertise_where": where})


@asynccontextmanager
async def cluster_of(site: Site) -> AsyncIterator[Client]:
    host, port = await site.fabric.reach(site.place, (site.place.cluster, API_PORT))
    async with httpx2.AsyncClient(base_url=f"http://{host}:{port}", trust_env=False) as client:
        yield Client(client)


async def endpoints(cluster: Client) -> list[tuple[str, int]]:
    """Where the cluster's own proxies lead who calls the Service."""
    services = (await cluster.list("Service", "shop"))["items"]
    if "backend" not in {service["metadata"]["name"] for service in services}:
        return []
    slices = (await cluster.list("EndpointSlice", "shop", labelSelector="kubernetes.io/service-name=backend"))["items"]
    return [
        (address, port["port"]) for each in slices for one in each["endpoints"] for address in one["addresses"] for port in each["ports"]
    ]


async def call(site: Site, endpoint: tuple[str, int]) -> httpx.Response:
    host, port = await site.reach(endpoint[1], endpoint[0])
    return await site.fabric.client(f"http://{host}:{port}", {"host": NAME}).get("/")


@pytest.mark.timeout(180)
@pytest.mark.skipif(not can_use_namespaces(), reason="needs root and network namespaces: pods cannot be led to loopback addresses")
async def test_a_pod_calls_another_cluster_by_a_name_of_its_own() -> None:
    async with Fabric(("a", "b")) as fabric, cluster_of(fabric.site("a")) as cluster:
        a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
        await b.cluster.deploy("backend", (sys.executable, "-m", "lab.echo"))
        await api.create("origin_pool", "backend", k8s_pool("backend", ["b"]))
        await api.create("http_loadbalancer", "backend", published("a"))

        async def refused() -> bool:
            return "AGENT_PUBLISH" in str(await api.status("http_loadbalancer", "backend"))

        await until(refused, "the site to say that publishing is off")
        a.agent.env = {**a.agent.env, "AGENT_PUBLISH": "true"}
        await a.agent.stop()
        await a.agent.start()
        await until(lambda: endpoints(cluster), "the Service")
        assert (await api.applied("http_loadbalancer", "backend"))["applied"]
        (endpoint,) = await endpoints(cluster)
        assert endpoint == (a.place.service, 80)
        answer = await call(a, endpoint)
        assert answer.status_code == 200
        assert b.cluster.services["backend"].pods[0].name in answer.text

        await fabric.replicas[0].process.kill()
        await cluster.delete("Service", "backend", "shop")
        await cluster.delete("EndpointSlice", (await cluster.list("EndpointSlice", "shop"))["items"][0]["metadata"]["name"], "shop")
        await until(lambda: endpoints(cluster), "the Service to be back without the control plane")
        assert (await call(a, endpoint)).status_code == 200
        await fabric.replicas[0].process.start()

        async def gone() -> bool:
            return not (await cluster.list("Service", "shop"))["items"] and not await endpoints(cluster)

        await until(lambda: deleted(fabric), "the control plane to be back")
        await until(gone, "the Service to go with its load balancer")


async def deleted(fabric: Fabric) -> bool:
    try:
        await fabric.api.delete("http_loadbalancer", "backend")
    except httpx.TransportError as error:
        raise ConnectionError(str(error)) from error
    return True
