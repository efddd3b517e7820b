"""Services that stand for load balancers, kept in an emulated cluster."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from aiohttp import web

from agent import leases, publish
from agent.discovery.kubeconfig import from_kubeconfig
from agent.discovery.kubernetes import WatchedCluster
from agent.envoy.inputs import AgentSnapshot, Item, ItemId
from agent.protocol.items import ItemKind, Publish, PublishedPort
from agent.publish import Publishing
from agent.published import Publisher
from agent.service_exports import ServiceExports
from lab.kubernetes import objects
from lab.kubernetes.access import Access
from lab.kubernetes.admission import Admission
from lab.kubernetes.client import Client, connect
from lab.kubernetes.kubeconfig import kubeconfig
from lab.kubernetes.running import running
from lab.kubernetes.server import ApiServer
from lab.kubernetes.store import Store
from lab.kubernetes.writing import Writer
from lab.wait import until
from tests.agent.wanted import listening

BACKEND = ItemId(ItemKind.PUBLISH, "shop/backend")


def published_port(port: int, target_port: int = 0) -> PublishedPort:
    return PublishedPort(name=f"http-{port}", port=port, target_port=target_port or port, load_balancer="shop/lb", protocol="http")


def published(key: str = "shop/backend", *ports: int) -> AgentSnapshot:
    """A Service that leads to a load balancer."""
    service = Publish(ports=tuple(published_port(port) for port in ports or (80,)))
    return AgentSnapshot.of([Item(ItemId(ItemKind.PUBLISH, key), str(service), service)])


@dataclass
class Node:
    """One that publishes, and what it says of it."""

    kubeconfig: Path
    name: str = "n1"
    address: str | None = "10.9.0.1"
    site: str = "s1"
    snapshot: AgentSnapshot | None = field(default_factory=published)
    serves: bool = True
    """Whether its Envoy listens for the load balancers."""
    told: int = 0

    def __post_init__(self) -> None:
        self.publishing = Publishing(
            Publisher(self.site, self.name, self.address),
            lambda: from_kubeconfig(self.kubeconfig.read_bytes(), self.kubeconfig.parent),
            lambda: self.snapshot,
            lambda: listening(self.snapshot if self.serves else None, self.address),
            self._tell,
            ServiceExports(None, lambda: None, lambda: None),
        )

    def _tell(self) -> None:
        self.told += 1

    def wants(self, snapshot: AgentSnapshot) -> None:
        self.snapshot = snapshot
        self.publishing.look()

    @property
    def refused(self) -> dict[ItemId, str]:
        return dict(self.publishing.refused(self.snapshot or AgentSnapshot()))

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Node"]:
        task = asyncio.create_task(self.publishing.run())
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "PACE_S", 0.2)
    monkeypatch.setattr(leases, "LEASE_S", 2)


@pytest.fixture
async def config(tmp_path: Path) -> AsyncIterator[Path]:
    """Of an API that is as strict about addresses as a real one."""
    server = ApiServer(Writer(Store(None), Admission(allow_loopback=False)), Access())
    runner = web.AppRunner(server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    path = tmp_path / "kubeconfig"
    path.write_text(kubeconfig(f"http://127.0.0.1:{runner.addresses[0][1]}", token="", authority=None, certificate=False))
    yield path
    await runner.cleanup()


@pytest.fixture
async def api(config: Path) -> AsyncIterator[Client]:
    async with connect(config) as client:
        await client.create(objects.namespace("shop"))
        yield client


async def names(api: Client, kind: str) -> list[str]:
    return sorted(each["metadata"]["name"] for each in (await api.list(kind))["items"])


async def addresses(api: Client, service: str = "backend") -> list[str]:
    found = (await api.list("EndpointSlice", "shop", labelSelector=f"kubernetes.io/service-name={service}"))["items"]
    return sorted(
        f"{address}:{port['port']}" for each in found for one in each["endpoints"] for address in one["addresses"] for port in each["ports"]
    )


async def until_addresses(api: Client, *wanted: str) -> None:
    async def there() -> bool:
        return await addresses(api) == sorted(wanted)

    await until(there, f"endpoints {wanted}")


async def until_names(api: Client, kind: str, *wanted: str) -> None:
    async def there() -> bool:
        return await names(api, kind) == sorted(wanted)

    await until(there, f"{kind} {wanted}")


async def until_refused(node: Node, word: str) -> None:
    async def said() -> bool:
        return word in node.refused.get(BACKEND, "")

    await until(said, f"{word!r} to be said")


async def test_a_service_leads_to_the_node_and_goes_with_the_wish(api: Client, config: Path) -> None:
    async with Node(config).running() as node:
        await until_addresses(api, "10.9.0.1:80")
        service = await api.get("Service", "backend", "shop")
        assert "selector" not in service["spec"]
        assert service["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "isthmus"
        assert [port["port"] for port in service["spec"]["ports"]] == [80]
        (slice,) = (await api.list("EndpointSlice", "shop"))["items"]
        assert slice["metadata"]["ownerReferences"][0]["uid"] == service["metadata"]["uid"]
        node.wants(published("shop/backend", 80, 8080))
        await until_addresses(api, "10.9.0.1:80", "10.9.0.1:8080")
        assert (await api.get("Service", "backend", "shop"))["metadata"]["uid"] == service["metadata"]["uid"]
        node.wants(AgentSnapshot())
        await until_names(api, "Service")
        await until_names(api, "EndpointSlice")
        assert node.refused == {}


async def test_what_others_change_or_delete_is_mended(api: Client, config: Path) -> None:
    async with Node(config).running():
        await until_addresses(api, "10.9.0.1:80")
        await api.delete("EndpointSlice", "backend-n1", "shop")
        await until_addresses(api, "10.9.0.1:80")
        await api.patch("Service", "backend", {"spec": {"selector": {"app": "x"}}}, "shop")

        async def mended() -> bool:
            return "selector" not in (await api.get("Service", "backend", "shop"))["spec"]

        await until(mended, "the selector to be gone")
        await api.delete("Service", "backend", "shop")
        await until_names(api, "Service", "backend")


async def test_a_service_of_somebody_else_is_left_alone_and_said(api: Client, config: Path) -> None:
    theirs = await api.create(objects.service("backend", "shop", 80, 8080, selector={"app": "backend"}))
    async with Node(config).running() as node:
        await until_refused(node, "not this site's")
        assert node.told
        assert await api.get("Service", "backend", "shop") == theirs
        assert await addresses(api) == [], "an endpoint of ours would draw their traffic"
        await api.delete("Service", "backend", "shop")
        await until_addresses(api, "10.9.0.1:80")
        await until(lambda: _settled(node), "nothing to be refused")


async def _settled(node: Node) -> bool:
    return node.refused == {}


async def test_a_service_that_is_taken_over_loses_our_endpoints(api: Client, config: Path) -> None:
    async with Node(config).running() as node:
        await until_addresses(api, "10.9.0.1:80")
        await api.patch("Service", "backend", {"metadata": {"labels": {"isthmus/site": None}}}, "shop")
        await until_addresses(api)
        await until_refused(node, "not this site's")
        assert await names(api, "Service") == ["backend"]


async def test_nodes_of_a_site_share_a_service_and_the_leader_clears_up_behind_the_dead(api: Client, config: Path) -> None:
    async with Node(config).running():
        await until_addresses(api, "10.9.0.1:80")
        async with Node(config, "n2", "10.9.0.2").running():
            await until_addresses(api, "10.9.0.1:80", "10.9.0.2:80")
            assert (await api.get("Lease", "isthmus-s1", "default"))["spec"]["holderIdentity"] == "n1"
        await until_addresses(api, "10.9.0.1:80")
        await until_names(api, "Lease", "isthmus-n1", "isthmus-s1")


async def test_a_leader_that_cannot_serve_takes_nothing_from_others(api: Client, config: Path) -> None:
    async with Node(config).running() as leader:
        await until_addresses(api, "10.9.0.1:80")
        service = await api.get("Service", "backend", "shop")
        async with Node(config, "n2", "10.9.0.2").running():
            await until_addresses(api, "10.9.0.1:80", "10.9.0.2:80")
            leader.serves = False
            leader.publishing.look()
            await until_addresses(api, "10.9.0.2:80")
            await until_next_pass(api)
            assert await addresses(api) == ["10.9.0.2:80"]
            assert (await api.get("Service", "backend", "shop"))["metadata"]["uid"] == service["metadata"]["uid"]


@pytest.mark.parametrize("gracefully", [True, False])
async def test_another_node_takes_over_from_a_leader_that_is_gone(api: Client, config: Path, gracefully: bool) -> None:
    async with Node(config, "n2", "10.9.0.2").running() as second:
        async with Node(config).running() as first:
            await until_addresses(api, "10.9.0.1:80", "10.9.0.2:80")
            if gracefully:
                await first.publishing.withdraw()
        await until_addresses(api, "10.9.0.2:80")
        second.wants(AgentSnapshot())
        await until_names(api, "Service")


async def test_sites_that_share_a_cluster_do_not_touch_each_others_services(api: Client, config: Path) -> None:
    async with Node(config).running():
        await until_addresses(api, "10.9.0.1:80")
        async with Node(config, "n9", "10.9.0.9", site="s9").running() as other:
            await until_refused(other, "not this site's")
            other.wants(AgentSnapshot())
            await until(lambda: _settled(other), "nothing to be refused")
        assert await addresses(api) == ["10.9.0.1:80"]


async def test_what_is_forbidden_is_said_of_the_namespace_alone(api: Client, config: Path) -> None:
    await api.create(objects.namespace("other"))
    await api.fault("rules", forbidden=["services@shop"])
    snapshot = AgentSnapshot.of([*published().items.values(), *published("other/backend").items.values()])
    async with Node(config, snapshot=snapshot).running() as node:
        await until_refused(node, "403")
        assert ItemId(ItemKind.PUBLISH, "other/backend") not in node.refused
        await until_names_in(api, "other")
        await api.fault("rules", forbidden=[])
        await until_addresses(api, "10.9.0.1:80")


async def test_without_a_right_to_leases_nothing_is_written(api: Client, config: Path) -> None:
    await api.fault("rules", forbidden=["leases@default"])
    async with Node(config).running() as node:
        await until_refused(node, "leases is forbidden")
        assert await names(api, "Service") == []
        await api.fault("rules", forbidden=[])
        await until_addresses(api, "10.9.0.1:80")


async def test_what_may_be_written_in_one_namespace_alone_goes_from_there_too(api: Client, config: Path) -> None:
    await api.create(objects.namespace("other"))
    await api.fault("rules", forbidden=["*@other"])
    async with Node(config).running() as node:
        await until_addresses(api, "10.9.0.1:80")
        node.wants(AgentSnapshot())

        async def gone() -> bool:
            return not (await api.list("Service", "shop"))["items"] + (await api.list("EndpointSlice", "shop"))["items"]

        await until(gone, "everything to be gone")


async def until_names_in(api: Client, namespace: str) -> None:
    async def there() -> bool:
        return bool((await api.list("EndpointSlice", namespace))["items"])

    await until(there, f"endpoints in {namespace}")


async def test_a_namespace_that_is_not_there_is_said(api: Client, config: Path) -> None:
    async with Node(config, snapshot=published("nowhere/backend")).running() as node:
        await until(lambda: _says(node, "nowhere/backend", "namespaces"), "the namespace to be missed")
        await api.create(objects.namespace("nowhere"))
        await until_names_in(api, "nowhere")


async def _says(node: Node, key: str, word: str) -> bool:
    return word in node.refused.get(ItemId(ItemKind.PUBLISH, key), "")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "0.0.0.0", "169.254.1.1", None])
def test_addresses_to_which_pods_cannot_be_led_are_said(config: Path, address: str | None) -> None:
    assert "AGENT_SERVICE_ADDRESS" in Node(config, address=address).refused[BACKEND]


async def test_switched_off_it_says_so() -> None:
    exports = ServiceExports(None, lambda: None, lambda: None)
    off = Publishing(Publisher("s1", "n1", "10.9.0.1"), None, published, lambda: None, lambda: None, exports)
    await off.run()
    assert "AGENT_PUBLISH" in off.refused(published())[BACKEND]


async def until_next_pass(api: Client) -> None:
    before = await api.get("Lease", "isthmus-s1", "default")

    async def begun() -> bool:
        return await api.get("Lease", "isthmus-s1", "default") != before

    await until(begun, "the next pass, after which the last one has been taken in")


async def test_it_goes_on_after_the_api_was_away(tmp_path: Path) -> None:
    async with running(tmp_path) as emulator, connect(emulator.kubeconfig) as api:
        await api.create(objects.namespace("shop"))
        async with Node(emulator.kubeconfig).running() as node:
            await until_addresses(api, "10.9.0.1:80")
            await until_next_pass(api)
            await emulator.kill()
            node.wants(AgentSnapshot.of([*published().items.values(), *published("shop/late").items.values()]))
            await until(lambda: _says(node, "shop/late", "the cluster's API"), "the outage to be said")
            assert BACKEND not in node.refused, "what is in place stays so"
            await emulator.start()
            await until_names(api, "Service", "backend", "late")
            await until(lambda: _settled(node), "nothing to be refused")


async def test_discovery_does_not_take_published_services_for_origins(api: Client, config: Path) -> None:
    await api.create(objects.service("cart", "shop"))
    cluster = WatchedCluster(lambda: from_kubeconfig(config.read_bytes(), config.parent), lambda: None)
    async with Node(config).running():
        await until_addresses(api, "10.9.0.1:80")
        task = asyncio.create_task(cluster.run())

        async def connected() -> bool:
            return cluster.connected

        await until(connected, "discovery")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert cluster.table is not None
    assert list(cluster.table.services) == ["cart.shop"]
