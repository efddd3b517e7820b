"""Sites, the meshes that join them, and the paths between them: what their nodes measured, as far as it is fresh."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any
from uuid import UUID

from agent.protocol.report import IpsecAbility, PeerHealth
from controlplane.compile.members import Topology, topology
from controlplane.compile.meshes import Mesh, hub_of
from controlplane.compile.plan import plan
from controlplane.errors import NotFound
from controlplane.resources.base import Key, Stored
from controlplane.services.delivery import Delivery
from controlplane.services.heartbeats import is_fresh
from controlplane.services.view import View
from controlplane.store import nodes, observations
from controlplane.store.nodes import Node, NodeStatus
from controlplane.store.observations import PeerState
from controlplane.store.session import Database

NAMESPACE = "system"
REPORT_LEASE = timedelta(seconds=45)
"""Three times as long as nodes take at most to say anew how their paths do."""
UP, DOWN, DEGRADED = "LINK_STATUS_UP", "LINK_STATUS_DOWN", "LINK_STATUS_DEGRADED"
UNKNOWN, NOT_APPLICABLE = "LINK_STATUS_UNKNOWN", "LINK_STATUS_NOT_APPLICABLE"
BETWEEN_GATEWAYS = frozenset({"ipsec", "direct", "reverse"})
"""Paths that lead through no regional edge."""
Ends = tuple[str, str]
"""Ids of sites: from, to."""


@dataclass(frozen=True)
class Link:
    """One path from one node to a peer site."""

    node: Node
    source: Stored[Any]
    destination: Stored[Any]
    edge: str
    """Name of the regional edge that it leads through; empty for others."""
    status: str
    """`LINK_STATUS_…`: UNKNOWN when the node has not tried, or its word is stale."""
    stale: str
    """Why it is; empty if it is not."""
    report: PeerHealth
    reported_at: datetime
    since: datetime
    """By the control plane's clock, as is `last_evidence`."""
    last_evidence: datetime | None


@dataclass(frozen=True)
class Pair:
    """Two sites, and the links between them both ways."""

    sites: tuple[Stored[Any], Stored[Any]]
    status: str
    links: tuple[Link, ...]


