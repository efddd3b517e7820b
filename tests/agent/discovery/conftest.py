"""A watched cluster against an emulator, which runs in the test's own process unless it is to be killed."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from agent.discovery import kubeconfig as access
from agent.discovery import reflector
from lab.kubernetes import objects
from lab.kubernetes.access import Access
from lab.kubernetes.admission import Admission
from lab.kubernetes.client import Client, connect
from lab.kubernetes.kubeconfig import kubeconfig
from lab.kubernetes.running import Emulator
from lab.kubernetes.server import ApiServer
from lab.kubernetes.store import Store
from lab.kubernetes.writing import Writer
from tests.agent.discovery.watching import Watcher, watching


@pytest.fixture
def server() -> ApiServer:
    return ApiServer(Writer(Store(None), Admission(allow_loopback=True)), Access())


@pytest.fixture
async def emulator(server: ApiServer, tmp_path: Path) -> AsyncIterator[Emulator]:
    """It serves as the process would, but at once."""
    runner = web.AppRunner(server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    emulator = Emulator(tmp_path, port=runner.addresses[0][1])
    emulator.kubeconfig.write_text(kubeconfig(f"http://127.0.0.1:{emulator.port}", token="", authority=None, certificate=False))
    yield emulator
    await runner.cleanup()


@pytest.fixture
async def api(emulator: Emulator) -> AsyncIterator[Client]:
    """A client of the emulator; there is a namespace `shop` with a service `cart` on port 80 and one pod."""
    async with connect(emulator.kubeconfig) as client:
        await client.create(objects.namespace("shop"))
        await client.create(objects.service("cart", "shop", 80, 8080))
        await client.set_endpoints("cart", "shop", ["10.1.0.1"])
        yield client


@pytest.fixture
async def watcher(emulator: Emulator, api: Client) -> AsyncIterator[Watcher]:
    async with watching(emulator.kubeconfig) as watcher:
        await watcher.until_connected()
        yield watcher


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflector, "PAGE", 2)


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of watches that show nothing, and of lists that are not answered."""
    monkeypatch.setattr(reflector, "SILENCE_S", 1.5)
    monkeypatch.setattr(access, "ANSWER_S", 1.5)
    monkeypatch.setattr(reflector, "ANSWER_S", 1.5)


@pytest.fixture
def short_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watches may be short without being taken for a failure of the server."""
    monkeypatch.setattr(reflector, "SHORTEST_WATCH_S", 0.0)
