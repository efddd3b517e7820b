"""Origins of a site against a running API: what traffic gets at once, and what is reported when there is time."""

import asyncio
from uuid import UUID

import pytest

from agent import origins as following
from agent.discovery.kubeconfig import from_kubeconfig
from agent.envoy.inputs import AgentSnapshot, Endpoint, Item, ItemId, OriginId
from agent.origins import SiteOrigins
from agent.protocol.base import content_hash
from agent.protocol.items import Discovery, ItemKind, Origin, OriginPool
from lab.kubernetes.client import Client
from lab.kubernetes.running import Emulator
from lab.wait import until

GOOD, BAD = (f"secret:{UUID(int=number)}:1" for number in (1, 2))
CART = OriginId("n/p", "o")


def snapshot(service: str, discovery: Discovery | None = None) -> AgentSnapshot:
    pool = OriginPool(origins=(Origin(key="o", type="k8s_service", service=service, port=80),))
    items = [Item(ItemId(ItemKind.ORIGIN_POOL, "n/p"), content_hash(pool.canonical()), pool)]
    if discovery:
        items.append(Item(ItemId(ItemKind.DISCOVERY, "n/d"), content_hash(discovery.canonical()), discovery))
    return AgentSnapshot.of(items)


async def test_endpoints_are_followed_at_once_and_reported_now_and_then(
    emulator: Emulator, api: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = asyncio.Event()
    origins = SiteOrigins("here", lambda: from_kubeconfig(emulator.kubeconfig.read_bytes()), dict, changed.set)
    wanted = snapshot("cart.shop")

    async def reported() -> tuple[int, ...]:
        return tuple(service.endpoints for report in origins.reports if report.connected for service in report.services or ())

    async def has(*addresses: str) -> bool:
        return origins.endpoints(wanted, {})[CART] == tuple(Endpoint(address, 8080) for address in addresses)

    try:
        await until(lambda: has("10.1.0.1"), "the endpoint")
        await until(reported, "the report")
        monkeypatch.setattr(following, "_SERVICES_AGAIN_S", 3600.0)
        await api.set_endpoints("cart", "shop", ["10.1.0.1", "10.1.0.2"])
        await until(lambda: has("10.1.0.1", "10.1.0.2"), "the second endpoint")
        assert await reported() == (1,)
        monkeypatch.setattr(following, "_SERVICES_AGAIN_S", 0.0)
        assert await reported() == (2,)
    finally:
        await origins.close()


async def test_new_credentials_do_not_take_endpoints_away(emulator: Emulator, api: Client) -> None:
    origins = SiteOrigins("here", None, lambda: {GOOD: emulator.kubeconfig.read_bytes(), BAD: b"{}"}, lambda: None)
    before: dict[OriginId, tuple[Endpoint, ...]] = {}
    cart = (Endpoint("10.1.0.1", 8080),)

    async def found() -> bool:
        before.update(origins.endpoints(wanted, before))
        return before[CART] == cart

    try:
        origins.follow(wanted := snapshot("cart.shop:east", Discovery(kubeconfig=GOOD, cluster_id="east")))
        await until(found, "the endpoint")
        origins.follow(wanted := snapshot("cart.shop:east", Discovery(kubeconfig=BAD, cluster_id="east")))
        assert origins.endpoints(wanted, before)[CART] == cart
        await until(lambda: _reason(origins), "the bad kubeconfig to be reported")
        assert origins.endpoints(wanted, before)[CART] == cart
        origins.follow(wanted := snapshot("cart.shop:east"))
        assert origins.endpoints(wanted, before)[CART] == (), "without the discovery there is no such cluster"
    finally:
        await origins.close()


async def test_endpoints_stay_where_nothing_may_be_read_any_more(emulator: Emulator, api: Client) -> None:
    """As those that an agent remembers when it starts; the own namespace it may still read."""
    await api.fault("rules", forbidden=["*@", "*@shop"])
    origins = SiteOrigins("here", lambda: from_kubeconfig(emulator.kubeconfig.read_bytes()), dict, lambda: None)
    wanted, gone = snapshot("cart.shop"), snapshot("cart.default")
    before = {CART: (Endpoint("10.1.0.1", 8080),)}

    async def connected() -> bool:
        return [report.connected for report in origins.reports] == [True]

    try:
        await until(connected, "the own namespace")
        assert origins.endpoints(wanted, before) == before
        assert origins.endpoints(gone, before) == {CART: ()}
    finally:
        await origins.close()


async def test_clusters_without_an_id_do_not_mix_and_it_is_said_which_services_are_hidden(emulator: Emulator, api: Client) -> None:
    """The same cluster twice, told apart by how its services are delivered."""
    kubeconfig = emulator.kubeconfig.read_bytes()
    origins = SiteOrigins("here", lambda: from_kubeconfig(kubeconfig), lambda: {GOOD: kubeconfig}, lambda: None)
    cluster_ip = (await api.get("Service", "cart", "shop"))["spec"]["clusterIP"]

    async def connected() -> bool:
        return [report.connected for report in origins.reports] == [True, True]

    try:
        origins.follow(wanted := snapshot("cart.shop", Discovery(kubeconfig=GOOD, delivery="cluster_ip")))
        await until(connected, "both clusters")
        assert origins.endpoints(wanted, {})[CART] == (Endpoint("10.1.0.1", 8080),)
        own, second = origins.reports
        assert own.reason == ""
        assert second.reason.startswith("1 services such as cart.shop are not used, for in-cluster has services of these names")
        origins.follow(wanted := snapshot("cart.shop:far", Discovery(kubeconfig=GOOD, delivery="cluster_ip", cluster_id="far")))
        await until(connected, "both clusters")
        assert origins.endpoints(wanted, {})[CART] == (Endpoint(cluster_ip, 80),)
        assert [report.reason for report in origins.reports] == ["", ""]
    finally:
        await origins.close()


async def _reason(origins: SiteOrigins) -> bool:
    return any("cannot be read" in report.reason for report in origins.reports)
