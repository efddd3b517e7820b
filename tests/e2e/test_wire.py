"""What can be read on every hop of a whole fabric, and where a node's certificate does not lead."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from agent.control import ControlPlane, Signer
from agent.envoy import names
from agent.envoy.inputs import NodeIdentity
from agent.errors import Refused
from agent.protocol.enrolment import Credentials
from agent.protocol.items import Gateway
from agent.protocol.manifest import ItemBody
from agent.protocol.peering import PEER_AUTHORITY, PEER_HEALTH_PATH
from agent.state import StateDirectory, private_key_pem
from lab.capture import Capture, capture
from lab.fabric import Fabric
from lab.network import can_use_namespaces
from lab.site import GATEWAY_PORT, Edge
from lab.specs import http_loadbalancer, k8s_pool
from lab.wait import until
from tests.e2e.calls import answers
from tests.e2e.gateway_client import client_context, connect, dial, get
from tests.e2e.hub_and_spokes import ECHO, EDGES, FAR, HUB, NEAR, furnish, hub_and_spokes
from tests.e2e.newcomers import Newcomer, newcomer

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(240),
    pytest.mark.root,
    pytest.mark.skipif(not can_use_namespaces(), reason="needs root, iproute2 and the right to make network namespaces"),
]

REFUSED = (ConnectionError, ssl.SSLError, asyncio.IncompleteReadError, TimeoutError)
SECRETS = {place: f"{place}-payload-5b1e7c44" for place in ("path", "header", "body")}
ORIGIN = "orchid"
"""Of a service, a pool and a load balancer that are made while everything is recorded."""
TIMES = 200


@dataclass(frozen=True)
class Recorded:
    """What crossed the wire between sites, and between agents and the control plane."""

    wire: Capture
    to_control_plane: list[bytes]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fabric(show_logs_of: list[Fabric]) -> AsyncIterator[Fabric]:
    async with hub_and_spokes() as fabric:
        show_logs_of.append(fabric)
        await furnish(fabric)
        yield fabric


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def recorded(fabric: Fabric) -> Recorded:
    """Requests and connections over the direct path, a reverse tunnel and an edge, and a change of what sites are told."""
    ways = [way.record() for node in fabric.nodes() for way in node.ways_out]
    with capture(fabric.network) as wire:
        await fabric.site(HUB).cluster.deploy(ORIGIN, ECHO)
        await fabric.api.create("origin_pool", ORIGIN, k8s_pool(ORIGIN, [HUB]))
        created = await fabric.api.create("http_loadbalancer", ORIGIN, http_loadbalancer(f"{ORIGIN}.test", [ORIGIN], [NEAR]))
        await fabric.api.applied("http_loadbalancer", ORIGIN, revision=created["revision"])
        for source, domain in ((NEAR, f"{ORIGIN}.test"), (NEAR, "hub.test"), (NEAR, "far.test"), (HUB, "far.test")):
            client = await answers(fabric, source, domain)
            for _ in range(TIMES):
                answer = await client.post(f"/{SECRETS['path']}", headers={"x-secret": SECRETS["header"]}, content=SECRETS["body"])
                assert SECRETS["body"] in answer.text
        for source, port in ((NEAR, 9001), (NEAR, 9002), (HUB, 9002)):
            reader, writer = await fabric.site(source).connect(port)
            writer.write(SECRETS["body"].encode() * TIMES)
            writer.write_eof()
            assert SECRETS["body"].encode() in await reader.read(-1)
            writer.close()
    return Recorded(wire, [bytes(way) for way in ways])


async def test_the_wire_is_seen_on_every_hop(fabric: Fabric, recorded: Recorded) -> None:
    """In both directions: what was sent is not less than the payload."""
    address = {node.name.removesuffix("-1"): node.place.underlay for node in fabric.nodes()}
    payload = TIMES * len(SECRETS["body"])

    def crossed(a: str, b: str) -> bool:
        return all(sum(map(len, recorded.wire.payloads(*way))) > payload for way in ((address[a], address[b]), (address[b], address[a])))

    assert crossed(NEAR, HUB)
    assert crossed(FAR, HUB)
    assert any(crossed(NEAR, edge) and crossed(FAR, edge) for edge in EDGES)
    assert len(recorded.to_control_plane) == len(fabric.nodes())
    assert all(way for way in recorded.to_control_plane)


@pytest.mark.parametrize("needle", [*SECRETS.values(), ORIGIN, "in-far", "in-hub", "bytes-far", "x-isthmus"])
async def test_no_payload_and_no_name_of_an_origin_is_on_the_wire(recorded: Recorded, needle: str) -> None:
    assert not recorded.wire.holds(needle.encode())
    assert not any(needle.encode() in way for way in recorded.to_control_plane)


# A certificate where it does not belong


def identity(site: Edge) -> tuple[Credentials, NodeIdentity]:
    """Of the first node: what someone has who copied its state directory."""
    state = StateDirectory(site.node.state)
    credentials = state.credentials()
    assert credentials is not None
    key = private_key_pem(state.node_key()).decode()
    about = (credentials.node_id, credentials.node_name, credentials.site_id, credentials.site_name)
    return credentials, NodeIdentity(*about, certificate_pem=credentials.certificate_pem, private_key_pem=key)


async def status(
    fabric: Fabric, at: Edge, shown: NodeIdentity | None, headers: list[tuple[str, str]], directory: Path, port: int
) -> int | None:
    """Of a stream at a gateway, asked for from `near`; None if it does not even speak."""
    server_name = names.relay_server_name(identity(fabric.site(NEAR))[0].tenant_id) if at.name in EDGES else ""
    try:
        dialled = await fabric.site(NEAR).place.dial((at.place.underlay, port))
        async with dial(Gateway(node_id="", host="", port=0), shown, directory, dialled=dialled, server_name=server_name) as client:
            return (await client.ask(headers, ends=headers[0] != (":method", "CONNECT")))[1]
    except REFUSED:
        return None


async def test_wire_a_sites_certificate_opens_what_is_exported_to_it_and_nothing_else(fabric: Fabric, tmp_path: Path) -> None:
    _, shown = identity(fabric.site(NEAR))
    hub = fabric.site(HUB)
    await hub.cluster.deploy("private", ECHO)
    await fabric.api.create("origin_pool", "private", k8s_pool("private", [HUB]))
    created = await fabric.api.create("http_loadbalancer", "private", http_loadbalancer("private.test", ["private"], [HUB]))
    await fabric.api.applied("http_loadbalancer", "private", revision=created["revision"])
    opened = names.export_authority("http", "lab/in-hub")
    assert await status(fabric, hub, shown, connect(opened), tmp_path, GATEWAY_PORT) == 200
    assert await status(fabric, hub, shown, connect(names.export_authority("http", "lab/private")), tmp_path, GATEWAY_PORT) in {403, 404}
    assert await status(fabric, hub, None, connect(opened), tmp_path, GATEWAY_PORT) is None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def theirs(fabric: Fabric) -> Newcomer:
    """A site of another tenant."""
    tenant = await fabric.api.request("POST", "/api/operator/tenants", {"name": "others"})
    headers = {"authorization": f"APIToken {tenant['token']}"}
    body = {"metadata": {"name": "theirs"}, "spec": {"type": "JWT", "site_name": "theirs"}}
    token = (await fabric.api.client.post("/api/register/namespaces/system/tokens", json=body, headers=headers)).json()["spec"]["content"]
    theirs = newcomer(fabric, token, name="theirs-1", site="theirs", at=HUB)
    await theirs.process.start()

    async def online() -> bool:
        theirs.process.check()
        answer = await fabric.api.client.get("/api/config/namespaces/system/sites/theirs", headers=headers)
        return answer.is_success and bool(answer.json()["spec"]["site_state"] == "ONLINE")

    await until(online, "the other tenant's site to be online", within_s=60)
    return theirs


async def test_wire_a_sites_certificate_is_worth_nothing_at_another_tenants_site(fabric: Fabric, theirs: Newcomer, tmp_path: Path) -> None:
    _, shown = identity(fabric.site(NEAR))
    port = int(theirs.process.env["AGENT_GATEWAY_ADDRESS"].rsplit(":", 1)[1])
    health = get(PEER_AUTHORITY, PEER_HEALTH_PATH)
    assert await status(fabric, fabric.site(HUB), shown, health, tmp_path, GATEWAY_PORT) == 200
    assert await status(fabric, fabric.site(HUB), shown, health, tmp_path, port) is None
    credentials = StateDirectory(theirs.state).credentials()
    assert credentials is not None
    for edge in EDGES:
        assert await status(fabric, fabric.edge(edge), shown, connect(credentials.site_id), tmp_path, GATEWAY_PORT) == 403


@pytest.mark.parametrize("claims_tenant", [True, False])
async def test_wire_nobody_holds_the_tunnel_of_another_site(fabric: Fabric, tmp_path: Path, *, claims_tenant: bool) -> None:
    """`near` says at an edge that it is `far`, with its own certificate."""
    mine, shown = identity(fabric.site(NEAR))
    other = identity(fabric.site(FAR))[0]
    assert await _handshake(fabric, mine, mine, shown, tmp_path) == 200
    claimed = other if claims_tenant else other.model_copy(update={"tenant_id": "0b000000-0000-4000-8000-000000000002"})
    assert await _handshake(fabric, claimed, mine, shown, tmp_path) in {401, 403, None}


async def _handshake(fabric: Fabric, claimed: Credentials, mine: Credentials, shown: NodeIdentity, directory: Path) -> int | None:
    """The status of a reverse tunnel's handshake at an edge; None if there was no answer."""
    lines = {
        "node": f"{claimed.node_id}.{claimed.site_id}.{claimed.tenant_id}.{claimed.trust_domain}",
        "cluster": f"CN={claimed.site_id}",
        "tenant": claimed.tenant_id,
    }
    head = "".join(f"x-envoy-reverse-tunnel-{name}-id: {value}\r\n" for name, value in lines.items())
    try:
        async with asyncio.timeout(5):
            dialled = await fabric.site(NEAR).place.dial((fabric.edge(EDGES[0]).place.underlay, GATEWAY_PORT))
            server_name = names.tunnels_server_name(mine.tenant_id)
            reader, writer = await asyncio.open_connection(sock=dialled, ssl=client_context(shown, directory), server_hostname=server_name)
            writer.write(f"GET /reverse_connections/request HTTP/1.1\r\nhost: e\r\n{head}\r\n".encode())
            answered = await reader.readline()
            writer.close()
            return int(answered.split()[1]) if answered else None
    except REFUSED:
        return None


