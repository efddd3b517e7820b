"""The document that sites ask each other for, over real sockets."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from agent.envoy.inputs import AgentSnapshot, Item, ItemId, NodeIdentity
from agent.peers import Asker, Exports, PeerServer, bucketed
from agent.protocol.base import Body
from agent.protocol.items import Export, ExportUse, ItemKind
from agent.protocol.peering import PEER_DOCUMENT_PATH, PEER_HEALTH_PATH, ExportState, PeerDocument
from tests.agent.wanted import SITE, pool

NODE = NodeIdentity("n1", "a-1", "here", "a", certificate_pem="", private_key_pem="")
THERE = "spiffe://td/tenant/t/site/there/node/n9"


@pytest.mark.parametrize(
    ("healthy", "before", "after"),
    [(0, 0, 0), (1, 0, 1), (7, 0, 4), (8, 4, 8), (7, 8, 8), (6, 8, 8), (5, 8, 4), (3, 4, 4), (1, 2, 1), (0, 8, 0)],
)
def test_counts_are_powers_of_two_that_are_left_slowly(healthy: int, before: int, after: int) -> None:
    assert bucketed(healthy, before) == after


def item(kind: ItemKind, key: str, body: Body) -> Item:
    return Item(ItemId(kind, key), key, body)


def export(key: str, *peers: str, edges: tuple[str, ...] = ()) -> Item:
    use = ExportUse(load_balancer="n/lb", protocol="http", peers=peers, edges=edges)
    return item(ItemKind.EXPORT, key, Export(pool=key, uses=(use,)))


@pytest.fixture
async def served(run_dir: Path) -> AsyncIterator[dict[str, int]]:
    """Healthy endpoints by pool, to be changed at will; the server stands where Envoy's probe listener would."""
    healthy = {"n/p": 3, "n/secret": 1}
    snapshot = AgentSnapshot.of(
        [
            item(ItemKind.SITE, "here", SITE),
            item(ItemKind.ORIGIN_POOL, "n/p", pool()),
            export("n/p", "there"),
            export("n/secret", "other", edges=("edge",)),
        ]
    )
    exports = Exports(NODE, lambda: snapshot, lambda pool: healthy.get(pool, 0), {"there": False}.get)
    server = PeerServer(run_dir / "peers.sock", exports.document)
    await server.start()
    yield healthy
    await server.stop()


@pytest.fixture
async def http(run_dir: Path) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.AsyncHTTPTransport(uds=str(run_dir / "peers.sock"))
    async with httpx2.AsyncClient(transport=transport, base_url="http://peers.isthmus") as http:
        yield http


async def test_a_peer_sees_the_exports_that_it_may_use_and_no_others(served: dict[str, int], http: httpx2.AsyncClient) -> None:
    for _ in range(2):
        answer = await http.get(PEER_DOCUMENT_PATH, headers={"x-isthmus-peer": THERE})
        document = PeerDocument.model_validate_json(answer.content)
        assert document.exports == (ExportState(pool="n/p", healthy=2),)
    assert (document.site_id, document.node_id) == ("here", "n1")
    assert (document.reaches_you, document.draining) == (False, False)


@pytest.mark.parametrize(
    ("uri", "pools"),
    [
        ("spiffe://td/tenant/edges/site/edge/node/n", ["n/secret"]),
        ("spiffe://td/tenant/t/site/edge/node/n", []),
        ("spiffe://td/tenant/edges/site/there/node/n", []),
    ],
)
async def test_a_regional_edge_sees_what_is_advertised_there(
    served: dict[str, int], http: httpx2.AsyncClient, uri: str, pools: list[str]
) -> None:
    answer = await http.get(PEER_DOCUMENT_PATH, headers={"x-isthmus-peer": uri})
    assert [export.pool for export in PeerDocument.model_validate_json(answer.content).exports] == pools


def test_who_asks_is_read_from_the_certificate() -> None:
    assert Asker.of(THERE) == ("t", "there")
    assert Asker.of("there") == ("", "")


async def test_nobody_in_particular_sees_nothing(served: dict[str, int], http: httpx2.AsyncClient) -> None:
    assert (await http.get(PEER_DOCUMENT_PATH)).status_code == 404
    assert (await http.get("/", headers={"x-isthmus-peer": THERE})).status_code == 404
    assert (await http.get(PEER_HEALTH_PATH)).status_code == 200
    answer = await http.get(PEER_DOCUMENT_PATH, headers={"x-isthmus-peer": "there"})
    assert PeerDocument.model_validate_json(answer.content).exports == ()


async def test_a_body_is_read_past(served: dict[str, int], http: httpx2.AsyncClient) -> None:
    assert (await http.post(PEER_HEALTH_PATH, content=b"x" * 200_000)).status_code == 200
    assert (await http.get(PEER_HEALTH_PATH)).status_code == 200
