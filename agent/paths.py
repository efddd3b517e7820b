"""Which of the paths to a peer is used, and why: direct is preferred, and a path that fails again and again rests.

Values in, values out. Envoy itself moves traffic away from a path that fails; going back is decided here, and never sooner than a minute after
the last time.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from agent.envoy.inputs import AgentSnapshot, Item, PeerView, body
from agent.envoy.paths import DIRECT, IPSEC, REVERSE, ways
from agent.envoy.pools import last
from agent.protocol.items import Edge, Export, ItemKind, OriginPool, Peer, Site

ITSELF = ""
"""To a regional edge."""
_BETWEEN_GATEWAYS = frozenset({IPSEC, DIRECT, REVERSE})
"""What leads through no regional edge."""

GOOD_PROBES = 3
"""In a row, before a path that was down is used again."""
REST_S = 60.0
"""After a failure that follows another, or a return, by less than that."""
_FAILURES_TOGETHER_S = 10.0
"""Two failed probes within that time mean that the path is down; one alone may be a lost packet."""


class Instant(NamedTuple):
    steady: float
    """Of a clock that nobody sets."""
    wall: float
    """Unix seconds, for people."""


State = Literal["UP", "DOWN", "UNKNOWN"]


@dataclass(frozen=True)
class Path:
    """What is known of one path by its probes."""

    since: float
    """Unix seconds: of the state."""
    state: State = "UNKNOWN"
    last_evidence: float | None = None
    rtt_ms: float | None = None
    error: str = ""
    good: int = 0
    """Probes that were answered in a row."""
    rests: bool = False
    """Not to be used: it is down, or was and has not proved itself since."""
    failed_at: float = -math.inf
    down_at: float = -math.inf
    back_at: float = -math.inf
    rests_until: float = -math.inf
    preferred_at: float = -math.inf
    """When it last took the place of one that worked. With the four above: of the steady clock."""

    def answered(self, rtt_ms: float | None, now: Instant, error: str = "") -> "Path":
        since = self.since if self.state == "UP" else now.wall
        rtt_ms = self.rtt_ms if rtt_ms is None else rtt_ms
        return replace(self, since=since, state="UP", last_evidence=now.wall, rtt_ms=rtt_ms, error=error, good=self.good + 1)

    def failed(self, error: str, now: Instant) -> "Path":
        after = replace(self, error=error, good=0, failed_at=now.steady)
        if self.state == "DOWN" or now.steady - self.failed_at > _FAILURES_TOGETHER_S:
            return after
        flaps = now.steady - max(self.down_at, self.back_at) < REST_S
        until = now.steady + REST_S if flaps else self.rests_until
        return replace(after, since=now.wall, state="DOWN", rests=True, down_at=now.steady, rests_until=until)

    def has_rested(self, now: Instant) -> bool:
        return self.state == "UP" and self.good >= GOOD_PROBES and now.steady >= self.rests_until

    def back(self, now: Instant, *, preferred: bool = False) -> "Path":
        """Used again; `preferred` to one that works as well."""
        return replace(self, rests=False, back_at=now.steady, preferred_at=now.steady if preferred else self.preferred_at)

    @property
    def leads(self) -> bool:
        return self.state == "UP" and not self.rests


def unproven(since: float) -> Path:
    """One that is not used before it has been found to work."""
    return Path(since, rests=True)


@dataclass(frozen=True)
class Route:
    """The paths that there are to a peer."""

    paths: tuple[str, ...]
    """In order of preference."""
    draining: frozenset[str] = frozenset()
    """Those of them that are used only where no other leads."""
    no_direct: str = ""
    """Why none of them is direct."""
    no_ipsec: str = ""
    """Why `ipsec` is not among them, although the peer has it."""
    names: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Of edges, by id, for people."""

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(sorted(self.paths, key=lambda path: path in self.draining))


@dataclass(frozen=True)
class Choice:
    """What follows for each path. `in_use` is None when nothing leads there."""

    in_use: str | None
    usable: Mapping[str, bool]
    """A path that is missing was not judged yet, and may be tried; `reverse` is never missing."""
    reasons: Mapping[str, str]


