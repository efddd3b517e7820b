"""Sites that are joined by IPsec, as applications and operators see it. One fabric, in one order: each test begins where the one before ended."""

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import pytest_asyncio

from agent.ipsec import PORT
from lab import faults
from lab.capture import capture
from lab.fabric import LABEL, Fabric
from lab.network import Place
from lab.specs import http_loadbalancer, k8s_pool
from lab.traffic import Traffic
from lab.wait import until
from tests.agent.test_overlay import missing
from tests.e2e.hub_and_spokes import ECHO, path

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.root,
    pytest.mark.skipif(bool(missing()), reason=missing() or "can run"),
]

DOMAIN = "shop.test"
UDP = 17


@dataclass(frozen=True)
class Joined:
    fabric: Fabric
    client: httpx.AsyncClient
    """Of a load balancer at a whose origin is at b."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def joined(show_logs_of: list[Fabric]) -> AsyncIterator[Joined]:
    """Of b's two nodes both are reached from a."""
    async with Fabric(("a", "b"), nodes={"b": 2}, ipsec=("a", "b")) as fabric:
        show_logs_of.append(fabric)
        await fabric.site("b").cluster.deploy("shop", ECHO)
        await fabric.api.create("origin_pool", "shop", k8s_pool("shop", ["b"]))
        await fabric.api.create("http_loadbalancer", "shop", http_loadbalancer(DOMAIN, ["shop"], ["a"]))
        yield Joined(fabric, await fabric.site("a").node.http(8080, DOMAIN))


async def uses(joined: Joined, wanted: str, within_s: float = 60) -> dict[str, Any]:
    """How a reaches b, once it does by that path."""

    async def told() -> dict[str, Any] | None:
        found = await path(joined.fabric, "a", "b")
        return found if found["path"] == wanted else None

    found = await until(told, f"a to reach b by {wanted}", within_s=within_s)
    assert found is not None
    return found


def of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in found["paths"] if each["path"] == name)


def places(joined: Joined, site: str) -> list[Place]:
    return [node.place for node in joined.fabric.site(site).nodes]


async def test_sites_that_can_use_ipsec_do_and_tell_of_every_tunnel(joined: Joined) -> None:
    found = await uses(joined, "ipsec")
    assert await _answers(joined)
    used = of(found, "ipsec")
    assert used["encap"] == "IPSEC_PKI"
    assert used["tls"].startswith("TLSv1.3")

    async def both() -> list[dict[str, Any]]:
        tunnels: list[dict[str, Any]] = of(await path(joined.fabric, "a", "b"), "ipsec")["tunnels"]
        return tunnels if all(each["state"] == "TUNNEL_UP" and each["esp"]["bytes_out"] for each in tunnels) else []

    tunnels = await until(both, "both tunnels to be told of", within_s=60)
    assert {each["node"] for each in tunnels} == {"b-1", "b-2"}
    assert all(each["role"] in ("TUNNEL_INITIATOR", "TUNNEL_RESPONDER") and each["esp"]["spi_in"] for each in tunnels)


async def test_traffic_moves_to_ssl_when_ipsec_is_cut_and_waits_before_it_moves_back(joined: Joined) -> None:
    if not faults.can_filter(joined.fabric.network):
        pytest.skip("needs nft")
    async with Traffic(joined.client, "/", rate=20) as traffic:
        with faults.without_ipsec(places(joined, "a"), places(joined, "b")):
            told = await uses(joined, "direct")
            assert of(told, "ipsec")["status"] == "LINK_STATUS_DOWN"
            assert "ipsec is down" in told["why"]

        async def answers_again() -> bool:
            found = of(await path(joined.fabric, "a", "b"), "ipsec")
            return bool(found["status"] == "LINK_STATUS_UP")

        await until(answers_again, "IPsec to be there again", within_s=90)
    assert traffic.outcomes
    assert not traffic.failures


async def test_only_ike_and_esp_cross_where_the_tunnel_must_be_ipsec(joined: Joined) -> None:
    await joined.fabric.api.replace("site", "a", {"tunnel_type": "SITE_TO_SITE_TUNNEL_IPSEC"}, labels={LABEL: "lab"})

    async def alone() -> bool:
        found = await path(joined.fabric, "a", "b")
        return bool(found["path"] == "ipsec") and {each["path"] for each in found["paths"]} == {"ipsec"}

    await until(alone, "IPsec to be the only path", within_s=60)
    await until(lambda: _answers(joined), "requests to be answered", within_s=30)
    await until(lambda: _no_connections(joined), "connections of the paths before to end", within_s=30)
    with capture(joined.fabric.network) as seen:
        for _ in range(50):
            answer = await joined.client.post("/secret-path", headers={"x-secret": "secret-header"}, content=b"secret-body")
            assert answer.status_code == 200
    ours = {place.underlay for site in "ab" for place in places(joined, site)}
    between = [frame for one in ours for other in ours for frame in seen.payloads(one, other)]
    assert len(between) > 100
    assert {frame[9] for frame in between} == {UDP}
    assert {int.from_bytes(frame[22:24], "big") for frame in between} == {PORT}
    assert not any(secret in frame for frame in between for secret in (b"secret-path", b"secret-header", b"secret-body", b"shop"))


async def _answers(joined: Joined) -> bool:
    try:
        return (await joined.client.get("/")).status_code == 200
    except httpx.HTTPError:
        return False


async def _no_connections(joined: Joined) -> bool:
    """Whether nothing but IPsec crossed for a moment."""
    with capture(joined.fabric.network) as seen:
        await asyncio.sleep(1)
    a, b = ({place.underlay for place in places(joined, site)} for site in "ab")
    return all(frame[9] == UDP for one in a for other in b for frame in (*seen.payloads(one, other), *seen.payloads(other, one)))


async def test_a_node_finds_its_ipsec_peers_again_without_the_control_plane(joined: Joined) -> None:
    replica = joined.fabric.replicas[0].process
    replica.signal(signal.SIGSTOP)
    try:
        agent = joined.fabric.site("a").agent
        await agent.stop()
        await agent.start()

        await until(lambda: _answers(joined), "requests to be answered again", within_s=60)
    finally:
        replica.signal(signal.SIGCONT)
