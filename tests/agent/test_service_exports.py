"""The Multi-Cluster Services API of one emulated cluster: what is told of its exports, and what is kept for imports."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own
from aiohttp import web

from agent import leases, publish
from agent.discovery.kubeconfig import from_kubeconfig
from agent.discovery.kubernetes import WatchedCluster
from agent.envoy.inputs import AgentSnapshot, Item, ItemId
from agent.protocol.items import ItemKind, Publish, PublishedPort, ServiceExport
from agent.protocol.report import ExportedPort, MultiClusterServices
from agent.publish import Publishing
from agent.published import Publisher
from agent.service_exports import ServiceExports
from lab.kubernetes import objects
from lab.kubernetes.access import Access
from lab.kubernetes.admission import Admission
from lab.kubernetes.client import Client, connect
from lab.kubernetes.kubeconfig import kubeconfig
from lab.kubernetes.server import ApiServer
from lab.kubernetes.store import Store
from lab.kubernetes.writing import Writer
from lab.wait import until
from tests.agent.wanted import listening

DEFINITIONS = sorted((Path(__file__).parents[2] / "deploy/kubernetes/multicluster").glob("service*.yaml"))
BACKEND = ItemId(ItemKind.PUBLISH, "shop/backend")
PORT = PublishedPort(name="http", port=80, target_port=20_080, load_balancer="system/mesh.shop.backend.80", protocol="tcp")


def imported(key: str = "shop/backend", *clusters: str) -> AgentSnapshot:
    """A service that another cluster exports."""
    service = Publish(ports=(PORT,), service_import="backend", clusters=clusters or ("b",))
    return AgentSnapshot.of([Item(ItemId(ItemKind.PUBLISH, key), str(service), service)])


def exported(conflict: str = "") -> AgentSnapshot:
    """What the control plane says of an export of this cluster."""
    body = ServiceExport(conflict=conflict)
    return AgentSnapshot.of([Item(ItemId(ItemKind.SERVICE_EXPORT, "shop/cart"), str(body), body)])


class Node:
    """One that publishes, and that takes part in the API."""

    def __init__(self, config: Path) -> None:
        def load() -> object:
            return from_kubeconfig(config.read_bytes(), config.parent)

        self.snapshot = AgentSnapshot()
        self.watched = WatchedCluster(load, lambda: None)  # type: ignore[arg-type]  # it loads what is wanted
        self.exports = ServiceExports(load, lambda: self.watched.table, lambda: self.publishing.wake())  # type: ignore[arg-type]  # noqa: PLW0108
        self.publishing = Publishing(
            Publisher("s1", "n1", "10.9.0.1"),
            load,  # type: ignore[arg-type]
            lambda: self.snapshot,
            lambda: listening(self.snapshot, "10.9.0.1"),
            lambda: None,
            self.exports,
        )

    def wants(self, snapshot: AgentSnapshot) -> None:
        self.snapshot = snapshot
        self.publishing.look()

    @property
    def refused(self) -> str:
        return self.publishing.refused(self.snapshot).get(BACKEND, "")


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "PACE_S", 0.2)
    monkeypatch.setattr(leases, "LEASE_S", 2)


@pytest.fixture
async def config(tmp_path: Path) -> AsyncIterator[Path]:
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


@pytest.fixture
async def definitions(api: Client) -> None:
    for definition in DEFINITIONS:
        await api.create(yaml.safe_load(definition.read_text()))


@asynccontextmanager
async def running(config: Path) -> AsyncIterator[Node]:
    node = Node(config)
    tasks = [asyncio.create_task(loop.run()) for loop in (node.watched, node.exports, node.publishing)]
    try:
        yield node
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until_told(node: Node, wanted: MultiClusterServices) -> None:
    async def told() -> bool:
        said = node.exports.report
        return said is not None and said.model_copy(update={"exports": _timeless(said)}) == wanted

    await until(told, f"{wanted} to be told")


def _timeless(said: MultiClusterServices) -> tuple[object, ...]:
    return tuple(each.model_copy(update={"created_at": 0}) for each in said.exports)


async def conditions(api: Client, name: str) -> set[tuple[str, str, str]]:
    said = (await api.get("ServiceExport", name, "shop")).get("status", {}).get("conditions", ())
    return {(condition["type"], condition["status"], condition["reason"]) for condition in said}


async def until_conditions(api: Client, name: str, *wanted: tuple[str, str, str]) -> None:
    async def there() -> bool:
        return await conditions(api, name) == {*wanted}

    await until(there, f"conditions {wanted} of {name}")


VALID = ("Valid", "True", "Valid")


async def test_exports_are_told_with_the_ports_of_their_services_and_say_what_becomes_of_them(
    api: Client, definitions: None, config: Path
) -> None:
    ports = [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]
    await api.create(objects.service("cart", "shop", ports=ports))
    await api.create(objects.service("elsewhere", "shop", type="ExternalName", externalName="cart.test"))
    await api.create(objects.service("headless", "shop", clusterIP="None"))
    for name in ("cart", "elsewhere", "headless", "missing"):
        await api.create(objects.service_export(name, "shop"))
    async with running(config) as node:
        cart = {"namespace": "shop", "name": "cart", "created_at": 0, "ports": (ExportedPort(name="http", port=80),)}
        await until_told(node, MultiClusterServices.model_validate({"offered": True, "exports": (cart,)}))
        await until_conditions(api, "cart", VALID, ("Ready", "False", "Pending"))
        await until_conditions(api, "missing", ("Valid", "False", "NoService"), ("Ready", "False", "NoService"))
        for name in ("elsewhere", "headless"):
            await until_conditions(api, name, ("Valid", "False", "InvalidServiceType"), ("Ready", "False", "InvalidServiceType"))
        node.wants(exported("an older export has the port http 8080"))
        await until_conditions(api, "cart", VALID, ("Conflict", "True", "PortConflict"), ("Ready", "True", "Exported"))
        node.wants(exported())
        await until_conditions(api, "cart", VALID, ("Conflict", "False", "NoConflicts"), ("Ready", "True", "Exported"))
        await api.create(objects.service("missing", "shop", 90))
        await until_conditions(api, "missing", VALID, ("Ready", "False", "Pending"))


async def test_what_others_say_of_an_export_stays(api: Client, definitions: None, config: Path) -> None:
    await api.create(objects.service("cart", "shop"))
    await api.create(objects.service_export("cart", "shop"))
    async with running(config):
        await until_conditions(api, "cart", VALID, ("Ready", "False", "Pending"))
        said = await api.get("ServiceExport", "cart", "shop")
        said["status"]["conditions"].append({"type": "Audited", "status": "True", "reason": "Fine", "message": ""})
        await api.http.put("/apis/multicluster.x-k8s.io/v1alpha1/namespaces/shop/serviceexports/cart/status", json=said)
        await api.delete("Service", "cart", "shop")
        lost = (("Valid", "False", "NoService"), ("Ready", "False", "NoService"))
        await until_conditions(api, "cart", *lost, ("Audited", "True", "Fine"))


async def test_a_service_import_has_the_address_of_the_service_that_stands_for_it(api: Client, definitions: None, config: Path) -> None:
    async with running(config) as node:
        node.wants(imported("shop/backend", "b", "c"))

        async def there() -> bool:
            found = (await api.list("ServiceImport", "shop"))["items"]
            return [each.get("status") for each in found] == [{"clusters": [{"cluster": "b"}, {"cluster": "c"}]}]

        await until(there, "the ServiceImport with its status")
        found = await api.get("ServiceImport", "backend", "shop")
        service = await api.get("Service", "backend", "shop")
        assert found["spec"]["ips"] == [service["spec"]["clusterIP"]]
        assert found["spec"]["ports"] == [{"name": "http", "protocol": "TCP", "port": 80}]
        assert [(port["port"], port["targetPort"]) for port in service["spec"]["ports"]] == [(80, 20_080)]
        await api.patch("ServiceImport", "backend", {"spec": {"ips": ["10.0.0.1"]}}, "shop")

        async def mended() -> bool:
            return bool((await api.get("ServiceImport", "backend", "shop"))["spec"] == found["spec"])

        await until(mended, "it to be as it was")
        node.wants(AgentSnapshot())

        async def gone() -> bool:
            return not (await api.list("ServiceImport", "shop"))["items"] and not (await api.list("Service", "shop"))["items"]

        await until(gone, "it to go with its Service")


async def test_a_service_import_of_somebody_else_is_left_alone_and_said(api: Client, definitions: None, config: Path) -> None:
    theirs = {
        "kind": "ServiceImport",
        "apiVersion": "multicluster.x-k8s.io/v1alpha1",
        "metadata": {"name": "backend", "namespace": "shop"},
        "spec": {"type": "ClusterSetIP", "ips": ["10.1.1.1"], "ports": [{"port": 80}]},
    }
    await api.create(theirs)
    async with running(config) as node:
        node.wants(imported())

        async def said() -> bool:
            return "ServiceImport backend in namespace shop that is not this site's" in node.refused

        await until(said, "it to be said")
        assert (await api.get("ServiceImport", "backend", "shop"))["spec"] == theirs["spec"]


async def test_rights_that_are_missing_are_said_and_hold_nothing_else_back(api: Client, definitions: None, config: Path) -> None:
    await api.create(objects.service("cart", "shop"))
    await api.create(objects.service_export("cart", "shop"))
    await api.fault("rules", forbidden=["serviceimports@shop"])
    other = Item(ItemId(ItemKind.PUBLISH, "shop/other"), "other", Publish(ports=(PORT.model_copy(update={"target_port": 80}),)))
    async with running(config) as node:
        node.wants(imported().with_items([other, *exported().items.values()]))

        async def said() -> bool:
            return "ServiceImports: 403" in node.refused

        await until(said, "it to be said")
        await until_conditions(api, "cart", VALID, ("Conflict", "False", "NoConflicts"), ("Ready", "True", "Exported"))
        assert [each["metadata"]["name"] for each in (await api.list("EndpointSlice", "shop"))["items"]] == ["other-n1"]
        await api.fault("rules", forbidden=[])

        async def imported_too() -> bool:
            return bool((await api.list("ServiceImport", "shop"))["items"])

        await until(imported_too, "the ServiceImport")


async def test_what_is_imported_into_a_namespace_that_is_not_there_waits_for_it_in_silence(
    api: Client, definitions: None, config: Path
) -> None:
    async with running(config) as node:
        node.wants(imported("later/backend"))

        async def leads() -> bool:
            return bool((await api.list("Lease"))["items"])

        await until(leads, "a pass")
        assert node.publishing.refused(node.snapshot) == {}
        await api.create(objects.namespace("later"))

        async def there() -> bool:
            return bool((await api.list("ServiceImport", "later"))["items"])

        await until(there, "the ServiceImport")


async def test_without_the_kinds_a_cluster_takes_no_part_until_it_has_them(api: Client, config: Path) -> None:
    async with running(config) as node:
        node.wants(imported())

        async def said() -> bool:
            return node.exports.report is not None

        await until(said, "it to be told")
        report = node.exports.report
        assert report is not None
        assert not report.offered
        assert "apply deploy/kubernetes/multicluster" in report.reason

        async def published() -> bool:
            return bool((await api.list("Service", "shop"))["items"])

        await until(published, "what needs no ServiceImport")
        for definition in DEFINITIONS:
            await api.create(yaml.safe_load(definition.read_text()))
        await until_told(node, MultiClusterServices(offered=True))


async def test_a_node_that_does_not_publish_takes_no_part(config: Path) -> None:
    exports = ServiceExports(lambda: from_kubeconfig(config.read_bytes()), lambda: None, lambda: None, "publishing is off")
    await exports.run()
    assert exports.report == MultiClusterServices(offered=False, reason="publishing is off")
    assert exports.judged == ()
    assert ServiceExports(None, lambda: None, lambda: None, "publishing is off").report is None
