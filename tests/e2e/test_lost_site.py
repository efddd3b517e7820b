"""A site that dies is taken out of use without its help, as its load balancers say, and comes back by itself."""

import sys
from typing import Any

import pytest

from lab import faults
from lab.fabric import Fabric
from lab.specs import http_loadbalancer, k8s_pool
from lab.wait import until

pytestmark = pytest.mark.timeout(240)

ECHO = (sys.executable, "-m", "lab.echo")


async def test_a_site_that_dies_is_lost_for_its_callers_and_back_when_it_returns(show_logs_of: list[Fabric]) -> None:
    async with Fabric(("a", "b", "c")) as fabric:
        show_logs_of.append(fabric)
        a, b, c, api = fabric.site("a"), fabric.site("b"), fabric.site("c"), fabric.api
        await b.cluster.deploy("echo", ECHO)
        await c.cluster.deploy("echo", ECHO)
        await api.create("origin_pool", "echo", k8s_pool("echo", ["b", "c"]))
        spec = http_loadbalancer("echo.test", ["echo"], ["a"]) | {"evict_lost_sites": {}}
        await api.create("http_loadbalancer", "echo", spec)
        await api.applied("http_loadbalancer", "echo")
        client = await a.http(8080, "echo.test")

        async def conditions() -> list[str]:
            told: dict[str, Any] = await api.request("GET", "/api/config/namespaces/system/sites/b/status")
            return [condition["type"] for condition in told["conditions"]]

        async def lost() -> bool:
            return "Lost" in await conditions()

        async def path() -> dict[str, Any]:
            told: dict[str, Any] = await api.request("GET", "/api/data/namespaces/system/topology/path?from=a&to=b")
            return told

        async def direct() -> bool:
            return bool((await path())["direct"])

        await until(direct, "a to reach b directly", within_s=60)
        await faults.kill([b.node])
        await until(lost, "b to count as lost", within_s=60)
        assert (await path())["lost"]
        for _ in range(20):
            assert (await client.get("/")).is_success
        await b.agent.start()

        async def back() -> bool:
            return not await conditions() and await direct()

        await until(back, "b to be back", within_s=90)
