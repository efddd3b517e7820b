"""What happens to the table when the API, or part of it, cannot be read."""

import asyncio
import base64
import json
from pathlib import Path

import pytest

from agent.discovery import kubernetes, reflector
from agent.discovery.kubeconfig import from_kubeconfig, in_cluster
from agent.discovery.kubernetes import WatchedCluster
from agent.protocol.items import NamespaceMapping
from lab.kubernetes import objects
from lab.kubernetes.client import Client, connect
from lab.kubernetes.running import Emulator, running
from lab.kubernetes.server import ApiServer
from lab.kubernetes.tls import Authority
from tests.agent.discovery.watching import Watcher, allowed, following, watching


async def test_broken_watches_are_no_outage(short_watches: None, emulator: Emulator, api: Client) -> None:
    seen: list[str] = []
    news = asyncio.Event()

    def note() -> None:
        seen.append(cluster.reason)
        news.set()

    cluster = WatchedCluster(lambda: from_kubeconfig(emulator.kubeconfig.read_bytes()), note)
    async with following(Watcher(cluster, news)) as watcher:
        await watcher.until_connected()
        seen.clear()
        assert (await api.fault("disconnect"))["disconnected"] == 2
        await api.set_endpoints("cart", "shop", ["10.1.0.3"])
        await watcher.until_endpoints("cart.shop", "10.1.0.3:8080")
        assert set(seen) == {""}


async def test_a_compacted_history_leads_to_a_new_list(emulator: Emulator, api: Client, watcher: Watcher) -> None:
    await api.fault("compact")
    await watcher.until(lambda cluster: "410 too old resource version" in cluster.reason)
    await api.delete("EndpointSlice", "cart-1", "shop")
    await watcher.until_endpoints("cart.shop")
    await watcher.until_connected()


async def test_a_silent_api_is_an_outage_and_keeps_the_table(short_silence: None, tmp_path: Path) -> None:
    async with running(tmp_path, "--bookmark-interval", "0.3") as emulator, connect(emulator.kubeconfig) as api:
        await api.create(objects.service("own", "default"))
        async with watching(emulator.kubeconfig) as watcher:
            await watcher.until_connected()
            await api.fault("pause")
            await watcher.until(lambda cluster: not cluster.connected)
            assert watcher.services == ["own.default"]
            await api.fault("resume")
            await watcher.until_connected()


async def test_a_server_that_streams_no_lists_is_read_in_pages(
    small_pages: None, server: ApiServer, emulator: Emulator, api: Client
) -> None:
    server.streams = False
    for number in range(5):
        await api.create(objects.service(f"s{number}", "shop"))
    async with watching(emulator.kubeconfig) as watcher:
        await watcher.until_connected()
        assert watcher.services == ["cart.shop", *(f"s{number}.shop" for number in range(5))]


async def test_lists_are_streamed_where_the_server_can(monkeypatch: pytest.MonkeyPatch, watcher: Watcher, api: Client) -> None:
    lists: list[str] = []
    monkeypatch.setattr(reflector.Reflector, "_list", lambda self: lists.append(self.what))
    await api.fault("compact")
    await watcher.until(lambda cluster: "410" in cluster.reason)
    await api.delete("Service", "cart", "shop")
    await watcher.until(lambda _: watcher.services == [])
    await watcher.until_connected()
    assert lists == []


async def test_a_watch_that_never_says_where_everything_ends_is_not_waited_for(
    short_silence: None, monkeypatch: pytest.MonkeyPatch, emulator: Emulator, api: Client
) -> None:
    monkeypatch.setattr(reflector, "_END_OF_EVERYTHING", "example.net/unheard-of")
    async with watching(emulator.kubeconfig) as watcher:
        await watcher.until_connected()
        assert watcher.endpoints("cart.shop") == ["10.1.0.1:8080"]


async def test_who_may_list_but_not_watch_lists_again_and_again(emulator: Emulator, api: Client) -> None:
    rules = objects.rule("", "services", "list"), objects.rule("discovery.k8s.io", "endpointslices", "list")
    async with watching(await allowed(emulator, api, *rules)) as watcher:
        await watcher.until(lambda cluster: cluster.table is not None and "cannot watch" in cluster.reason)
        assert not watcher.cluster.connected
        await api.set_endpoints("cart", "shop", ["10.1.0.2"])
        await watcher.until_endpoints("cart.shop", "10.1.0.2:8080")


