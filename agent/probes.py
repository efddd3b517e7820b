"""Asks peers, over every path that leads to them, for what they say of themselves: which path is used and which exports are healthy follows."""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as FilePath
from random import uniform
from typing import NoReturn

import httpx2
from pydantic import ValidationError

from agent.envoy.inputs import PeerView
from agent.envoy.paths import DIRECT, IPSEC, REVERSE
from agent.paths import ITSELF, Choice, Dialling, Instant, Path, Watch, choose, settled, unproven
from agent.protocol.peering import PEER_DOCUMENT_PATH, PEER_HEALTH_PATH, PROBE_PATH_HEADER, PeerDocument
from agent.protocol.report import EdgeHealth, IpsecTunnel, PeerHealth
from agent.tasks import lasting
from agent.tunnels import Tunnels

PROBE_EVERY_S = 1.0
"""Paths that are in use or down; those that stand by are asked half as often."""
PROBES_PER_S = 100
"""Of all paths together; with more of them, each is asked less often."""
_CALLER_EVERY_S = 5.0
"""Peers that only call this site."""
_SOON_S = 0.2
"""After a first failure, and after news from one of a peer's nodes."""
_LEAST_PATIENCE_S, _MOST_PATIENCE_S = 0.75, 1.5
_PATIENCE_RTTS = 8
_AWAITED_S = 10.0
_NODE_FORGOTTEN_S = 15.0
"""After which a node of a peer that was not heard of counts no more."""
_ERROR_LENGTH = 200
_REASON_LENGTH = 500
_TLS_LENGTH = 200
_MOST_NODES = 64
_DOCUMENT_BYTES = 8 << 20
_OK = 200
_NOT_THERE_YET = 404
"""Of our own Envoy, which has not heard of the path."""


class _Silent(Exception):
    """The peer, or an Envoy on the way, answers with an error."""


class _Unknowable(Exception):
    """Our own Envoy cannot ask, which says nothing about the peer."""


def _now() -> Instant:
    return Instant(time.monotonic(), time.time())


@dataclass
class _Peer:
    """What is known of one peer."""

    site: str
    watch: Watch
    dialling: Dialling
    remembered: Mapping[str, bool] = field(default_factory=dict)
    """Paths that an earlier agent used, or not."""
    began: float = field(default_factory=time.monotonic)
    paths: dict[str, Path] = field(default_factory=dict)
    tasks: dict[str, "asyncio.Task[NoReturn]"] = field(default_factory=dict)
    documents: dict[str, tuple[PeerDocument, float]] = field(default_factory=dict)
    """By node of the peer, with the steady time."""
    news: int = 0
    """Nodes that are to be asked soon, since one of them said something new."""
    told: object = None
    choice: Choice = field(init=False)
    view: PeerView = field(init=False)

    def __post_init__(self) -> None:
        self.follow(self.watch)
        self.has_news()

    def follow(self, watch: Watch) -> None:
        self.watch = watch
        self.paths = {name: self.paths.get(name) or self._new(name) for name in watch.route.paths}
        self.judge(_now())

    def _new(self, name: str) -> Path:
        """As an earlier agent found it; otherwise it is tried, but for one that has to be built first, or that the peer has no reason to open."""
        tried = self.remembered.get(name, name != IPSEC and (name != REVERSE or DIRECT not in self.watch.route.paths))
        return Path(time.time()) if tried else unproven(time.time())

    def learn(self, name: str, path: Path) -> None:
        fell = path.state == "DOWN" != self.paths[name].state
        self.paths[name] = path
        if name == DIRECT and fell and REVERSE in self.paths:
            self.paths[REVERSE] = unproven(path.since)  # it takes the same link, and what is known of it was so before

    def judge(self, now: Instant) -> None:
        self.paths = settled(self.watch.route, self.paths, now)
        self.choice = choose(self.watch.route, self.paths, now)
        self.view = PeerView(self._reachable(), self._exports(now), self.choice.usable)

    def _reachable(self) -> bool | None:
        if any(path.leads for path in self.paths.values()):
            return True
        undecided = any(path.state == "UNKNOWN" and not path.rests for path in self.paths.values())
        return None if undecided else False

    def _exports(self, now: Instant) -> dict[str, int]:
        """The peer's nodes may differ for a moment, or because one of them sees less: what any of them serves is served."""
        said = list(self.documents.items())
        self.documents = dict(it for it in said[-_MOST_NODES:] if now.steady - it[1][1] < _NODE_FORGOTTEN_S) or dict(said[-1:])
        exports: dict[str, int] = {}
        for document, _ in self.documents.values():
            for export in document.exports:
                exports[export.pool] = max(export.healthy, exports.get(export.pool, 0))
        return dict(sorted(exports.items()))

    def heard(self, document: PeerDocument, now: Instant) -> None:
        before = self.documents.pop(document.node_id, None)
        self.documents[document.node_id] = (document, now.steady)
        if before is not None and before[0].exports != document.exports:
            self.news = len(self.documents) - 1
        elif self.news:
            self.news -= 1
        self.dialling = self.dialling.told(document.reaches_you, now)

    def has_news(self) -> bool:
        """Whether anything is different from the last time that this was asked."""
        before, self.told = self.told, (self.view, self.dialling.dials, self.draining)
        return before != self.told

    @property
    def draining(self) -> bool:
        said = [document.draining for document, _ in self.documents.values()]
        return self.watch.draining or (bool(said) and all(said))

    @property
    def has_said(self) -> bool:
        """Whether the peer reaches this site."""
        return any(document.reaches_you is not None for document, _ in self.documents.values())

    @property
    def awaited(self) -> bool:
        """Whether there is no way yet, and one may well come soon: the peer may just have heard that it is to dial."""
        young = time.monotonic() - self.began < _AWAITED_S
        return (
            young
            and self.watch.called
            and bool(self.paths)
            and not any(path.leads for path in self.paths.values())
            and DIRECT not in self.paths
        )

    @property
    def needs_reverse(self) -> bool:
        """Whether the peer has a reason to dial, or still does."""
        direct = self.paths.get(DIRECT)
        return direct is None or direct.rests or self.paths[REVERSE].state == "UP"

    def pause_s(self, name: str, failed_first: bool) -> float:
        if failed_first or self.news:
            return _SOON_S
        if not self.watch.called and self.has_said:
            return _CALLER_EVERY_S
        stands_by = self.paths[name].leads and name != self.choice.in_use
        return PROBE_EVERY_S * (2 if stands_by else 1)


