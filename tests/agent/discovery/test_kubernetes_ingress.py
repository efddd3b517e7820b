"""Services that are reached through an ingress controller of their cluster, as seen through a running API."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from agent.protocol.items import IngressController, NamespaceMapping
from agent.protocol.report import DiscoveredService
from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.kubernetes.objects import endpoint
from lab.kubernetes.running import Emulator
from tests.agent.discovery.watching import Watcher, watching

AT = IngressController(service="nginx.ingress", port=80, ingress_class="nginx")
PORTS = [{"name": "http", "port": 80, "targetPort": "http", "nodePort": 30080}, {"name": "https", "port": 443, "nodePort": 30443}]


@asynccontextmanager
async def through_ingress(emulator: Emulator, api: Client) -> AsyncIterator[Watcher]:
    """Only services of `shop` are discovered; the controller is elsewhere, on node `n1` of two."""
    await api.create(objects.namespace("ingress"))
    for body in (objects.node("n1", "192.0.2.1"), objects.node("n2", "192.0.2.2")):
        await api.create(body)
    await api.create(objects.service("nginx", "ingress", type="LoadBalancer", ports=PORTS))
    await api.create(objects.endpoint_slice("nginx", "ingress", [endpoint("10.1.9.1", node="n1")]))
    await api.create(objects.ingress("cart", "shop", {"cart.example.com": ("cart", 80)}))
    only = (NamespaceMapping(namespace_regex="shop", namespace="app"),)
    options = {"delivery": "ingress_controller", "ingress_controller": AT, "namespace_mapping": only}
    async with watching(emulator.kubeconfig, **options) as watcher:
        await watcher.until_connected()
        yield watcher


async def balance(api: Client, *ingress: dict[str, str]) -> None:
    await api.patch("Service", "nginx/status", {"status": {"loadBalancer": {"ingress": list(ingress)}}}, "ingress")


def shown(watcher: Watcher) -> dict[str, DiscoveredService]:
    return {service.name: service for service in watcher.cluster.report("x").services or ()}


async def test_services_are_reached_at_the_controllers_node_port_or_load_balancer(emulator: Emulator, api: Client) -> None:
    async with through_ingress(emulator, api) as watcher:
        await watcher.until_endpoints("cart.shop", "192.0.2.1:30080", "192.0.2.2:30080")
        assert watcher.services == ["cart.shop"], "the controller itself is none of the services that are discovered"
        await api.patch("Service", "nginx", {"spec": {"externalTrafficPolicy": "Local"}}, "ingress")
        await watcher.until_endpoints("cart.shop", "192.0.2.1:30080")
        await balance(api, {"ip": "198.51.100.1"}, {"ip": "198.51.100.2"})
        await watcher.until_endpoints("cart.shop", "198.51.100.1:80", "198.51.100.2:80")
        assert watcher.endpoints("cart.shop", 8080) == watcher.endpoints("cart.shop"), "by the pods' port as well"
        await balance(api)
        await api.patch("Node", "n1/status", {"status": {"conditions": [{"type": "Ready", "status": "False"}]}})
        await watcher.until_endpoints("cart.shop")
        assert "node port at a node that is ready" in shown(watcher)["cart"].reason


async def test_a_service_without_ready_endpoints_is_not_reached_through_the_controller(emulator: Emulator, api: Client) -> None:
    async with through_ingress(emulator, api) as watcher:
        await watcher.until(lambda _: watcher.endpoints("cart.shop"))
        await api.set_endpoints("cart", "shop", [endpoint("10.1.0.1", ready=False)])
        await watcher.until_endpoints("cart.shop")


async def test_only_ingresses_of_the_class_lead_to_services_and_their_hosts_are_shown(emulator: Emulator, api: Client) -> None:
    await api.create(objects.service("web", "shop", ports=[{"name": "main", "port": 8000}]))
    await api.set_endpoints("web", "shop", ["10.1.0.5"])
    async with through_ingress(emulator, api) as watcher:
        assert (shown(watcher)["cart"].delivery, shown(watcher)["cart"].hosts) == ("ingress_controller", ("cart.example.com",))
        assert (shown(watcher)["web"].delivery, shown(watcher)["web"].reason) == ("none", "no Ingress leads all paths of a host to it")
        await api.create(objects.ingress("other", "shop", {"web.test": ("web", 8000)}, ingress_class="other"))
        await api.create(objects.ingress("part", "shop", {"web.test": ("web", 8000)}, path="/part"))
        await api.create(objects.ingress("web", "shop", {"web.example.com": ("web", "main"), "www.example.com": ("web", 8000)}))
        await watcher.until(lambda _: shown(watcher)["web"].hosts)
        assert shown(watcher)["web"].hosts == ("web.example.com", "www.example.com")
        await api.delete("Ingress", "cart", "shop")
        await watcher.until_endpoints("cart.shop")
        assert shown(watcher)["cart"].delivery == "none"


async def test_a_controller_that_is_not_there_or_not_readable_is_said(emulator: Emulator, api: Client) -> None:
    async with through_ingress(emulator, api) as watcher:
        await watcher.until(lambda _: watcher.endpoints("cart.shop"))
        await api.delete("Service", "nginx", "ingress")
        await watcher.until_endpoints("cart.shop")
        assert shown(watcher)["cart"].reason == "the ingress controller's service is not there"
        await api.fault("rules", forbidden=["ingresses@shop"])
        await api.fault("compact")
        await watcher.until(lambda cluster: not cluster.connected and "Ingresses: 403" in cluster.reason)
