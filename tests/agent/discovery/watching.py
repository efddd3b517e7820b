"""A watched cluster, and how to wait for what it should show."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent.discovery.kubeconfig import ClusterAccess, from_kubeconfig
from agent.discovery.kubernetes import WatchedCluster
from agent.discovery.table import resolve
from agent.protocol.items import Origin
from lab.kubernetes import objects
from lab.kubernetes.client import Client
from lab.kubernetes.kubeconfig import kubeconfig
from lab.kubernetes.objects import Body
from lab.kubernetes.running import Emulator

PATIENCE_S = 15


@dataclass
class Watcher:
    cluster: WatchedCluster
    news: asyncio.Event

    async def until(self, condition: Callable[[WatchedCluster], Any]) -> None:
        """Wait for changes until the condition holds; a bounded time."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not condition(self.cluster):
                    await self.news.wait()
                    self.news.clear()
        except TimeoutError:
            pytest.fail(f"still connected={self.cluster.connected}, reason={self.cluster.reason!r}, table={self.cluster.table}")

    async def until_connected(self) -> None:
        await self.until(lambda cluster: cluster.connected)

    async def until_endpoints(self, service: str, *wanted: str, port: int = 80) -> None:
        """`wanted` are `address:port`."""
        await self.until(lambda _: self.endpoints(service, port) == sorted(wanted))

    def endpoints(self, service: str, port: int = 80) -> list[str]:
        origin = Origin(key="any", type="k8s_service", service=service, port=port)
        table = self.cluster.table
        return sorted(f"{one.address}:{one.port}" for one in resolve(origin, [table] if table else []))

    @property
    def services(self) -> list[str]:
        return sorted(self.cluster.table.services) if self.cluster.table else []


async def allowed(emulator: Emulator, api: Client, *rules: Body, everywhere: bool = True) -> Callable[[], ClusterAccess]:
    """Access of a service account of the namespace `default` that may do this and nothing else."""
    for body in (objects.account("agent", "default"), *objects.granted("agent", "default", *rules, everywhere=everywhere)):
        await api.create(body)
    text = kubeconfig(f"http://127.0.0.1:{emulator.port}", token=await api.token("agent", "default"))
    return lambda: from_kubeconfig(text.encode())


@asynccontextmanager
async def watching(access: Path | Callable[[], ClusterAccess], **options: Any) -> AsyncIterator[Watcher]:
    """Through the kubeconfig in a file, or what a function gives; with options of `WatchedCluster`."""
    news = asyncio.Event()
    load = access if callable(access) else lambda: from_kubeconfig(access.read_bytes(), access.parent)
    async with following(Watcher(WatchedCluster(load, news.set, **options), news)) as watcher:
        yield watcher


@asynccontextmanager
async def following(watcher: Watcher) -> AsyncIterator[Watcher]:
    task = asyncio.create_task(watcher.cluster.run())
    try:
        yield watcher
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
