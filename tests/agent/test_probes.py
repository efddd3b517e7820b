"""Peers asked over several paths, through a socket that stands where Envoy's probe listener would."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from agent.envoy.paths import DIRECT, REVERSE
from agent.paths import ITSELF, Route, Watch
from agent.probes import Probes
from agent.protocol.peering import PEER_DOCUMENT_PATH, PROBE_PATH_HEADER, ExportState, PeerDocument
from agent.tunnels import Tunnels
from tests.agent.real_envoy import until

WATCH = Watch(Route((DIRECT, REVERSE, "e1")))


def document(node: str = "n9", site: str = "there", **said: object) -> PeerDocument:
    given = {"healthy": 4, **said}
    exports = (ExportState(pool="n/p", healthy=int(str(given.pop("healthy")))),)
    return PeerDocument.model_validate({"site_id": site, "node_id": node, "exports": exports, **given})


@dataclass
class Far:
    """What each path answers: a peer's nodes in turn, a status, or an agent that is away behind a gateway that is not."""

    socket: Path
    paths: dict[str, list[PeerDocument] | int | None] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    async def start(self) -> None:
        self.server = await asyncio.start_unix_server(self._serve, self.socket)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while request := (await _request(reader)):
            target, path = request
            self.asked.append(path)
            status, body = self._answer(target, path)
            writer.write(f"HTTP/1.1 {status} x\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
        writer.close()

    def _answer(self, target: str, path: str) -> tuple[int, str]:
        match self.paths.get(path, 404):
            case int(status):
                return status, "no"
            case [first, *rest]:
                self.paths[path] = [*rest, first]
                return 200, first.model_dump_json()
            case _:
                return (503, "agent away") if target == PEER_DOCUMENT_PATH else (200, "{}")


async def _request(reader: asyncio.StreamReader) -> tuple[str, str] | None:
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    headers = dict(line.split(": ") for line in lines[1:] if line)
    return lines[0].split(" ")[1], headers.get(PROBE_PATH_HEADER, ITSELF)


@pytest.fixture
async def far(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Far]:
    for name, value in (("PROBE_EVERY_S", 0.02), ("PROBES_PER_S", 1000), ("_SOON_S", 0.005), ("_CALLER_EVERY_S", 0.02)):
        monkeypatch.setattr(f"agent.probes.{name}", value)
    far = Far(run_dir / "probe.sock", {DIRECT: [document()], REVERSE: 503, "e1": [document()]})
    await far.start()
    yield far
    far.server.close()


@pytest.fixture
def changes() -> list[int]:
    return []


@pytest.fixture
async def probes(run_dir: Path, changes: list[int]) -> AsyncIterator[Probes]:
    probes = Probes(run_dir / "probe.sock", lambda: changes.append(1))
    yield probes
    await probes.close()


def states(probes: Probes) -> dict[str, str]:
    return {it.path: it.state for it in probes.health(lambda *_: "")}


def in_use(probes: Probes) -> list[str]:
    return [it.path for it in probes.health(lambda *_: "") if it.in_use]


async def test_a_peer_that_answers_is_up_with_what_it_exports(far: Far, probes: Probes, changes: list[int]) -> None:
    probes.watch({"there": WATCH})
    assert probes.views["there"].reachable is None
    await until(lambda: states(probes) == {DIRECT: "UP", "e1": "UP"})
    view = probes.views["there"]
    assert (view.reachable, view.exports, view.paths) == (True, {"n/p": 4}, {DIRECT: True, REVERSE: False, "e1": True})
    direct, _ = probes.health(lambda site, path: f"TLSv1.3 {site} {path}" + 1000 * "x")
    assert (direct.error, direct.in_use, direct.reason) == ("", True, "preferred")
    assert direct.tls.startswith("TLSv1.3 there direct")
    assert len(direct.tls) == 200
    assert direct.rtt_ms is not None
    before = len(changes)
    far.paths = {DIRECT: [document(healthy=0)], "e1": [document(healthy=0)]}
    await until(lambda: probes.views["there"].exports == {"n/p": 0})
    assert len(changes) == before + 1, "only what is different is told"


async def test_when_direct_fails_the_edge_is_used_and_the_reason_said(far: Far, probes: Probes) -> None:
    probes.watch({"there": WATCH})
    await until(lambda: states(probes) == {DIRECT: "UP", "e1": "UP"})
    far.paths[DIRECT] = 503
    await until(lambda: in_use(probes) == ["e1"])
    assert probes.views["there"].paths[DIRECT] is False
    (used,) = (it for it in probes.health(lambda *_: "") if it.in_use)
    assert used.reason.startswith("direct is down: 503 no")
    far.paths[DIRECT] = [document()]
    await until(lambda: in_use(probes) == [DIRECT])


async def test_the_way_that_a_peer_opens_is_asked_only_when_it_is_needed(far: Far, probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.paths.REST_S", 0.1)
    probes.watch({"there": WATCH})
    await until(lambda: far.asked.count(DIRECT) > 3)
    assert REVERSE not in far.asked
    far.paths |= {DIRECT: 503, REVERSE: [document()]}
    await until(lambda: in_use(probes) == [REVERSE])
    far.paths[DIRECT] = [document()]
    await until(lambda: in_use(probes) == [DIRECT])
    assert states(probes)[REVERSE] == "UP", "the peer keeps it for a while"
    far.paths |= {DIRECT: 503}
    await until(lambda: in_use(probes) == ["e1"])
    assert states(probes)[REVERSE] != "DOWN", "but it has to prove itself anew"
    far.paths[DIRECT] = [document()]
    await until(lambda: in_use(probes) == [DIRECT])
    far.paths[REVERSE] = 503
    await until(lambda: REVERSE not in states(probes))


async def test_a_peer_that_cannot_reach_us_is_told_apart(far: Far, probes: Probes) -> None:
    far.paths[DIRECT] = [document(reaches_you=False)]
    probes.watch({"there": replace(WATCH, route=Route((DIRECT,)), called=False), "nowhere": Watch(Route((REVERSE,)))})
    await until(lambda: probes.dials == {"there"})
    assert (probes.reaches("nowhere"), probes.reaches("there"), probes.reaches("stranger")) == (False, None, None)
    probes.watch({"there": WATCH})
    await until(lambda: probes.reaches("there"))
    far.paths[DIRECT] = 503
    await until(lambda: probes.reaches("there") is False)
    assert probes.dials == {"there"}
    probes.watch({"there": Watch(Route(("e1",)), meshed=False)})
    assert (probes.dials, probes.reaches("there")) == (frozenset(), None)


async def test_a_restarted_agent_keeps_dialling_until_it_knows_better(far: Far, run_dir: Path) -> None:
    probes = Probes(run_dir / "probe.sock", lambda: None, dials=["there", "gone"])
    assert probes.dials == frozenset()
    probes.watch({"there": WATCH})
    assert probes.dials == {"there"}
    await probes.close()


async def test_a_restarted_agent_uses_the_paths_that_were_used(far: Far, run_dir: Path) -> None:
    far.paths = {}
    left = {"there": {DIRECT: False, REVERSE: True, "e1": True}}
    probes = Probes(run_dir / "probe.sock", lambda: None, paths=left)
    probes.watch({"there": WATCH})
    assert probes.views["there"].paths == {DIRECT: False, REVERSE: True}
    far.paths = {DIRECT: [document()], REVERSE: [document()]}
    await until(lambda: in_use(probes) == [DIRECT])
    await probes.close()


async def test_a_peer_that_is_to_dial_is_awaited_for_a_while(far: Far, probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    far.paths = {REVERSE: 503}
    probes.watch({"there": Watch(Route((REVERSE,)))})
    assert probes.views["there"].paths == {REVERSE: True}
    assert not probes.settled
    await until(lambda: probes.views["there"].paths == {REVERSE: False})
    assert not probes.settled
    far.paths = {REVERSE: [document()]}
    await until(lambda: probes.settled)
    far.paths = {REVERSE: 503}
    await until(lambda: not probes.settled)
    monkeypatch.setattr("agent.probes._AWAITED_S", 0.0)
    assert probes.settled


async def test_nodes_of_a_peer_that_differ_do_not_make_its_exports_flap(far: Far, probes: Probes, changes: list[int]) -> None:
    far.paths[DIRECT] = [document("n1", healthy=4), document("n2", healthy=0), document("n3", healthy=2)]
    probes.watch({"there": replace(WATCH, route=Route((DIRECT,)))})
    await until(lambda: far.asked.count(DIRECT) > 4)
    assert probes.views["there"].exports == {"n/p": 4}
    before = len(changes)
    await until(lambda: far.asked.count(DIRECT) > 20)
    assert len(changes) == before
    far.paths[DIRECT] = [document(node, healthy=0) for node in ("n1", "n2", "n3")]
    await until(lambda: probes.views["there"].exports == {"n/p": 0})


async def test_a_peer_drains_when_all_its_nodes_do_or_it_is_told_to(far: Far, probes: Probes) -> None:
    far.paths[DIRECT] = [document("n1", draining=True), document("n2")]
    watch = replace(WATCH, route=Route((DIRECT,)))
    probes.watch({"there": watch})
    await until(lambda: far.asked.count(DIRECT) > 4)
    assert probes.draining == frozenset()
    far.paths[DIRECT] = [document(node, draining=True) for node in ("n1", "n2")]
    await until(lambda: probes.draining == {"there"})
    probes.watch({"there": replace(watch, draining=True)})
    assert probes.draining == {"there"}


async def test_somebody_else_in_the_peers_place_is_not_believed(far: Far, probes: Probes) -> None:
    far.paths[DIRECT] = [document(site="impostor")]
    probes.watch({"there": replace(WATCH, route=Route((DIRECT,)))})
    await until(lambda: probes.views["there"].reachable is False)
    assert "impostor" in probes.health(lambda *_: "")[0].error
    assert probes.views["there"].exports == {}


async def test_a_peer_whose_agent_is_away_keeps_what_it_exported(far: Far, probes: Probes) -> None:
    probes.watch({"there": WATCH})
    await until(lambda: states(probes).get("e1") == "UP")
    far.paths |= {DIRECT: None, "e1": None}
    await until(lambda: all(it.error for it in probes.health(lambda *_: "")))
    assert probes.views["there"].reachable
    assert probes.views["there"].exports == {"n/p": 4}


async def test_what_our_own_envoy_cannot_ask_says_nothing_about_a_peer(far: Far, probes: Probes, run_dir: Path) -> None:
    probes.watch({"there": WATCH, "unheard of": Watch(Route(("e9",)))})
    await until(lambda: far.asked.count("e9") > 3)
    assert probes.views["unheard of"].reachable is None
    gone = Probes(run_dir / "gone.sock", lambda: None)
    gone.watch({"there": WATCH})
    await until(lambda: DIRECT in in_use(probes))
    assert gone.views["there"].reachable is None
    await gone.close()


async def test_paths_that_are_silent_keep_no_other_waiting(probes: Probes, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.probes._MOST_PATIENCE_S", 60.0)
    waiting: list[bytes] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting.append(await reader.readuntil(b"\r\n\r\n"))
        await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(silent, run_dir / "probe.sock", backlog=200):
        probes.watch({f"silent-{number}": Watch(Route((DIRECT,))) for number in range(150)})
        await until(lambda: len(waiting) == 150)
        assert all(health.state != "DOWN" for health in probes.health(lambda *_: ""))
        await probes.close()


async def test_an_answer_that_never_ends_is_an_error(far: Far, probes: Probes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.probes._DOCUMENT_BYTES", 50)
    probes.watch({"there": replace(WATCH, route=Route((DIRECT,)))})
    await until(lambda: probes.health(lambda *_: "")[0].error)
    assert "too long" in probes.health(lambda *_: "")[0].error


async def test_peers_that_are_not_used_any_more_are_left_alone(far: Far, probes: Probes) -> None:
    probes.watch({"there": WATCH, "elsewhere": WATCH})
    await until(lambda: probes.views["there"].reachable)
    probes.watch({"elsewhere": WATCH})
    assert set(probes.views) == {"elsewhere"}
    probes.watch({})
    assert probes.health(lambda *_: "") == ()


async def test_an_edge_is_asked_itself_and_shown_with_its_tunnels(far: Far, probes: Probes) -> None:
    far.paths[ITSELF] = [document(site="edge")]
    probes.watch({"edge": Watch(Route((ITSELF,)), meshed=False)})
    await until(lambda: probes.views["edge"].reachable)
    (edge,) = probes.edge_health({"edge": Tunnels(3, 12.0)}, lambda *_: "TLSv1.3")
    assert (edge.state, edge.tunnels, edge.since, edge.tls) == ("UP", 3, 12.0, "TLSv1.3")
    assert edge.rtt_ms is not None
    assert probes.edge_health({"edge": Tunnels(0, 12.0)}, lambda *_: "")[0].state == "DOWN"
    assert probes.edge_health({}, lambda *_: "")[0].state == "UNKNOWN"