class Probes:
    """Asks every watched peer; `changed` is called when what is known is different.

    `dials` and `paths` are what an earlier agent left in `dials` and the views, and hold until this one knows better.
    """

    def __init__(
        self,
        socket: FilePath,
        changed: Callable[[], None],
        dials: Iterable[str] = (),
        paths: Mapping[str, Mapping[str, bool]] | None = None,
    ) -> None:
        self._changed = changed
        self._remembered = dict(paths or {})
        self._peers: dict[str, _Peer] = {}
        self._dials = frozenset(dials)
        unbounded = httpx2.Limits(max_connections=None, max_keepalive_connections=None)  # a path that is silent keeps none waiting
        transport = httpx2.AsyncHTTPTransport(uds=str(socket), verify=False, limits=unbounded)
        self._http = httpx2.AsyncClient(transport=transport, trust_env=False)

    def watch(self, peers: Mapping[str, Watch]) -> None:
        """Probe exactly these from now on."""
        for site in self._peers.keys() - peers.keys():
            for task in self._peers.pop(site).tasks.values():
                task.cancel()
        for site, watch in peers.items():
            if site not in self._peers:
                self._peers[site] = _Peer(site, watch, Dialling(site in self._dials), self._remembered.pop(site, {}))
            elif self._peers[site].watch != watch:
                self._peers[site].follow(watch)
            self._follow_paths(self._peers[site])
        self._dials = self.dials

    def _follow_paths(self, peer: _Peer) -> None:
        for name in peer.tasks.keys() - peer.paths.keys():
            peer.tasks.pop(name).cancel()
        for name in peer.paths.keys() - peer.tasks.keys():
            peer.tasks[name] = lasting(partial(self._follow, peer, name), f"probe {peer.site} {name}")

    @property
    def views(self) -> Mapping[str, PeerView]:
        return {site: peer.view for site, peer in sorted(self._peers.items())}

    @property
    def settled(self) -> bool:
        return not any(peer.awaited for peer in self._peers.values())

    @property
    def draining(self) -> frozenset[str]:
        return frozenset(site for site, peer in self._peers.items() if peer.draining)

    @property
    def dials(self) -> frozenset[str]:
        """Peers that cannot reach this site, while it may reach them."""
        return frozenset(site for site, peer in self._peers.items() if peer.dialling.dials and DIRECT in peer.paths)

    def reaches(self, site: str) -> bool | None:
        """Whether this node can dial that one; None if it does not need to, or does not know yet."""
        peer = self._peers.get(site)
        if peer is None or not (peer.watch.called and peer.watch.meshed):
            return None
        direct = peer.paths.get(DIRECT)
        if direct is None:
            return False
        return None if direct.state == "UNKNOWN" else direct.leads

    def health(
        self, tls: Callable[[str, str], str], ipsec: Callable[[str], tuple[IpsecTunnel, ...]] = lambda _: ()
    ) -> tuple[PeerHealth, ...]:
        """`tls` tells the encryption of a path to a site, as far as it is known; `ipsec` the IPsec tunnels to one."""
        now = _now()
        return tuple(health for _, peer in sorted(self._peers.items()) for health in _health(peer, tls, ipsec, now))

    def edge_health(self, tunnels: Mapping[str, Tunnels], tls: Callable[[str, str], str]) -> tuple[EdgeHealth, ...]:
        """Of watched regional edges: whether there are tunnels, and how long it takes to ask."""
        peers = sorted(self._peers.items())
        return tuple(_edge_health(site, peer.paths[ITSELF], tunnels.get(site), tls(site, ITSELF)) for site, peer in peers)

    async def close(self) -> None:
        self.watch({})
        await self._http.aclose()

    async def _follow(self, peer: _Peer, name: str) -> NoReturn:
        while True:
            failed_first = await self._probe(peer, name)
            crowd = sum(len(each.tasks) for each in self._peers.values()) * PROBE_EVERY_S / PROBES_PER_S
            await asyncio.sleep(uniform(0.9, 1.1) * max(peer.pause_s(name, failed_first), crowd))

    async def _probe(self, peer: _Peer, name: str) -> bool:
        """Ask once; says whether a path that was up has failed for the first time."""
        before = peer.paths[name]
        if name == REVERSE and not peer.needs_reverse:
            peer.paths[name] = unproven(peer.paths[name].since)
            return False
        with suppress(_Unknowable):
            peer.learn(name, await self._ask(peer, name))
            peer.judge(_now())
        if peer.has_news():
            self._changed()
        return before.state == "UP" and before.good > 0 and not peer.paths[name].good

    async def _ask(self, peer: _Peer, name: str) -> Path:
        began, patience_s = time.monotonic(), _patience_s(peer.paths[name])
        lives = None
        if peer.paths[name].error:
            lives = asyncio.create_task(self._gateway_answers(peer.site, name, patience_s))
        try:
            document = await self._document(peer.site, name, patience_s)
        except (_Silent, httpx2.HTTPError, ValidationError) as error:
            reason = (str(error) or type(error).__name__)[:_ERROR_LENGTH]
            if lives is None and not isinstance(error, httpx2.TimeoutException):
                lives = asyncio.create_task(self._gateway_answers(peer.site, name, patience_s))
            answers = lives is not None and await lives
            path, now = peer.paths[name], _now()
            return path.answered(None, now, reason) if answers else path.failed(reason, now)
        finally:
            if lives is not None:
                lives.cancel()
        path, now = peer.paths[name], _now()
        if document.site_id != peer.site:
            return path.failed(f"answered by site {document.site_id}"[:_ERROR_LENGTH], now)
        peer.heard(document, now)
        return path.answered((now.steady - began) * 1000, now)

    async def _document(self, site: str, path: str, patience_s: float) -> PeerDocument:
        status, content = await self._get(site, path, PEER_DOCUMENT_PATH, patience_s)
        if status != _OK:
            raise _Silent(f"{status} {content[:_ERROR_LENGTH].decode(errors='replace')}")
        return PeerDocument.model_validate_json(content)

    async def _gateway_answers(self, site: str, path: str, patience_s: float) -> bool:
        """Whether the peer's Envoy serves, although its agent does not."""
        try:
            return (await self._get(site, path, PEER_HEALTH_PATH, patience_s))[0] == _OK
        except (_Silent, _Unknowable, httpx2.HTTPError):
            return False

    async def _get(self, site: str, path: str, what: str, patience_s: float) -> tuple[int, bytes]:
        """Status and body."""
        headers = {PROBE_PATH_HEADER: path} if path else {}
        content = b""
        try:
            async with self._http.stream("GET", f"http://{site}{what}", headers=headers, timeout=patience_s) as response:
                async for piece in response.aiter_raw():
                    content += piece
                    if len(content) > _DOCUMENT_BYTES:
                        raise _Silent("the answer is too long")
        except httpx2.ConnectError as error:
            raise _Unknowable from error
        if response.status_code == _NOT_THERE_YET:
            raise _Unknowable
        return response.status_code, content