def settled(route: Route, paths: Mapping[str, Path], now: Instant) -> dict[str, Path]:
    """The paths, where those that have rested are used again, and at most once a minute one in place of another that works.

    If nothing leads otherwise, the first that answers has rested enough.
    """
    after = dict(paths)
    for name in route.order:
        if name in after and after[name].rests and after[name].has_rested(now):
            better = _is_before(name, leading(route, after), route)
            if not better or now.steady >= _may_change(after):
                after[name] = after[name].back(now, preferred=better)
    if leading(route, after) is None:
        waiting = next((name for name in route.order if name in after and after[name].state == "UP"), None)
        if waiting is not None:
            after[waiting] = after[waiting].back(now)
    return after


def leading(route: Route, paths: Mapping[str, Path]) -> str | None:
    """The first path that works and does not rest."""
    return next((name for name in route.order if name in paths and paths[name].leads), None)


def _is_before(name: str, other: str | None, route: Route) -> bool:
    return other is not None and route.order.index(name) < route.order.index(other)


def _may_change(paths: Mapping[str, Path]) -> float:
    """From when on a path may take the place of one that works."""
    return max(path.preferred_at for path in paths.values()) + REST_S


def choose(route: Route, paths: Mapping[str, Path], now: Instant) -> Choice:
    """`paths` as they come from `settled`."""
    known = {name: paths[name] for name in route.order if name in paths}
    first = leading(route, known)
    in_use = first or next((name for name, path in known.items() if not path.rests), None)
    spare = first is not None and first not in route.draining
    kept_back = route.draining if spare else frozenset()
    if first in (IPSEC, DIRECT) and any(path.leads for name, path in known.items() if name not in _BETWEEN_GATEWAYS):
        kept_back |= {REVERSE}  # the same link: what takes the one away takes the other
    usable = {
        name: not path.rests and name not in kept_back
        for name, path in known.items()
        if path.state != "UNKNOWN" or path.rests or name == REVERSE or name in kept_back
    }
    return Choice(in_use, usable, dict(_reasons(route, known, in_use, now)))


def _reasons(route: Route, known: Mapping[str, Path], in_use: str | None, now: Instant) -> Iterator[tuple[str, str]]:
    passed: list[str] = []
    may_change = _may_change(known) if known else 0.0
    for name, path in known.items():
        if name == in_use:
            yield name, "; ".join(passed) or _preferred(name, route)
            passed = []
            continue
        why = _why_not(name, path, route, may_change, now)
        if name != REVERSE or path.state != "UNKNOWN":
            passed.append(f"{_called(name, route)} {why}")
        yield name, why


def _preferred(name: str, route: Route) -> str:
    """`no_direct` is empty where a direct path is among them, and `no_ipsec` where that one is."""
    return "; ".join(("preferred", *(why for why in (route.no_direct, route.no_ipsec) if why)))


def _why_not(name: str, path: Path, route: Route, may_change: float, now: Instant) -> str:
    if path.state == "DOWN":
        return f"is down: {path.error}"
    if path.state == "UNKNOWN":
        return "has not answered yet" + (f": {path.error}" if path.error else "")
    if path.rests and path.good < GOOD_PROBES:
        return f"answers again, and is used after {GOOD_PROBES - path.good} more good probes"
    if path.rests:
        return f"held down after flapping until {_time_of_day(max(path.rests_until, may_change), now)}"
    return "is draining" if name in route.draining else "stands by"


def _called(name: str, route: Route) -> str:
    return name if name in _BETWEEN_GATEWAYS else f"edge {route.names.get(name, name)}"


def _time_of_day(steady: float, now: Instant) -> str:
    return datetime.fromtimestamp(now.wall + steady - now.steady, UTC).strftime("%H:%M:%S UTC")


@dataclass(frozen=True)
class Dialling:
    """Whether this node keeps tunnels to a peer for the peer's own calls, by what the peer says of reaching this site."""

    dials: bool = False
    not_needed_since: float | None = None
    """Of the steady clock."""

    def told(self, reaches: bool | None, now: Instant) -> "Dialling":
        """Begin as soon as the peer cannot reach this site; end when it has for a minute."""
        if reaches is False:
            return Dialling(dials=True)
        since = now.steady if self.not_needed_since is None else self.not_needed_since
        return Dialling(self.dials and now.steady - since < REST_S, since)


