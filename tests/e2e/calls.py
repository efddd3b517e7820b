"""Requests to load balancers of a fabric, and changes of its configuration, as tests of trouble need them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from lab.fabric import Fabric
from lab.specs import http_loadbalancer
from lab.traffic import Traffic
from lab.wait import until


async def answers(fabric: Fabric, site: str, domain: str = "echo.test") -> httpx.AsyncClient:
    """A client of the load balancer of this domain, once it serves at the site."""
    client = await fabric.site(site).http(8080, domain)

    async def succeeds() -> bool:
        try:
            return (await client.get("/")).is_success
        except httpx.TransportError as error:
            raise ConnectionError(str(error)) from error

    await until(succeeds, f"{domain} to answer at {site}")
    return client


@asynccontextmanager
async def traffic(fabric: Fabric, site: str = "a") -> AsyncIterator[Traffic]:
    """Requests to `echo.test` at a site, none of which may fail."""
    async with Traffic(await answers(fabric, site), "/") as traffic:
        yield traffic
        await traffic.more(20)
    assert traffic.failures == []


async def a_change_arrives(fabric: Fabric, name: str, site: str = "b") -> None:
    """A load balancer `<name>.test` that is created now is soon in force at the site, and serves."""
    created = await fabric.api.create("http_loadbalancer", name, http_loadbalancer(f"{name}.test", ["echo"], [site]))
    await fabric.api.applied("http_loadbalancer", name, revision=created["revision"])
    await answers(fabric, site, f"{name}.test")