async def test_only_mapped_namespaces_are_discovered(emulator: Emulator, api: Client) -> None:
    await api.create(objects.namespace("shop-test"))
    await api.create(objects.service("cart", "shop-test"))
    async with watching(emulator.kubeconfig, namespace_mapping=[NamespaceMapping(namespace_regex="shop", namespace="a")]) as watcher:
        await watcher.until_connected()
        assert watcher.services == ["cart.shop"]


async def test_a_forbidden_namespace_is_reported_and_the_others_work(emulator: Emulator, api: Client) -> None:
    await api.create(objects.namespace("secret"))
    await api.create(objects.service("hidden", "secret"))
    await api.fault("rules", forbidden=["*@secret"])
    async with watching(emulator.kubeconfig) as watcher:
        await watcher.until_connected()
        assert watcher.services == ["cart.shop"]
        assert "Services in secret: 403" in watcher.cluster.reason
        await api.set_endpoints("cart", "shop", ["10.1.0.4"])
        await watcher.until_endpoints("cart.shop", "10.1.0.4:8080")

        await api.create(objects.namespace("new"))
        await api.create(objects.service("later", "new"))
        await watcher.until(lambda _: watcher.services == ["cart.shop", "later.new"])
        await api.delete("Namespace", "new")
        await watcher.until(lambda _: watcher.services == ["cart.shop"])

        await api.fault("rules", forbidden=["*@elsewhere"])
        await watcher.until(lambda cluster: cluster.reason == "" and "hidden.secret" in watcher.services)


async def test_where_namespaces_may_not_be_listed_those_that_are_named_are_read(emulator: Emulator, api: Client) -> None:
    await api.fault("rules", forbidden=["namespaces@", "*@secret"])
    mapping = [NamespaceMapping(namespace_regex="shop", namespace="a"), NamespaceMapping(namespace_regex="x.*", namespace="a")]
    async with watching(emulator.kubeconfig, namespace_mapping=mapping) as watcher:
        await watcher.until_connected()
        assert watcher.services == ["cart.shop"]


async def test_where_nothing_is_named_the_namespace_of_the_context_is_read(emulator: Emulator, api: Client) -> None:
    await api.create(objects.service("own", "default"))
    await api.fault("rules", forbidden=["namespaces@", "*@secret"])
    async with watching(emulator.kubeconfig) as watcher:
        await watcher.until_connected()
        assert watcher.services == ["own.default"]


async def test_rights_that_come_later_are_used(emulator: Emulator, api: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "RIGHTS_EVERY_S", 0.1)
    await api.create(objects.service("own", "default"))
    await api.fault("rules", forbidden=["*@", "*@default", "*@shop"])
    async with watching(emulator.kubeconfig) as watcher:
        await watcher.until(
            lambda cluster: "Services in default: 403" in cluster.reason and "EndpointSlices in default: 403" in cluster.reason
        )
        assert watcher.cluster.table is None, "that nothing may be read does not mean that there is nothing"
        await api.fault("rules", forbidden=["*@", "*@shop"])
        await watcher.until_connected()
        assert watcher.services == ["own.default"]
        assert [watcher.cluster.has_read(namespace) for namespace in ("default", "shop")] == [True, False]
        await api.fault("rules", forbidden=["*@nothing"])
        await watcher.until(lambda _: watcher.services == ["cart.shop", "own.default"])


async def test_what_was_known_of_a_namespace_stays_until_it_may_be_read_again(emulator: Emulator, api: Client, watcher: Watcher) -> None:
    known = watcher.cluster.table
    await api.delete("Service", "cart", "shop")
    await api.delete("EndpointSlice", "cart-1", "shop")
    await api.fault("rules", forbidden=["*@shop"])
    async with watching(emulator.kubeconfig, last_known=known) as restarted:
        await restarted.until(lambda cluster: "Services in shop: 403" in cluster.reason and cluster.connected)
        assert restarted.endpoints("cart.shop") == ["10.1.0.1:8080"]
        await api.fault("rules", forbidden=["*@elsewhere"])
        await restarted.until(lambda cluster: cluster.reason == "" and restarted.services == [])


async def test_nodes_that_may_not_be_read_are_an_outage_of_an_isolated_cluster(emulator: Emulator, api: Client) -> None:
    await api.fault("rules", forbidden=["nodes@"])
    async with watching(emulator.kubeconfig, delivery="isolated") as watcher:
        await watcher.until(lambda cluster: "Nodes: 403" in cluster.reason and cluster.table is not None)
        assert not watcher.cluster.connected


