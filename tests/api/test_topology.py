"""What users see of sites, meshes and the paths between them."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
from fastapi import FastAPI

from agent.errors import Refused
from agent.protocol.report import Heartbeat, IpsecAbility, IpsecTunnel, PeerHealth, Report
from controlplane.services import topology
from tests.api.enrolled import Node, admitted, caught_up
from tests.api.test_delivery import publish, tenant_of
from tests.api.test_hubs import created, group, select, spokes
from tests.api.test_objects import BALANCERS, POOLS, balancer, pool
from tests.backend import now

Json = dict[str, Any]
TOPOLOGY = "/api/data/namespaces/system/topology"


def site_id(made: Node) -> str:
    assert made.credentials
    return made.credentials.site_id


def seen(peer: Node, state: Any, path: str = "direct", **more: Any) -> PeerHealth:
    return PeerHealth(site_id=site_id(peer), path=path, state=state, since=now().timestamp(), last_evidence=now().timestamp(), **more)


async def tell(app: FastAPI, made: Node, *paths: PeerHealth, skew_s: float = 0.0) -> None:
    await made.control.report(Report(boot_id=made.boot_id, peers=paths))
    await made.beat(sent_at=now().timestamp() + skew_s)
    await app.state.services.heartbeats.flush(now())


async def call(app: FastAPI, user: httpx.AsyncClient, source: Node, destination: Node, name: str = "cart") -> None:
    """A load balancer at one site with its origins at the other."""
    assert (await user.post(POOLS, json=pool(name, destination.site))).status_code == 200
    body = balancer(name, f"{name}.test", where={"site": {"site": {"name": source.site}, "network": "SITE_NETWORK_INSIDE"}})
    body["spec"]["default_route_pools"] = [{"pool": {"name": name}}]
    assert (await user.post(BALANCERS, json=body)).status_code == 200
    await caught_up(app, tenant_of(source))


async def mesh(user: httpx.AsyncClient, name: str) -> Json:
    answer = await user.post(f"{TOPOLOGY}/site_mesh_group/{name}", json={})
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    return body


async def why(user: httpx.AsyncClient, source: str, to: str) -> Json:
    answer = await user.get(f"{TOPOLOGY}/path", params={"from": source, "to": to})
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    return body


async def test_a_mesh_shows_its_sites_and_how_their_links_do(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a, admitted(app, user, "b") as b:
        await select(user, all="ves.io/siteName in (a, b)")
        await created(user, group("mesh", "all", full_mesh={}))
        await caught_up(app, tenant_of(a))
        assert (await mesh(user, "mesh"))["edges"][0]["status"] == "LINK_STATUS_NOT_APPLICABLE"
        await call(app, user, a, b)
        assert (await mesh(user, "mesh"))["edges"][0]["status"] == "LINK_STATUS_UNKNOWN"
        await tell(app, a, seen(b, "UP", rtt_ms=1.5, tls="TLSv1.3 X25519MLKEM768", in_use=True, reason="preferred"))
        found = await mesh(user, "mesh")
        assert sorted(node["metadata"]["name"] for node in found["nodes"] if "site" in node) == ["a", "b"]
        (between,) = found["edges"]
        (link,) = between["links"]
        assert (between["status"], link["rtt_ms"], link["encap"], link["in_use"]) == ("LINK_STATUS_UP", 1.5, "SSL", True)
        await tell(app, b, seen(a, "DOWN", error="no route to host"))
        (between,) = (await mesh(user, "mesh"))["edges"]
        assert between["status"] == "LINK_STATUS_DEGRADED"
        assert {link["error"] for link in between["links"]} == {"", "no route to host"}
        (summary,) = (await user.get(f"{TOPOLOGY}/site_mesh_groups")).json()["nodes"]
        told = summary["site_mesh_group"]["summary"]
        assert (told["sites"], told["edge_status_summary"]) == (2, [{"status": "LINK_STATUS_DEGRADED", "count": 1}])
        assert [each["status"] for each in told["link_status_summary"]] == ["LINK_STATUS_DOWN", "LINK_STATUS_UP"]
        assert (await user.post(f"{TOPOLOGY}/site_mesh_group/none", json={})).status_code == 404


async def test_spokes_show_their_hubs_and_each_path_its_state(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "hub") as hub, admitted(app, user, "one") as one, admitted(app, user, "two") as two:
        await select(user, hubs="ves.io/siteName = hub", spokes="ves.io/siteName in (one, two)")
        await created(user, group("h", "hubs", hub_mesh={}), spokes("s", "spokes", "h"))
        await call(app, user, one, hub)
        await call(app, user, one, two, "till")
        await tell(app, one, seen(hub, "DOWN", error="timeout"), seen(hub, "UP", "edge-7", in_use=True, reason="direct is down: timeout"))
        found = await mesh(user, "s")
        roles = {node["metadata"]["name"]: node["site"]["role"] for node in found["nodes"] if "site" in node}
        assert roles == {"hub": "hub", "one": "spoke", "two": "spoke"}
        ends = {frozenset((edge["node_id1"], edge["node_id2"])): edge for edge in found["edges"]}
        assert set(ends) == {frozenset((site_id(hub), site_id(each))) for each in (one, two)}
        links = ends[frozenset((site_id(hub), site_id(one)))]["links"]
        assert [(link["path"], link["status"], link["in_use"]) for link in links] == [
            ("edge-7", "LINK_STATUS_UP", True),
            ("direct", "LINK_STATUS_DOWN", False),
        ]
        groups = (await user.get(f"{TOPOLOGY}/site_mesh_groups")).json()
        names = {node["id"]: node["metadata"]["name"] for node in groups["nodes"]}
        assert [(names[edge["node_id1"]], names[edge["node_id2"]]) for edge in groups["edges"]] == [("s", "h")]
        around = (await user.post(f"{TOPOLOGY}/site/one", json={"site": "one"})).json()
        assert sorted(node["metadata"]["name"] for node in around["nodes"]) == ["hub", "one", "two"]


async def test_a_path_is_explained_with_what_would_make_it_direct(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a, admitted(app, user, "b") as b:
        assert (await why(user, "a", "b"))["why"].startswith("unknown: site a is silent")
        await a.beat()
        await app.state.services.heartbeats.flush(now())
        apart = await why(user, "a", "b")
        assert apart["why"].startswith("no path is kept: no load balancer at a has origins at b")
        assert apart["to_be_direct"] == "no site mesh group joins a and b: select both in the virtual_site of one"
        await select(user, all="ves.io/siteName in (a, b)")
        await created(user, group("mesh", "all", full_mesh={}, enable_re_fallback={}))
        await call(app, user, a, b)
        await tell(app, a, seen(b, "DOWN", error="connection refused"), seen(b, "UP", "e1", in_use=True, reason="direct is down: refused"))
        relayed = await why(user, "a", "b")
        assert (relayed["path"], relayed["direct"], relayed["site_mesh_groups"]) == ("e1", False, ["mesh"])
        assert relayed["why"] == "e1: direct is down: refused"
        assert relayed["to_be_direct"] == "the direct path fails (connection refused): let a reach the gateway of b"
        await tell(app, a, seen(b, "UP", in_use=True, reason="preferred"), seen(b, "UP", "e1", reason="stands by"))
        direct = await why(user, "a", "b")
        assert (direct["path"], direct["direct"], direct["to_be_direct"]) == ("direct", True, "")
        assert (await user.get(f"{TOPOLOGY}/path", params={"from": "a", "to": "c"})).status_code == 404


async def test_sites_that_nothing_joins_are_told_so(app: FastAPI, user: httpx.AsyncClient) -> None:
    """Not that they should wait."""
    async with admitted(app, user, "a") as a, admitted(app, user, "b") as b:
        await call(app, user, a, b)
        await tell(app, a)
        assert (await why(user, "a", "b"))["why"] == "there is none: no site mesh group joins both, and b has no regional edge"
        await select(user, all="ves.io/siteName in (a, b)")
        await created(user, group("mesh", "all", full_mesh={}))
        await caught_up(app, tenant_of(a))
        assert (await why(user, "a", "b"))["why"] == "a has not told of any path to b yet"


async def test_ipsec_is_told_with_its_tunnels_and_why_there_is_none(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a, admitted(app, user, "b") as b:
        await select(user, all="ves.io/siteName in (a, b)")
        await created(user, group("mesh", "all", full_mesh={}, tunnel_type="SITE_TO_SITE_TUNNEL_IPSEC"))
        await call(app, user, a, b)
        await a.control.report(Report(boot_id=a.boot_id, ipsec=IpsecAbility(able=True, host="10.0.0.1")))
        await b.control.report(Report(boot_id=b.boot_id, ipsec=IpsecAbility(able=False, reason="NET_ADMIN is missing")))
        await caught_up(app, tenant_of(a))
        await tell(app, a)
        found = await why(user, "a", "b")
        assert (found["path"], found["direct"], found["tunnels"]) == ("", False, ["ipsec"])
        assert found["to_be_direct"] == "the tunnel must be IPsec, and b has no IPsec: NET_ADMIN is missing"
        await b.control.report(Report(boot_id=b.boot_id, ipsec=IpsecAbility(able=True, host="10.0.0.2", port=30500)))
        await caught_up(app, tenant_of(a))
        assert (await why(user, "a", "b"))["no_ipsec"] == ""
        up = IpsecTunnel(node_id="n", up=True, initiator=True, esp="AES_GCM_16-128", spi_in="c0", bytes_in=7)
        flapped = up.model_copy(update={"last_flap": now().timestamp(), "flap_reason": "the peer closed it"})
        await tell(app, a, seen(b, "UP", "ipsec", in_use=True, reason="preferred", ipsec=(flapped,)))
        (link,) = (await why(user, "a", "b"))["paths"]
        (tunnel,) = link["tunnels"]
        assert (link["encap"], tunnel["state"], tunnel["role"]) == ("IPSEC_PKI", "TUNNEL_UP", "TUNNEL_INITIATOR")
        assert (tunnel["esp"]["spi_in"], tunnel["esp"]["bytes_in"]) == ("c0", 7)
        assert tunnel["ike_tunnel_flap_reason"]["flap_reason"] == "the peer closed it"
        never = IpsecTunnel(node_id="n", up=False, flap_reason="received AUTHENTICATION_FAILED error notify")
        await tell(app, a, seen(b, "DOWN", "ipsec", ipsec=(never,)))
        down = await why(user, "a", "b")
        assert down["to_be_direct"] == "the direct path fails (no answer): let a reach the IKE daemon of b"
        (tunnel,) = down["paths"][0]["tunnels"]
        assert (tunnel["state"], tunnel["role"], tunnel["esp"]) == ("TUNNEL_DOWN", "UNKNOWN_TUNNEL_ROLE", None)
        assert tunnel["ike_tunnel_flap_reason"] == {"flap_reason": never.flap_reason, "time": None}


async def test_spokes_hear_why_they_are_not_direct(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "one") as one, admitted(app, user, "two") as two:
        await select(user, hubs="hub", spokes="ves.io/siteName in (one, two)")
        await created(user, group("h", "hubs", hub_mesh={}), spokes("s", "spokes", "h"))
        await call(app, user, one, two)
        assert (await why(user, "one", "two"))["to_be_direct"].startswith("both are spokes of site mesh group s")


async def test_what_is_stale_is_no_evidence(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a, admitted(app, user, "b") as b:
        await call(app, user, a, b)
        await tell(app, a, seen(b, "UP", in_use=True), skew_s=3600.0)
        services = app.state.services
        tenant_id = UUID(tenant_of(a))
        for later, status in ((0, "LINK_STATUS_UP"), (10, "LINK_STATUS_UNKNOWN")):
            observed = await topology.observe(services.database, services.delivery, tenant_id, now() + timedelta(seconds=later))
            (link,) = topology.between(observed, "a", "b").links
            assert link.status == status
        assert "node-1 is silent for 1" in link.stale
        assert link.last_evidence is not None
        assert now() - link.last_evidence > timedelta(minutes=50), "its own clock is an hour ahead, and is corrected"


async def test_the_oddest_of_clocks_breaks_no_answer(app: FastAPI, user: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a") as a, admitted(app, user, "b") as b:
        await call(app, user, a, b)
        for sent_at in (1e300, 1e10, -1.0):
            with pytest.raises(Refused, match="sent_at"):
                await a.control.heartbeat(Heartbeat.model_construct(boot_id=a.boot_id, sequence=1, sent_at=sent_at))
        for odd in (0.0, 9e9):
            await a.report(peers=[PeerHealth(site_id=site_id(b), state="UP", since=odd, last_evidence=0)])
            await a.beat(boot_id=str(odd), sent_at=odd)
            await app.state.services.heartbeats.flush(now())
            assert (await why(user, "a", "b"))["paths"]


@pytest.mark.parametrize(
    ("body", "field"), [({"level": 2}, "level"), ({"group_site_mesh_nodes": True}, "group_site_mesh_nodes"), ({"site": "b"}, "site")]
)
async def test_a_question_that_is_not_answered_is_refused(user: httpx.AsyncClient, body: Json, field: str) -> None:
    answer = await user.post(f"{TOPOLOGY}/site/a", json=body)
    assert (answer.status_code, answer.json()["details"][0]["field"]) == (400, field)


async def test_other_tenants_see_nothing(app: FastAPI, user: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    async with admitted(app, user, "a"), admitted(app, user, "b"):
        await publish(user, "a")
        assert (await stranger.get(f"{TOPOLOGY}/path", params={"from": "a", "to": "b"})).status_code == 404
        assert (await stranger.post(f"{TOPOLOGY}/site/a", json={})).status_code == 404
        assert (await stranger.get(f"{TOPOLOGY}/site_mesh_groups")).json()["nodes"] == []
