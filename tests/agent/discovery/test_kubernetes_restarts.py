"""What happens to the table while the API is gone: here it is a process, which can be killed."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.kubernetes.running import Emulator, running
from tests.agent.discovery.watching import Watcher, watching


@pytest.fixture
async def emulator(tmp_path: Path) -> AsyncIterator[Emulator]:
    async with running(tmp_path) as emulator:
        yield emulator


async def test_a_vanished_api_keeps_the_table_and_is_reported(watcher: Watcher, emulator: Emulator) -> None:
    table = watcher.cluster.table
    await emulator.kill()
    await watcher.until(lambda cluster: not cluster.connected and "ConnectError" in cluster.reason)
    assert watcher.cluster.table is table
    assert watcher.cluster.report("x").services, "what could not be read still exists"


async def test_an_api_that_was_killed_and_restarted_is_followed_again(watcher: Watcher, api: Client, emulator: Emulator) -> None:
    await emulator.kill()
    await watcher.until(lambda cluster: not cluster.connected)
    await emulator.start()
    await api.set_endpoints("cart", "shop", ["10.1.0.9"])
    await watcher.until_endpoints("cart.shop", "10.1.0.9:8080")
    await watcher.until_connected()
    assert watcher.cluster.reason == ""


async def test_what_was_deleted_while_nobody_watched_is_swept(emulator: Emulator, api: Client, watcher: Watcher) -> None:
    await api.create(objects.service("old", "shop"))
    await watcher.until(lambda _: "old.shop" in watcher.services)
    await emulator.kill()
    await watcher.until(lambda cluster: not cluster.connected)
    (emulator.directory / "state").unlink()
    await emulator.start()
    await watcher.until(lambda _: watcher.services == [])


async def test_a_node_that_starts_without_an_api_has_what_it_knew_before(watcher: Watcher, emulator: Emulator) -> None:
    await emulator.kill()
    async with watching(emulator.kubeconfig, last_known=watcher.cluster.table) as restarted:
        await restarted.until(lambda cluster: "ConnectError" in cluster.reason)
        assert restarted.endpoints("cart.shop") == ["10.1.0.1:8080"]


async def test_a_node_that_knows_nothing_yet_says_so(tmp_path: Path, emulator: Emulator) -> None:
    await emulator.kill()
    async with watching(emulator.kubeconfig) as watcher:
        await watcher.until(lambda cluster: "ConnectError" in cluster.reason)
        assert watcher.cluster.table is None
