"""Spokes and their hub, joined by IPsec, as applications and operators see it. In one order: each test begins where the one before ended."""

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
import pytest_asyncio

from agent.ipsec import PORT
from lab import faults
from lab.capture import capture
from lab.fabric import LABEL, Fabric
from lab.network import Place
from lab.traffic import Traffic
from lab.wait import until
from tests.agent.test_overlay import missing
from tests.backend import now
from tests.e2e.calls import answers
from tests.e2e.hub_and_spokes import EDGES, FAR, HUB, NEAR, comes_by, furnish, hub_and_spokes, path

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.root,
    pytest.mark.skipif(bool(missing()), reason=missing() or "can run"),
]

UDP = 17
NODES = {"hub-1", "hub-2"}
EVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Joined:
    fabric: Fabric
    client: httpx.AsyncClient
    """Of a load balancer at `near` whose origin is in the hub."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def joined(show_logs_of: list[Fabric]) -> AsyncIterator[Joined]:
    """The hub has two nodes, which both are reached by the spokes."""
    async with hub_and_spokes(ipsec=(HUB, NEAR, FAR), nodes={HUB: 2}) as fabric:
        show_logs_of.append(fabric)
        await furnish(fabric)
        yield Joined(fabric, await answers(fabric, NEAR, "hub.test"))


def of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in found["paths"] if each["path"] == name)


def places(joined: Joined, site: str) -> list[Place]:
    return [node.place for node in joined.fabric.site(site).nodes]


async def test_sites_that_can_use_ipsec_do_and_tell_of_every_tunnel(joined: Joined) -> None:
    assert await comes_by(joined.fabric, NEAR, HUB, "ipsec")
    assert await _answers(joined)
    used = of(await path(joined.fabric, NEAR, HUB), "ipsec")
    assert used["encap"] == "IPSEC_PKI"
    assert used["tls"].startswith("TLSv1.3")

    async def both() -> list[dict[str, Any]]:
        tunnels: list[dict[str, Any]] = of(await path(joined.fabric, NEAR, HUB), "ipsec")["tunnels"]
        return tunnels if all(each["state"] == "TUNNEL_UP" and each["esp"]["bytes_out"] for each in tunnels) else []

    tunnels = await until(both, "both tunnels to be told of", within_s=60)
    assert {each["node"] for each in tunnels} == NODES
    assert all(each["role"] in ("TUNNEL_INITIATOR", "TUNNEL_RESPONDER") and each["esp"]["spi_in"] for each in tunnels)


async def test_a_hub_reaches_a_spoke_that_nobody_can_dial_by_ipsec_and_spokes_each_other_by_an_edge(joined: Joined) -> None:
    for source, ways in ((HUB, ("ipsec",)), (NEAR, EDGES)):
        client = await answers(joined.fabric, source, "far.test")
        assert await comes_by(joined.fabric, source, FAR, *ways)
        assert (await client.get("/")).headers["x-pod"].startswith("in-far")


async def test_only_ike_and_esp_cross_where_the_tunnel_must_be_ipsec(joined: Joined) -> None:
    await joined.fabric.api.replace("site", NEAR, {"tunnel_type": "SITE_TO_SITE_TUNNEL_IPSEC"}, labels={LABEL: "lab"})

    async def alone() -> bool:
        found = await path(joined.fabric, NEAR, HUB)
        return bool(found["path"] == "ipsec") and not {"direct", "reverse"} & {each["path"] for each in found["paths"]}

    await until(alone, "IPsec to be the only direct path", within_s=60)
    await until(lambda: _answers(joined), "requests to be answered", within_s=30)
    await until(lambda: _no_connections(joined), "connections of the paths before to end", within_s=30)
    with capture(joined.fabric.network) as seen:
        for _ in range(50):
            answer = await joined.client.post("/secret-path", headers={"x-secret": "secret-header"}, content=b"secret-body")
            assert answer.status_code == 200
    ours = {place.underlay for site in (NEAR, HUB) for place in places(joined, site)}
    between = [frame for one in ours for other in ours for frame in seen.payloads(one, other)]
    assert len(between) > 100
    assert {frame[9] for frame in between} == {UDP}
    assert {int.from_bytes(frame[22:24], "big") for frame in between} == {PORT}
    assert not any(secret in frame for frame in between for secret in (b"secret-path", b"secret-header", b"secret-body", b"in-hub"))


async def _answers(joined: Joined) -> bool:
    try:
        return (await joined.client.get("/")).status_code == 200
    except httpx.HTTPError:
        return False


async def _no_connections(joined: Joined) -> bool:
    """Whether nothing but IPsec crossed for a moment."""
    with capture(joined.fabric.network) as seen:
        await asyncio.sleep(1)
    near, hub = ({place.underlay for place in places(joined, site)} for site in (NEAR, HUB))
    return all(frame[9] == UDP for one in near for other in hub for frame in (*seen.payloads(one, other), *seen.payloads(other, one)))


async def test_a_node_finds_its_ipsec_peers_again_without_the_control_plane(joined: Joined) -> None:
    replica = joined.fabric.replicas[0].process
    replica.signal(signal.SIGSTOP)
    try:
        agent = joined.fabric.site(NEAR).agent
        await agent.stop()
        await agent.start()

        await until(lambda: _answers(joined), "requests to be answered again", within_s=60)
    finally:
        replica.signal(signal.SIGCONT)


async def test_another_agent_goes_on_in_ipsec(joined: Joined) -> None:
    fabric, agent = joined.fabric, joined.fabric.site(NEAR).agent
    await fabric.api.replace("site", NEAR, {"tunnel_type": "SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL"}, labels={LABEL: "lab"})
    await until(lambda: _ssl_stands_by(joined), "the direct path to stand by", within_s=90)
    async with Traffic(joined.client, "/", rate=20) as traffic:
        await agent.kill()
        killed = now()
        await agent.start()
        await until(lambda: _ssl_stands_by(joined, killed), "both paths to be known to the next agent", within_s=90)
    assert traffic.failures == []


async def _ssl_stands_by(joined: Joined, since: datetime = EVER) -> bool:
    """While IPsec is used, and both were found to work since then."""
    found = await path(joined.fabric, NEAR, HUB)
    up = [each for each in found["paths"] if each["status"] == "LINK_STATUS_UP" and datetime.fromisoformat(each["since"]) > since]
    return bool(found["path"] == "ipsec") and {"ipsec", "direct"} <= {each["path"] for each in up}


async def test_traffic_moves_to_ssl_when_ipsec_is_cut_and_back_when_it_has_proved_itself(joined: Joined) -> None:
    if not faults.can_filter(joined.fabric.network):
        pytest.skip("needs nft")
    fabric = joined.fabric
    async with Traffic(joined.client, "/", rate=20) as traffic:
        with faults.without_ipsec(places(joined, NEAR), places(joined, HUB)):
            await comes_by(fabric, NEAR, HUB, "direct")
            told = await path(fabric, NEAR, HUB)
            assert of(told, "ipsec")["status"] == "LINK_STATUS_DOWN"
            assert "ipsec is down" in told["why"]
            await traffic.more(20)
        await until(lambda: _ssl_stands_by(joined), "traffic to be in IPsec again", within_s=150)
        await traffic.more(20)
    assert traffic.failures == []