async def test_wire_the_agents_api_believes_a_node_only_with_its_own_key(fabric: Fabric) -> None:
    mine, _ = identity(fabric.site(NEAR))
    other, _ = identity(fabric.site(FAR))
    key = StateDirectory(fabric.site(NEAR).node.state).node_key()
    control = ControlPlane((fabric.replicas[0].url,), mine.control_plane_anchor_pem or fabric.replicas[0].ca.read_text())
    try:
        control.signer = Signer(mine.node_id, key)
        assert (await control.manifest(None, wait=False)).hash
        control.signer = Signer(other.node_id, key)
        with pytest.raises(Refused):
            await control.manifest(None, wait=False)
    finally:
        await control.close()


async def _items(control: ControlPlane, hashes: list[str]) -> tuple[ItemBody, ...]:
    """What it gets; to be refused is to get nothing."""
    try:
        return await control.items(hashes)
    except Refused:
        return ()


async def test_wire_a_node_gets_nothing_of_another_tenant(fabric: Fabric, theirs: Newcomer) -> None:
    """Even if it knows the hashes of its items."""
    mine = identity(fabric.site(NEAR))[0]
    other = StateDirectory(theirs.state)
    credentials = other.credentials()
    assert credentials is not None
    anchor = fabric.replicas[0].ca.read_text()
    control, spy = (ControlPlane((fabric.replicas[0].url,), anchor) for _ in range(2))
    try:
        control.signer = Signer(mine.node_id, StateDirectory(fabric.site(NEAR).node.state).node_key())
        spy.signer = Signer(credentials.node_id, other.node_key())
        known = {entry.hash for entry in (await spy.manifest(None, wait=False)).entries}
        foreign = [entry.hash for entry in (await control.manifest(None, wait=False)).entries if entry.hash not in known]
        assert {item.hash for item in await control.items(foreign)} == set(foreign)
        assert await _items(spy, foreign) == ()
    finally:
        await control.close()
        await spy.close()
