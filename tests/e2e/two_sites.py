"""Sites `a` and `b` in one mesh, and short ways to make a feature real: origins, pools, load balancers, requests."""

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from lab.fabric import Fabric
from lab.specs import advertise
from lab.wait import until
from tests.e2e.origins import PORT, Origin

LISTEN = 8080
CHECK = {"interval": 1, "timeout": 1, "healthy_threshold": 1, "unhealthy_threshold": 1}
HTTP_CHECK = {"http_health_check": {"path": "/health", "use_origin_server_name": {}}, **CHECK}
TCP_CHECK = {"tcp_health_check": {}, **CHECK}


def locator(site: str) -> dict[str, Any]:
    return {"site": {"namespace": "system", "name": site}}


def to(*pools: str) -> list[dict[str, Any]]:
    """These pools, with equal weights."""
    return [{"pool": {"name": pool}, "weight": 1, "priority": 1} for pool in pools]


def simple(prefix: str, *pools: str, **more: Any) -> dict[str, Any]:
    """A route."""
    return {"simple_route": {"path": {"prefix": prefix}, "origin_pools": to(*pools), **more}}


@dataclass
class TwoSites:
    fabric: Fabric
    origins: list[Origin] = field(default_factory=list)
    _clients: dict[tuple[str, int], httpx.AsyncClient] = field(default_factory=dict)

    async def origin(self, site: str, name: str, *, tls: ssl.SSLContext | None = None, address: str = "", port: int = PORT) -> Origin:
        """A server at an address of its own in the site's pod network, unless another is given."""
        place = self.fabric.site(site).place
        origin = Origin(name, site, address or f"{place.pods}{100 + len(self.origins)}", port)
        await origin.start(place, tls)
        self.origins.append(origin)
        return origin

    def close(self) -> None:
        for origin in self.origins:
            origin.released.set()
            origin.stop()

    async def make(self, kind: str, name: str, spec: Mapping[str, Any], **more: Any) -> Any:
        """Create it, and wait until every site concerned has it."""
        created = await self.fabric.api.create(kind, name, dict(spec), **more)
        await self.applied(kind, name, created, **more)
        return created

    async def change(self, kind: str, name: str, spec: Mapping[str, Any], **more: Any) -> Any:
        """The same with PUT."""
        replaced = await self.fabric.api.replace(kind, name, dict(spec), **more)
        await self.applied(kind, name, replaced, **more)
        return replaced

    async def applied(self, kind: str, name: str, written: Any, *, namespace: str | None = None, **_: Any) -> None:
        status = await self.fabric.api.applied(kind, name, revision=written["revision"], namespace=namespace)
        assert status["applied"], status

    async def pool(self, name: str, *origins: Origin, **more: Any) -> None:
        servers = [{"private_ip": {"ip": at.address, "site_locator": locator(at.site), "inside_network": {}}} for at in origins]
        await self.fabric.api.create("origin_pool", name, {"origin_servers": servers, "port": PORT, **more})

    async def load_balancer(self, name: str, *pools: str, sites: Sequence[str] = ("a",), port: int = LISTEN, **more: Any) -> str:
        """For `<name>.test`, which is returned; to these pools unless `more` has routes that say otherwise."""
        domain = f"{name}.test"
        spec = {"domains": [domain], "http": {"port": port}, "advertise_custom": advertise(sites), "default_route_pools": to(*pools)}
        await self.make("http_loadbalancer", name, spec | more)
        return domain

    async def serve(self, name: str, *origins: Origin, pool: Mapping[str, Any] | None = None, **more: Any) -> str:
        """A pool of these origins and a load balancer for it, of the same name; returns the domain."""
        await self.pool(name, *origins, **(pool or {}))
        return await self.load_balancer(name, name, **more)

    async def client(self, site: str, port: int = LISTEN) -> httpx.AsyncClient:
        if (site, port) not in self._clients:
            host, reached = await self.fabric.site(site).reach(port)
            self._clients[site, port] = self.fabric.client(f"http://{host}:{reached}", {})
        return self._clients[site, port]

    async def call(
        self,
        domain: str,
        path: str = "/",
        method: str = "GET",
        *,
        site: str = "a",
        port: int = LISTEN,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """An answer that there is no such route counts only if it stays: Envoy acknowledges routes a moment before its workers have them."""
        client = await self.client(site, port)

        async def answer() -> httpx.Response:
            return await client.request(method, path, headers={"host": domain, **(headers or {})}, content=content)

        async def routed() -> httpx.Response | None:
            found = await answer()
            return found if found.status_code != 404 or found.content else None

        try:
            return await until(routed, "a route", within_s=2)
        except TimeoutError:
            return await answer()

    async def who(self, domain: str, count: int = 12, **more: Any) -> set[str]:
        """Names of the origins that answer so many requests; none may fail."""
        answers = [await self.call(domain, **more) for _ in range(count)]
        assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers if not answer.is_success]
        return {answer.headers["x-origin"] for answer in answers}

    async def settles(self, domain: str, names: set[str], count: int = 12, **more: Any) -> None:
        """Until just these origins answer, and nothing fails."""
        seen: Counter[tuple[int, str]] = Counter()

        async def settled() -> bool:
            answers = [await self.call(domain, **more) for _ in range(count)]
            seen.clear()
            seen.update((answer.status_code, answer.headers.get("x-origin", "")) for answer in answers)
            return seen.keys() == {(200, name) for name in names}

        try:
            await until(settled, f"{domain} to be answered by {sorted(names)}")
        except TimeoutError as error:
            raise AssertionError(f"{error}: {seen}") from error


@asynccontextmanager
async def two_sites(shown: list[Fabric]) -> AsyncIterator[TwoSites]:
    async with Fabric(("a", "b")) as fabric:
        shown.append(fabric)
        sites = TwoSites(fabric)
        await asyncio.gather(
            fabric.api.create("healthcheck", "http", HTTP_CHECK),
            fabric.api.create("healthcheck", "tcp", TCP_CHECK),
        )
        try:
            await asyncio.gather(_tunnel(sites, "a", "b"), _tunnel(sites, "b", "a"))
            yield sites
        finally:
            sites.close()


async def _tunnel(sites: TwoSites, here: str, there: str) -> None:
    """Until requests cross: a gateway that was called before it listened is found healthy only by the next check."""
    domain = await sites.serve(f"from-{here}", await sites.origin(there, f"from-{here}"), sites=[here])
    await sites.settles(domain, {f"from-{here}"}, 1, site=here)