@dataclass(frozen=True)
class Group:
    """A site mesh group: its sites, and the pairs that it joins."""

    group: Stored[Any]
    mesh: Mesh
    hub: Stored[Any] | None
    """The group of its hubs, if it is one of spokes."""
    sites: tuple[Stored[Any], ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Surroundings:
    """A site, those that it has to do with, and how."""

    site: Stored[Any]
    sites: tuple[Stored[Any], ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Between:
    """All that is known about how one site reaches another."""

    source: Stored[Any]
    destination: Stored[Any]
    called: bool
    """Whether anything at the source calls origins at the destination, or serves it: without that there are no paths."""
    meshes: tuple[str, ...]
    """Names of the groups that join both directly."""
    together: tuple[str, ...]
    """Names of groups of spokes that both belong to, which does not join them."""
    fallback: bool
    """Whether regional edges may stand in."""
    at_edges: bool
    """Whether the destination has regional edges that it keeps tunnels to."""
    has_gateway: bool
    """Whether the destination has an address that can be dialled."""
    encapsulations: frozenset[str]
    """`ipsec`, `ssl`: what the tunnel types of both sites, and of a group that joins them, allow."""
    no_ipsec: str
    """Why there is no IPsec between both, although it is allowed; empty if both can."""
    lost: bool
    """Whether the destination counts as lost."""
    silent: str
    """Why nothing fresh is known of the source; empty if something is."""
    links: tuple[Link, ...]


class Observed:
    """One tenant at one moment."""

    def __init__(self, view: View, states: Iterable[PeerState], statuses: Mapping[UUID, NodeStatus], now: datetime) -> None:
        self.view, self.now = view, now
        self.topology: Topology = topology(view.intent)
        self.statuses = statuses
        self._known = {node.id: node for own in view.fleet.live.values() for node in own}
        self._peers: dict[str, frozenset[str]] = {}
        self.links: dict[Ends, tuple[Link, ...]] = {}
        for state in sorted(states, key=lambda state: (self._known[state.node_id].name, not state.report["in_use"], state.path)):
            node = self._known[state.node_id]
            ends = str(node.site_id), state.site_id
            if ends[0] in view.sites and ends[1] in view.sites:
                self.links[ends] = (*self.links.get(ends, ()), self._link(node, state))

    def _link(self, node: Node, state: PeerState) -> Link:
        report = PeerHealth.model_validate(state.report)
        status = self.statuses.get(node.id)
        stale = self._stale(node, state)
        skew = timedelta(seconds=status.clock_skew_s if status else 0)
        edge = self.topology.sites.get(report.path) or self.view.sites.get(report.path)
        return Link(
            node=node,
            source=self.view.sites[str(node.site_id)],
            destination=self.view.sites[state.site_id],
            edge=edge.metadata.name if edge else "" if report.path in BETWEEN_GATEWAYS else report.path,
            status=UNKNOWN if stale else f"LINK_STATUS_{report.state}",
            stale=stale,
            report=report,
            reported_at=state.reported_at,
            since=_moment(report.since, skew),
            last_evidence=None if report.last_evidence is None else _moment(report.last_evidence, skew),
        )

    def _stale(self, node: Node, state: PeerState) -> str:
        """Why what the node said is no evidence any more."""
        status = self.statuses.get(node.id)
        if status is None or not is_fresh(status, self.view.fleet.size, self.now):
            return f"node {node.name} is silent{_since(status.last_heartbeat_at if status else None, self.now)}"
        if self.now - state.reported_at > REPORT_LEASE:
            return f"node {node.name} has not told of its paths{_since(state.reported_at, self.now)}"
        return ""

    def node_name(self, node_id: str) -> str:
        """Of one that lives; its id, if it does not."""
        return next((node.name for node in self._known.values() if str(node.id) == node_id), node_id)

    def pair(self, one: str, other: str) -> Pair:
        both = self.links.get((one, other), ()) + self.links.get((other, one), ())
        status = together(link.status for link in both) if both or self.talk(one, other) else NOT_APPLICABLE
        return Pair((self.view.sites[one], self.view.sites[other]), status, both)

    def talk(self, one: str, other: str) -> bool:
        """Whether one of the sites calls the other. What a site talks to is worked out once, since a mesh asks for each pair."""
        if one not in self._peers:
            self._peers[one] = plan(self.view.intent).peers(one)
        return other in self._peers[one]

    def group(self, group: Stored[Any]) -> Group:
        """One that is disabled joins nobody."""
        mesh = self.topology.meshes.get(group.key) or Mesh(frozenset(), None, fallback=False)
        pairs = tuple(self.pair(one, other) for one, other in combinations(sorted(mesh.sites), 2) if mesh.joins(one, other))
        hub = hub_of(group, self.view.intent.of("site_mesh_group"))
        return Group(group, mesh, hub, tuple(self.view.sites[site_id] for site_id in sorted(mesh.sites)), pairs)

    def surroundings(self, site: Stored[Any]) -> Surroundings:
        own = str(site.uid)
        others = sorted(
            other
            for other in self.view.sites
            if other != own and (self.topology.joined(own, other) or self.talk(own, other) or (own, other) in self.links)
        )
        known = tuple(self.view.sites[other] for other in others)
        return Surroundings(site, (site, *known), tuple(self.pair(own, other) for other in others))

    def between(self, source: Stored[Any], destination: Stored[Any]) -> Between:
        one, other = str(source.uid), str(destination.uid)
        meshes = self.topology.meshes.items()
        fresh = [node for node in self.view.fleet.live.get(one, ()) if is_fresh(self.statuses.get(node.id), self.view.fleet.size, self.now)]
        return Between(
            source=source,
            destination=destination,
            called=self.talk(one, other),
            meshes=tuple(key.name for key, mesh in meshes if mesh.joins(one, other)),
            together=tuple(key.name for key, mesh in meshes if mesh.hubs is not None and {one, other} <= mesh.members),
            fallback=self.topology.fallback(one, other),
            at_edges=bool(self.view.fleet.observations.homes.get(other)),
            has_gateway=bool(self.view.fleet.observations.gateways.get(other)),
            encapsulations=self.topology.encapsulations(one, other),
            no_ipsec=self.no_ipsec(source) or self.no_ipsec(destination),
            lost=other in self.view.fleet.observations.lost,
            silent="" if fresh else self._silence(source),
            links=self.links.get((one, other), ()),
        )

    def no_ipsec(self, site: Stored[Any]) -> str:
        """Why none of the site's nodes can be an end of IPsec tunnels; empty if some can."""
        own = self.view.fleet.live.get(str(site.uid), ())
        said = [IpsecAbility.model_validate(node.ipsec) for node in own if node.ipsec]
        if any(each.able for each in said):
            return ""
        reasons = sorted({each.reason for each in said})
        return f"{site.metadata.name} has no IPsec: {'; '.join(reasons) or 'none of its nodes has said that it can'}"

    def _silence(self, site: Stored[Any]) -> str:
        own = self.view.fleet.live.get(str(site.uid), ())
        if not own:
            return f"site {site.metadata.name} has no nodes"
        heard = [status.last_heartbeat_at for node in own if (status := self.statuses.get(node.id))]
        return f"site {site.metadata.name} is silent{_since(max(heard, default=None), self.now)}"


async def observe(database: Database, delivery: Delivery, tenant_id: UUID, now: datetime) -> Observed:
    """Of every pair of nodes and peers there may be paths, so they are not gone through on the event loop."""
    view = (await delivery.cache(tenant_id)).view
    known = [node.id for own in view.fleet.live.values() for node in own]
    async with database.sessions(tenant_id) as session:
        states = await observations.peers(session, tenant_id, known)
        statuses = await nodes.statuses(session, tenant_id, known)
    return await asyncio.to_thread(Observed, view, states, statuses, now)


def groups(observed: Observed) -> tuple[Group, ...]:
    """Every site mesh group, by name."""
    return tuple(observed.group(group) for _, group in sorted(observed.view.intent.of("site_mesh_group").items()))


def group(observed: Observed, name: str) -> Group:
    """Raises `NotFound`."""
    return observed.group(_find(observed, "site_mesh_group", name))


def surroundings(observed: Observed, name: str) -> Surroundings:
    """Raises `NotFound`."""
    return observed.surroundings(_find(observed, "site", name))


def between(observed: Observed, source: str, destination: str) -> Between:
    """Raises `NotFound`."""
    return observed.between(_find(observed, "site", source), _find(observed, "site", destination))


def together(statuses: Iterable[str]) -> str:
    """Of several links: what they agree on; DEGRADED if some are up and some are down."""
    known = {status for status in statuses if status != UNKNOWN}
    if len(known) > 1:
        return DEGRADED
    return known.pop() if known else UNKNOWN


def _find(observed: Observed, kind: str, name: str) -> Stored[Any]:
    found = observed.view.intent.of(kind).get(Key(NAMESPACE, name))
    if found is None:
        raise NotFound(f"{kind} {name} does not exist")
    return found


def _moment(node_s: float, skew: timedelta) -> datetime:
    return datetime.fromtimestamp(node_s, UTC) - skew


def _since(at: datetime | None, now: datetime) -> str:
    return f" for {max(0.0, (now - at).total_seconds()):.0f} s" if at else ", and always was"
