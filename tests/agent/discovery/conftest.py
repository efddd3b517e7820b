"""A watched cluster against an emulator that runs as a process."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.discovery import kubeconfig, reflector
from lab.kubernetes import objects
from lab.kubernetes.client import Client, connect
from lab.kubernetes.running import Emulator, running
from tests.agent.discovery.watching import Watcher, watching


@pytest.fixture
async def emulator(tmp_path: Path) -> AsyncIterator[Emulator]:
    async with running(tmp_path) as emulator:
        yield emulator


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
    monkeypatch.setattr(kubeconfig, "ANSWER_S", 1.5)


@pytest.fixture
def short_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watches may be short without being taken for a failure of the server."""
    monkeypatch.setattr(reflector, "SHORTEST_WATCH_S", 0.0)
