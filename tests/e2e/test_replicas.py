"""Two control planes on one database: each does everything, and losing one loses nothing."""

import sys
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from lab.fabric import Fabric
from lab.specs import http_loadbalancer, k8s_pool
from lab.traffic import Traffic

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(180)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fabric(show_logs_of: list[Fabric]) -> AsyncIterator[Fabric]:
    async with Fabric(("a", "b"), replicas=2) as fabric:
        show_logs_of.append(fabric)
        await fabric.site("b").cluster.deploy("echo", (sys.executable, "-m", "lab.echo"))
        await fabric.api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
        yield fabric


async def test_what_one_replica_accepted_the_other_answers_at_once(fabric: Fabric) -> None:
    first, second = fabric.replicas
    created = await first.api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a"]))
    read = await second.api.get("http_loadbalancer", "echo")
    assert read["spec"] == created["spec"]
    status = await second.api.applied("http_loadbalancer", "echo", revision=created["revision"])
    assert status["applied"]


async def test_sites_follow_the_replica_that_is_left(fabric: Fabric) -> None:
    first, second = fabric.replicas
    client = await fabric.site("a").http(8080, "echo.test")
    async with Traffic(client, "/") as traffic:
        await first.process.kill()
        created = await second.api.create("http_loadbalancer", "left", http_loadbalancer("left.test", ["echo"], ["a"]))
        await second.api.applied("http_loadbalancer", "left", revision=created["revision"], timeout_s=60)
        await first.start()
        other = await first.api.create("http_loadbalancer", "back", http_loadbalancer("back.test", ["echo"], ["a"]))
        await second.api.applied("http_loadbalancer", "back", revision=other["revision"])
    assert traffic.failures == []