def _patience_s(path: Path) -> float:
    """How long an answer is waited for; the first one takes the handshakes of all that is on the way."""
    if path.rtt_ms is None or path.state != "UP":
        return _MOST_PATIENCE_S
    return min(max(_LEAST_PATIENCE_S, _PATIENCE_RTTS * path.rtt_ms / 1000), _MOST_PATIENCE_S)


def _health(
    peer: _Peer, tls: Callable[[str, str], str], ipsec: Callable[[str], tuple[IpsecTunnel, ...]], now: Instant
) -> Iterator[PeerHealth]:
    choice = choose(peer.watch.route, peer.paths, now)
    for name, path in peer.paths.items():
        if name == REVERSE and path.state == "UNKNOWN" and not peer.needs_reverse:
            continue
        yield PeerHealth(
            site_id=peer.site,
            path=name,
            state=path.state,
            since=path.since,
            last_evidence=path.last_evidence,
            rtt_ms=path.rtt_ms,
            error=path.error,
            tls=tls(peer.site, name)[:_TLS_LENGTH],
            in_use=name == choice.in_use and path.state != "DOWN",
            reason=choice.reasons[name][:_REASON_LENGTH],
            ipsec=ipsec(peer.site) if name == IPSEC else (),
        )


def _edge_health(site: str, path: Path, tunnels: Tunnels | None, tls: str) -> EdgeHealth:
    return EdgeHealth(
        site_id=site,
        state="UNKNOWN" if tunnels is None else "UP" if tunnels.count else "DOWN",
        since=path.since if tunnels is None else tunnels.since,
        last_evidence=path.last_evidence,
        rtt_ms=path.rtt_ms,
        error=path.error,
        tls=tls[:_TLS_LENGTH],
        tunnels=0 if tunnels is None else tunnels.count,
    )
