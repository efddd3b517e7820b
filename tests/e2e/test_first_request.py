"""A status that says applied is a promise: the very first request may rely on it."""

import asyncio
import sys

import pytest

from lab.fabric import Fabric
from lab.specs import http_loadbalancer, k8s_pool, tcp_loadbalancer

ECHO = (sys.executable, "-m", "lab.echo")


@pytest.mark.timeout(180)
async def test_the_first_requests_between_two_sites_succeed() -> None:
    """The load balancers are what makes peers of the two sites: a moment before, neither knew of the other."""
    async with Fabric(("a", "b")) as fabric:
        a, b, api = fabric.site("a"), fabric.site("b"), fabric.api
        await b.cluster.deploy("echo", ECHO)
        await b.cluster.deploy("bytes", [*ECHO, "--tcp"], port=9000)
        await api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
        await api.create("origin_pool", "bytes", k8s_pool("bytes", ["b"], port=9000))
        await api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a"]))
        await api.create("tcp_loadbalancer", "bytes", tcp_loadbalancer(["bytes"], ["a"], 9000))
        client = await a.http(8080, "echo.test")
        await asyncio.gather(api.applied("http_loadbalancer", "echo"), api.applied("tcp_loadbalancer", "bytes"))

        assert (await client.get("/")).status_code == 200
        reader, writer = await a.connect(9000)
        assert await asyncio.wait_for(reader.readline(), 10) == f"{b.cluster.services['bytes'].pods[0].name}\n".encode()
        writer.close()