async def test_a_token_file_is_read_again_when_the_token_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, "--token", "first", "--tls") as emulator, connect(emulator.kubeconfig) as api:
        (tmp_path / "token").write_text("first\n")
        config = json.loads(emulator.kubeconfig.read_text())
        config["users"][0]["user"] = {"tokenFile": "token"}
        (tmp_path / "with-file").write_text(json.dumps(config))
        async with watching(tmp_path / "with-file") as watcher:
            await watcher.until_connected()
            await api.fault("rules", tokens=["second"])
            await api.fault("disconnect")
            await watcher.until(lambda cluster: "401" in cluster.reason)
            (tmp_path / "token").write_text("second\n")
            await watcher.until_connected()


async def test_new_credentials_are_loaded_when_the_old_ones_are_refused(tmp_path: Path) -> None:
    async with running(tmp_path, "--token", "first") as emulator, connect(emulator.kubeconfig) as api:
        config = tmp_path / "copy"
        config.write_text(emulator.kubeconfig.read_text())
        async with watching(config) as watcher:
            await watcher.until_connected()
            await api.fault("rules", tokens=["second"])
            await api.fault("disconnect")
            await watcher.until(lambda cluster: "401" in cluster.reason)
            config.write_text(emulator.kubeconfig.read_text().replace("first", "second"))
            await watcher.until_connected()


async def test_a_client_certificate_is_shown(tmp_path: Path) -> None:
    async with (
        running(tmp_path, "--token", "unused", "--tls", "--client-certificate") as emulator,
        watching(emulator.kubeconfig) as watcher,
    ):
        await watcher.until_connected()


async def test_a_server_that_the_kubeconfig_does_not_trust_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, "--tls") as emulator:
        config = json.loads(emulator.kubeconfig.read_text())
        del config["clusters"][0]["cluster"]["certificate-authority-data"]
        async with watching(lambda: from_kubeconfig(json.dumps(config).encode())) as watcher:
            await watcher.until(lambda cluster: "CERTIFICATE_VERIFY_FAILED" in cluster.reason)
            assert not watcher.cluster.connected


async def test_the_name_in_the_servers_certificate_may_differ_from_its_address(tmp_path: Path) -> None:
    async with running(tmp_path, "--tls") as emulator:
        config = json.loads(emulator.kubeconfig.read_text())
        config["clusters"][0]["cluster"]["tls-server-name"] = "kubernetes"
        async with watching(lambda: from_kubeconfig(json.dumps(config).encode())) as watcher:
            await watcher.until_connected()
        config["clusters"][0]["cluster"]["tls-server-name"] = "another"
        async with watching(lambda: from_kubeconfig(json.dumps(config).encode())) as watcher:
            await watcher.until(lambda cluster: "CERTIFICATE_VERIFY_FAILED" in cluster.reason)


async def test_an_authority_that_was_replaced_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pod, whose kubelet replaces the file."""
    account = tmp_path / "account"
    account.mkdir()
    async with running(tmp_path, "--tls", "--token", "first") as emulator:
        config = json.loads(emulator.kubeconfig.read_text())
        authority = base64.b64decode(config["clusters"][0]["cluster"]["certificate-authority-data"])
        for name, text in (("token", "first"), ("namespace", "default"), ("ca.crt", Authority().certificate_pem.decode())):
            (account / name).write_text(text)
        environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(emulator.port)}
        async with watching(lambda: in_cluster(account, environment)) as watcher:
            await watcher.until(lambda cluster: "CERTIFICATE_VERIFY_FAILED" in cluster.reason)
            (account / "ca.crt").write_bytes(authority)
            await watcher.until_connected()


async def test_who_may_suddenly_not_read_all_namespaces_reads_those_that_remain(watcher: Watcher, api: Client) -> None:
    await api.create(objects.namespace("secret"))
    await api.create(objects.service("hidden", "secret"))
    await watcher.until(lambda _: watcher.services == ["cart.shop", "hidden.secret"])
    await api.fault("rules", forbidden=["*@secret"])
    await api.fault("disconnect")
    await watcher.until(lambda cluster: cluster.connected and "Services in secret: 403" in cluster.reason)
    await api.set_endpoints("cart", "shop", ["10.1.0.6"])
    await watcher.until_endpoints("cart.shop", "10.1.0.6:8080")
    assert watcher.services == ["cart.shop", "hidden.secret"], "that it may not be read does not mean that it is gone"


async def test_a_kubeconfig_that_cannot_be_used_is_reported_and_read_again(tmp_path: Path, emulator: Emulator) -> None:
    config = tmp_path / "broken"
    config.write_text("{}")
    async with watching(config) as watcher:
        await watcher.until(lambda cluster: "kubeconfig cannot be read" in cluster.reason)
        config.write_text(emulator.kubeconfig.read_text())
        await watcher.until_connected()
