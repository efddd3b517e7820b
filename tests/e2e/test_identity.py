"""Authorities are replaced under traffic, and who is let out is out: on real processes."""

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from lab.api import Api, Refused
from lab.fabric import Fabric
from lab.specs import http_loadbalancer, k8s_pool, tcp_loadbalancer
from lab.traffic import Traffic
from lab.wait import until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(240)]

ECHO = (sys.executable, "-m", "lab.echo")
OWN = "/api/register/namespaces/system/authority"
FABRIC = "/api/operator/authorities"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fabric(show_logs_of: list[Fabric]) -> AsyncIterator[Fabric]:
    """Service `echo` and `bytes` in b, called from a and c."""
    async with Fabric(("a", "b", "c")) as fabric:
        show_logs_of.append(fabric)
        b, api = fabric.site("b"), fabric.api
        await b.cluster.deploy("echo", ECHO)
        await b.cluster.deploy("bytes", [*ECHO, "--tcp"], port=9000)
        await api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
        await api.create("origin_pool", "bytes", k8s_pool("bytes", ["b"], port=9000))
        await api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a"]))
        await api.create("tcp_loadbalancer", "bytes", tcp_loadbalancer(["bytes"], ["a", "c"], 9000))
        await api.applied("http_loadbalancer", "echo")
        await api.applied("tcp_loadbalancer", "bytes")
        client = await fabric.site("a").http(8080, "echo.test")

        async def answers() -> bool:
            return (await client.get("/")).is_success

        await until(answers, "echo.test to answer")
        yield fabric


async def step(api: Api, method: str, path: str, what: str) -> Any:
    """As soon as it is not refused any more."""

    async def taken() -> Any:
        try:
            return await api.request(method, path, None if method == "DELETE" else {})
        except Refused as refusal:
            if refusal.status != 409:
                raise
            return None

    return await until(taken, what, within_s=60, every_s=0.5)


def states(found: Any) -> list[tuple[int, str]]:
    return [(version["version"], version["state"]) for version in found["versions"]]


async def test_a_tenants_authority_is_replaced_and_no_request_fails(fabric: Fabric) -> None:
    client = await fabric.site("a").http(8080, "echo.test")
    async with Traffic(client, "/") as traffic:
        await fabric.api.request("POST", f"{OWN}/versions", {})
        await step(fabric.api, "POST", f"{OWN}/versions/2/switch", "all nodes to trust the next version")
        await step(fabric.api, "DELETE", f"{OWN}/versions/1", "all nodes to have certificates of the next version")
        assert states(await fabric.api.request("GET", OWN)) == [(2, "active"), (1, "removed")]
        await traffic.more(200)
    assert traffic.failures == []


async def test_the_root_is_replaced_and_agents_follow(fabric: Fabric) -> None:
    client = await fabric.site("a").http(8080, "echo.test")
    replica = fabric.replicas[0]
    async with Traffic(client, "/") as traffic:
        await fabric.api.request("POST", f"{FABRIC}/root/versions", {})
        await step(fabric.api, "POST", f"{FABRIC}/root/versions/2/switch", "all nodes to trust the next root")

        async def published() -> bool:
            return replica.ca.read_text().count("BEGIN CERTIFICATE") == 2

        await until(published, "the control plane to serve under both roots", within_s=60)
        await replica.stop()
        await replica.start()
        await fabric.api.create("http_loadbalancer", "after", http_loadbalancer("after.test", ["echo"], ["a"]))
        assert (await fabric.api.applied("http_loadbalancer", "after"))["applied"]
    assert traffic.failures == []


async def test_an_idle_connection_of_a_site_ends_when_the_site_is_let_out(fabric: Fabric) -> None:
    reader, writer = await fabric.site("c").connect(9000)
    writer.write(b"hello\n")
    assert await asyncio.wait_for(reader.read(64), 20)
    await fabric.api.delete("site", "c")
    assert await asyncio.wait_for(reader.read(), 60) == b""
    writer.close()
