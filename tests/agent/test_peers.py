"""The document that sites ask each other for, over real sockets."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from agent.envoy.inputs import AgentSnapshot, Item, ItemId, NodeIdentity
from agent.peers import Exports, PeerServer, Probe, bucketed
from agent.protocol.base import Body
from agent.protocol.items import Export, ExportUse, ItemKind
from agent.protocol.peering import PEER_DOCUMENT_PATH, PEER_HEALTH_PATH, ExportState, PeerDocument
from tests.agent.real_envoy import until
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


def export(key: str, *peers: str) -> Item:
    use = ExportUse(load_balancer="n/lb", protocol="http", peers=peers)
    return item(ItemKind.EXPORT, key, Export(pool=key, uses=(use,)))


@pytest.fixture
async def served(run_dir: Path) -> AsyncIterator[dict[str, int]]:
    """Healthy endpoints by pool, to be changed at will; the server stands where Envoy's probe listener would."""
    healthy = {"n/p": 3, "n/secret": 1}
    snapshot = AgentSnapshot.of(
        [item(ItemKind.SITE, "here", SITE), item(ItemKind.ORIGIN_POOL, "n/p", pool()), export("n/p", "there"), export("n/secret", "other")]
    )
    exports = Exports(NODE, lambda: snapshot, lambda: "hash", lambda pool: healthy.get(pool, 0))
    server = PeerServer(run_dir / "peers.sock", exports.document)
    await server.start()
    yield healthy
    await server.stop()


@pytest.fixture
async def http(run_dir: Path) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.AsyncHTTPTransport(uds=str(run_dir / "peers.sock"))
    async with httpx.AsyncClient(transport=transport, base_url="http://peers.isthmus") as http:
        yield http


async def test_a_peer_sees_the_exports_that_it_may_use_and_no_others(served: dict[str, int], http: httpx.AsyncClient) -> None:
    for _ in range(2):
        answer = await http.get(PEER_DOCUMENT_PATH, headers={"x-isthmus-peer": THERE})
        document = PeerDocument.model_validate_json(answer.content)
        assert document.exports == (ExportState(pool="n/p", healthy=2),)
    assert (document.site_id, document.node_id, document.manifest_hash) == ("here", "n1", "hash")


async def test_nobody_in_particular_sees_nothing(served: dict[str, int], http: httpx.AsyncClient) -> None:
    assert (await http.get(PEER_DOCUMENT_PATH)).status_code == 404
    assert (await http.get("/", headers={"x-isthmus-peer": THERE})).status_code == 404
    assert (await http.get(PEER_HEALTH_PATH)).status_code == 200
    answer = await http.get(PEER_DOCUMENT_PATH, headers={"x-isthmus-peer": "there"})
    assert PeerDocument.model_validate_json(answer.content).exports == ()


async def test_a_body_is_read_past(served: dict[str, int], http: httpx.AsyncClient) -> None:
    assert (await http.post(PEER_HEALTH_PATH, content=b"x" * 200_000)).status_code == 200
    assert (await http.get(PEER_HEALTH_PATH)).status_code == 200


class Far:
    """A peer, as the probe listener of this node shows it."""

    def __init__(self, run_dir: Path) -> None:
        self.healthy = 4
        self.site = "there"
        self.server = PeerServer(run_dir / "probe.sock", self._document)

    def _document(self, asker: str) -> PeerDocument:
        return PeerDocument(
            site_id=self.site, node_id="n9", now=0.0, manifest_hash=None, exports=(ExportState(pool="n/p", healthy=self.healthy),)
        )


@pytest.fixture
async def far(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Far]:
    monkeypatch.setattr("agent.peers.PROBE_EVERY_S", 0.02)
    monkeypatch.setattr("agent.peers.PROBES_PER_S", 1000)
    far = Far(run_dir)
    await far.server.start()
    yield far
    await far.server.stop()


@pytest.fixture
async def probe(run_dir: Path, changes: list[int]) -> AsyncIterator[Probe]:
    probe = Probe(run_dir / "probe.sock", lambda: changes.append(1))
    probe._http.headers["x-isthmus-peer"] = "spiffe://td/tenant/t/site/here/node/n1"
    yield probe
    await probe.close()


@pytest.fixture
def changes() -> list[int]:
    return []


async def test_a_peer_that_answers_is_up_with_what_it_exports(far: Far, probe: Probe, changes: list[int]) -> None:
    probe.watch(["there"])
    assert probe.views["there"].reachable is None
    await until(lambda: probe.views["there"].reachable)
    assert probe.views["there"].exports == {"n/p": 4}
    (health,) = probe.health
    assert (health.state, health.error) == ("UP", "")
    assert health.rtt_ms is not None
    far.healthy = 0
    await until(lambda: probe.views["there"].exports == {"n/p": 0})
    assert len(changes) == 2, "only what is different is told"


async def test_somebody_else_in_the_peers_place_is_not_believed(far: Far, probe: Probe) -> None:
    far.site = "impostor"
    probe.watch(["there"])
    await until(lambda: probe.views["there"].reachable is False)
    assert "impostor" in probe.health[0].error


async def test_a_peer_whose_agent_is_away_keeps_what_it_exported(far: Far, probe: Probe) -> None:
    probe.watch(["there"])
    await until(lambda: probe.views["there"].reachable)
    probe._http.headers.pop("x-isthmus-peer")  # the document is not there, while the gateway answers
    await until(lambda: probe.health[0].error)
    assert probe.views["there"].reachable
    assert probe.views["there"].exports == {"n/p": 4}


async def test_our_own_envoy_being_away_says_nothing_about_a_peer(far: Far, probe: Probe, run_dir: Path) -> None:
    probe.watch(["there"])
    await until(lambda: probe.views["there"].reachable)
    since = probe.health[0].since
    await probe._http.aclose()
    gone = Probe(run_dir / "gone.sock", lambda: None)
    gone.watch(["there"])
    path = await gone._ask("there", gone._paths["there"])
    assert path == gone._paths["there"]
    await gone.close()
    assert probe.health[0].since == since


async def test_peers_that_are_not_used_any_more_are_left_alone(far: Far, probe: Probe) -> None:
    probe.watch(["there", "elsewhere"])
    await until(lambda: probe.views["there"].reachable)
    probe.watch(["elsewhere"])
    assert set(probe.views) == {"elsewhere"}
    probe.watch([])
    assert probe.health == ()
