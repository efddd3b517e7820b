"""Authorities are replaced under traffic, and who is let out is out: on real processes."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import httpx2
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
Talk = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fabric(show_logs_of: list[Fabric]) -> AsyncIterator[Fabric]:
    """Services `echo` and `bytes` in b, called from a and c, and `back` in c, called from a."""
    async with Fabric(("a", "b", "c")) as fabric:
        show_logs_of.append(fabric)
        b, api = fabric.site("b"), fabric.api
        await b.cluster.deploy("echo", ECHO)
        await b.cluster.deploy("bytes", [*ECHO, "--tcp"], port=9000)
        await fabric.site("c").cluster.deploy("back", [*ECHO, "--tcp"], port=9000)
        await api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
        await api.create("origin_pool", "bytes", k8s_pool("bytes", ["b"], port=9000))
        await api.create("origin_pool", "back", k8s_pool("back", ["c"], port=9000))
        await api.create("tcp_loadbalancer", "back", tcp_loadbalancer(["back"], ["a"], 9001))
        await api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a"]))
        await api.create("tcp_loadbalancer", "bytes", tcp_loadbalancer(["bytes"], ["a", "c"], 9000))
        await api.applied("http_loadbalancer", "echo")
        await api.applied("tcp_loadbalancer", "bytes")
        await api.applied("tcp_loadbalancer", "back")
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


async def test_a_tenants_authority_is_replaced_and_no_request_and_no_connection_fails(fabric: Fabric) -> None:
    sites = ("a", "b")
    client, held = await fabric.site("a").http(8080, "echo.test"), await talking(fabric, "a", 9000)
    before = [await leaves(fabric, site) for site in sites]
    async with Traffic(client, "/") as traffic:
        await fabric.api.request("POST", f"{OWN}/versions", {})
        await step(fabric.api, "POST", f"{OWN}/versions/2/switch", "all nodes to trust the next version")
        await echoed(held, b"switched\n")
        await step(fabric.api, "DELETE", f"{OWN}/versions/1", "all nodes to have certificates of the next version")
        assert states(await fabric.api.request("GET", OWN)) == [(2, "active"), (1, "removed")]

        async def swapped() -> bool:
            return all([old.isdisjoint(await leaves(fabric, site)) for old, site in zip(before, sites, strict=True)])

        await until(swapped, "Envoy to have the new certificates alone", within_s=60)
        (await talking(fabric, "a", 9000))[1].close()
        await echoed(held, b"swapped\n")
        await traffic.more(200)
    assert traffic.failures == []
    held[1].close()


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


async def test_a_site_that_is_let_out_loses_idle_connections_both_ways_and_is_called_no_more(fabric: Fabric) -> None:
    """Whatever it does about it: its Envoy is not told, and would go on."""
    opened, called = await talking(fabric, "c", 9000), await talking(fabric, "a", 9001)
    await fabric.site("c").agent.kill()
    await fabric.api.delete("site", "c")
    for reader, writer in (opened, called):
        with suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 60)
        assert reader.at_eof() or reader.exception()
        writer.close()
    assert fabric.site("c").envoy_pid()

    async def refused() -> bool:
        reader, writer = await fabric.site("a").connect(9001)
        writer.write(b"hello\n")
        answer = await asyncio.wait_for(reader.read(64), 20)
        writer.close()
        return answer == b""

    await until(refused, "the site to be called no more", within_s=60)


async def talking(fabric: Fabric, site: str, port: int) -> Talk:
    """A connection over which something was answered."""

    async def answered() -> list[Talk]:
        reader, writer = await fabric.site(site).connect(port)
        writer.write(b"hello\n")
        if await asyncio.wait_for(reader.read(64), 20):
            return [(reader, writer)]
        writer.close()
        return []

    (talk,) = await until(answered, f"port {port} at {site} to answer")
    return talk


async def echoed(talk: Talk, line: bytes) -> None:
    talk[1].write(line)
    await asyncio.wait_for(talk[0].readuntil(line), 20)


async def leaves(fabric: Fabric, site: str) -> set[str]:
    """Serial numbers of the certificates that the Envoy of a site's node shows in handshakes."""
    admin = httpx2.AsyncHTTPTransport(uds=str(fabric.site(site).node.state / "run" / "admin.sock"))
    async with httpx2.AsyncClient(transport=admin) as http:
        told = (await http.get("http://envoy/certs")).raise_for_status().json()
    serials = {leaf["serial_number"] for found in told["certificates"] for leaf in found.get("cert_chain", ())}
    assert serials
    return serials
