"""Where peers can dial a gateway, as the Service in front of it says, through a running API."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from agent.advertise import Advertiser
from agent.discovery.exposure import Exposure
from agent.discovery.kubeconfig import ClusterAccess, from_kubeconfig
from agent.protocol.items import Gateway
from agent.settings import Settings
from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.kubernetes.objects import Body
from lab.kubernetes.running import Emulator
from tests.agent.discovery.watching import PATIENCE_S, allowed

NAME = "isthmus-gateway"
PORT = {"name": "gateway", "port": 15443, "targetPort": "gateway", "nodePort": 31443}


def gateway(type: str = "NodePort", *more: Body) -> Body:
    return objects.service(NAME, "default", type=type, externalTrafficPolicy="Local", ports=[PORT, *more])


async def balance(api: Client, **ingress: str) -> None:
    """As the cloud does once it has made a load balancer; nothing takes its address away again."""
    await api.patch("Service", f"{NAME}/status", {"status": {"loadBalancer": {"ingress": [ingress] if ingress else []}}}, "default")


@asynccontextmanager
async def exposed(
    emulator: Emulator, load: Callable[[], ClusterAccess] | None = None, **options: str
) -> AsyncIterator[tuple[Exposure, Callable[..., Any]]]:
    news = asyncio.Event()
    access = from_kubeconfig(emulator.kubeconfig.read_bytes(), emulator.directory)
    exposure = Exposure(load or (lambda: access), NAME, news.set, **options)

    async def until(address: tuple[str, int] | None, reason: str = "") -> None:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not exposure.known or exposure.address != address or (reason not in exposure.reason if reason else exposure.reason):
                    await news.wait()
                    news.clear()
        except TimeoutError:
            pytest.fail(f"still {exposure.address}, {exposure.reason!r}")

    task = asyncio.create_task(exposure.run())
    try:
        yield exposure, until
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_load_balancers_address_goes_before_the_machines_and_is_followed(emulator: Emulator, api: Client) -> None:
    await api.create(gateway("LoadBalancer"))
    async with exposed(emulator, host="192.0.2.1") as (_, until):
        await until(("192.0.2.1", 31443))
        await balance(api, ip="198.51.100.1")
        await until(("198.51.100.1", 15443))
        await balance(api, hostname="lb.example.com")
        await until(("lb.example.com", 15443))
        await balance(api)
        await until(("192.0.2.1", 31443))


async def test_a_node_port_that_changes_is_followed(emulator: Emulator, api: Client) -> None:
    await api.create(gateway())
    async with exposed(emulator, host="192.0.2.1") as (_, until):
        await until(("192.0.2.1", 31443))
        await api.patch("Service", NAME, {"spec": {"ports": [PORT | {"nodePort": 31500}]}}, "default")
        await until(("192.0.2.1", 31500))


async def test_a_machine_that_is_named_is_dialled_at_its_external_address(emulator: Emulator, api: Client) -> None:
    await api.create(gateway())
    await api.create(objects.node("n1", "192.0.2.1"))
    async with exposed(emulator, host="192.0.2.9", host_name="n1") as (_, until):
        await until(("192.0.2.1", 31443))
        addresses = [{"type": "InternalIP", "address": "192.0.2.1"}, {"type": "ExternalIP", "address": "198.51.100.7"}]
        await api.patch("Node", "n1/status", {"status": {"addresses": addresses}})
        await until(("198.51.100.7", 31443))
        await api.patch("Node", "n1/status", {"status": {"addresses": []}})
        await until(("192.0.2.9", 31443))


async def test_a_machine_that_may_not_be_read_has_the_address_that_was_given(emulator: Emulator, api: Client) -> None:
    await api.create(gateway())
    await api.fault("rules", forbidden=["nodes@"])
    async with exposed(emulator, host="192.0.2.9", host_name="n1") as (_, until):
        await until(("192.0.2.9", 31443), reason="Node n1: 403")


@pytest.mark.parametrize(
    ("service", "host", "reason"),
    [
        (None, "192.0.2.1", "there is no Service isthmus-gateway"),
        (objects.service(NAME, "default", 15443), "192.0.2.1", "neither a load balancer with an address nor a node port"),
        (gateway(), "", "no address of this machine is known"),
        (gateway("NodePort", {"name": "gateway-2", "port": 1}), "192.0.2.1", ""),
    ],
)
async def test_what_nobody_can_dial_is_not_advertised_and_says_why(
    emulator: Emulator, api: Client, service: Body | None, host: str, reason: str
) -> None:
    if service:
        await api.create(service)
    async with exposed(emulator, host=host) as (_, until):
        await until(None if reason else ("192.0.2.1", 31443), reason)


async def test_a_right_to_that_one_service_is_enough(emulator: Emulator, api: Client) -> None:
    await api.create(gateway("LoadBalancer"))
    that_one = objects.rule("", "services", "list", "watch", resourceNames=[NAME])
    async with exposed(emulator, await allowed(emulator, api, that_one, everywhere=False), host="192.0.2.1") as (_, until):
        await until(("192.0.2.1", 31443))
        await balance(api, ip="198.51.100.1")
        await until(("198.51.100.1", 15443))


async def test_a_service_that_is_deleted_and_made_anew_is_followed(emulator: Emulator, api: Client) -> None:
    await api.create(gateway())
    async with exposed(emulator, host="192.0.2.1") as (_, until):
        await until(("192.0.2.1", 31443))
        await api.delete("Service", NAME, "default")
        await until(None, "there is no Service")
        await api.create(gateway())
        await until(("192.0.2.1", 31443))


async def test_an_address_stays_while_the_service_may_not_be_read(emulator: Emulator, api: Client) -> None:
    await api.create(gateway())
    async with exposed(emulator, host="192.0.2.1") as (_, until):
        await until(("192.0.2.1", 31443))
        await api.fault("rules", forbidden=["services@default"])
        await api.fault("compact")
        await until(("192.0.2.1", 31443), reason="Service isthmus-gateway in default: 403")
        await api.fault("rules", forbidden=[])
        await until(("192.0.2.1", 31443))


async def test_what_is_followed_is_advertised_and_what_is_unknown_is_not_said(emulator: Emulator, api: Client) -> None:
    told = asyncio.Event()
    settings = Settings(gateway_service=NAME, host_address="192.0.2.1")
    access = from_kubeconfig(emulator.kubeconfig.read_bytes(), emulator.directory)
    advertiser = Advertiser(settings, "n", lambda: "https://unused", told.set, lambda: access)
    assert advertiser.gateways is None
    await api.fault("rules", forbidden=["services@default"])
    task = asyncio.create_task(advertiser.run())

    async def until(holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await told.wait()
                told.clear()

    await until(lambda: "403" in (advertiser.warning or ""))
    assert advertiser.gateways is None
    await api.fault("rules", forbidden=[])
    await until(lambda: advertiser.gateways == () and "no Service" in (advertiser.warning or ""))
    await api.create(gateway())
    wanted = Gateway(node_id="n", host="192.0.2.1", port=31443, workers=settings.concurrency)
    await until(lambda: advertiser.gateways == (wanted,) and advertiser.warning is None)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