@dataclass(frozen=True)
class Watch:
    """What there is to know of a peer."""

    route: Route
    meshed: bool = True
    """Whether a site mesh group joins both sites directly."""
    called: bool = True
    """Otherwise it only calls this site, and is asked no more than whether it can."""
    draining: bool = False


def watches(snapshot: AgentSnapshot, no_ipsec: str = "") -> dict[str, Watch]:
    """By site id: the peers that have origins of the pools here, and those that call exports of this site directly.

    `no_ipsec`: why this node has no IPsec; empty if it has.
    """
    if snapshot.site is None:
        return {}
    site, edges = body(snapshot.site, Site), snapshot.by_key[ItemKind.EDGE]
    called, callers = _called_sites(snapshot.by_kind[ItemKind.ORIGIN_POOL]), _callers(snapshot.by_kind[ItemKind.EXPORT])
    found = {}
    for item in snapshot.by_kind[ItemKind.PEER]:
        peer = body(item, Peer)
        dialable = peer.direct and bool(peer.gateways)
        if peer.site_id in called:
            found[peer.site_id] = Watch(_route(item, edges, site, no_ipsec), peer.direct, draining=peer.draining)
        elif peer.site_id in callers and dialable:
            found[peer.site_id] = Watch(Route((DIRECT,)), called=False)
    return found


def home_edges(snapshot: AgentSnapshot) -> dict[str, Watch]:
    """Those that this site keeps reverse tunnels to. One is asked itself, by the path without a name."""
    edges = (body(item, Edge) for item in snapshot.by_kind[ItemKind.EDGE])
    return {edge.site_id: Watch(Route((ITSELF,)), meshed=False) for edge in edges if edge.home}


@last
def _called_sites(items: tuple[Item, ...]) -> frozenset[str]:
    pools = (body(item, OriginPool) for item in items)
    return frozenset(site for pool in pools for origin in pool.origins for site in origin.sites or ())


@last
def _callers(items: tuple[Item, ...]) -> frozenset[str]:
    exports = (body(item, Export) for item in items)
    return frozenset(site for export in exports for use in export.uses for site in use.peers)


def _route(item: Item, edges: Mapping[str, Item], site: Site, no_ipsec: str) -> Route:
    """As Envoy has the paths to the peer."""
    peer = body(item, Peer)
    own = site.site_id if site.kind == "regional_edge" else ""
    found = [way.path for way in ways(item, edges, own=own, anchored=bool(site.edge_anchor_pem), ipsec=not no_ipsec)]
    relaying = [body(edges[path], Edge) for path in found if path in edges]
    return Route(
        tuple(found),
        draining=frozenset(edge.site_id for edge in relaying if edge.draining),
        no_direct="" if {IPSEC, DIRECT} & {*found} else _apart(peer, no_ipsec),
        no_ipsec=f"no IPsec: {no_ipsec}" if peer.ipsec and no_ipsec else "",
        names={edge.site_id: edge.name for edge in relaying},
    )


def _apart(peer: Peer, no_ipsec: str) -> str:
    """Why no path to it is direct."""
    if not peer.direct:
        return "no mesh joins both sites directly"
    if peer.ssl:
        return "nobody can dial the peer"
    return "the tunnel must be IPsec" + ("" if peer.ipsec and no_ipsec else ", and the peer has none that this site may use")


def relieved(views: Mapping[str, PeerView], draining: Collection[str]) -> dict[str, PeerView]:
    """The views, where sites that are draining export nothing that another one serves."""
    served = {
        pool
        for site, view in views.items()
        if site not in draining and view.reachable is not False
        for pool, healthy in view.exports.items()
        if healthy
    }
    return {site: _relieved(view, served) if site in draining else view for site, view in views.items()}


def _relieved(view: PeerView, served: Collection[str]) -> PeerView:
    return replace(view, exports={pool: 0 if pool in served else healthy for pool, healthy in view.exports.items()})
