"""Whether what users wrote is in force: told by what nodes reported, never by what was sent to them."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import Any, Literal
from uuid import UUID

from controlplane.compile.concern import concerned_sites
from controlplane.compile.members import topology
from controlplane.compile.site import conditions
from controlplane.compile.snapshot import Condition
from controlplane.errors import FieldError, Invalid, NotFound
from controlplane.resources.base import Key, Stored
from controlplane.resources.registry import refs
from controlplane.services import gateways, listening
from controlplane.services.bell import Bell
from controlplane.services.caches import TenantCache
from controlplane.services.delivery import Delivery
from controlplane.services.discovered import IN_CLUSTER
from controlplane.services.heartbeats import Heartbeats, alarms, is_fresh
from controlplane.services.leases import Leases
from controlplane.services.meshes import Membership, membership
from controlplane.services.view import View
from controlplane.services.wanted import Wanted, carriers
from controlplane.store import edges as edge_store
from controlplane.store import nodes, observations
from controlplane.store.nodes import Node, NodeStatus
from controlplane.store.observations import DiscoveryState, OriginState
from controlplane.store.session import Database

State = Literal["Applied", "Pending", "Rejected", "Conflicted", "Offline", "NoNodes"]
FINAL = ("Rejected", "Conflicted")
"""Time alone does not change these."""

_LOOK_EVERY_S = 1.0
"""While waiting: leases run out without anybody saying so, and a notification may get lost."""


@dataclass(frozen=True)
class NodeReport:
    """One node, and what it last said."""

    node: Node
    status: NodeStatus | None
    fresh: bool
    """Heard of within its lease."""
    silent: bool
    """Known not to live."""
    applied: bool
    rejected: tuple[Mapping[str, Any], ...] = ()
    """Of the object's items, in their current version."""
    alarms: tuple[tuple[str, str], ...] = ()
    """Type of a condition, and words."""


@dataclass(frozen=True)
class SiteReport:
    site: Stored[Any]
    state: State
    reason: str
    nodes: tuple[NodeReport, ...]
    origins: tuple[OriginState, ...] = ()
    discovery: DiscoveryState | None = None
    """Of a discovery, or of a site in its own cluster: what was found last."""

    @property
    def heard_at(self) -> datetime | None:
        """The last heartbeat of any of its nodes; what is said of the site is no newer."""
        return max((report.status.last_heartbeat_at for report in self.nodes if report.status), default=None)


@dataclass(frozen=True)
class ObjectReport:
    revision: int
    sites: tuple[SiteReport, ...]
    conditions: tuple[Condition, ...]
    mesh: Membership | None = None
    """Of a site mesh group."""

    def missing(self, offline: str) -> tuple[SiteReport, ...]:
        """Sites where it is not in force; without those that cannot answer, if they are to be ignored."""
        forgiven = ("Offline", "NoNodes") if offline == "ignore" else ()
        return tuple(site for site in self.sites if site.state != "Applied" and site.state not in forgiven)

    def reason(self, offline: str) -> str:
        """Worst first. Nothing is applied where every site was ignored."""
        missing = self.missing(offline)
        if not missing and any(site.state == "Applied" for site in self.sites):
            return "Applied"
        if not self.sites:
            return "NoSites"
        states = {site.state for site in missing or self.sites}
        return next(state for state in (*FINAL, "Offline", "NoNodes", "Pending") if state in states)


@dataclass(frozen=True)
class Observer:
    """Looks at the objects of all tenants, in one replica."""

    database: Database
    delivery: Delivery
    heartbeats: Heartbeats
    leases: Leases
    clock: Callable[[], datetime]
    bell: Bell = field(default_factory=Bell)

    async def look(self, tenant_id: UUID, kind: str, key: Key, revision: int | None = None) -> ObjectReport:
        """How an object is doing, at `revision` or its last write. Raises `NotFound`, and `Invalid` for a revision that is yet to come."""
        cache = await self.delivery.cache(tenant_id)
        await self.delivery.catch_up(cache)
        view = cache.view
        stored = view.intent.of(kind).get(key)
        if stored is None:
            raise NotFound(f"{kind} {key} does not exist")
        if revision is not None and revision > view.revision:
            description = f"is yet to come; the tenant is at {view.revision}"
            raise Invalid(f"revision {revision} {description}", [FieldError("revision", description)])
        wanted = stored.revision if revision is None else revision
        found = [condition for condition in conditions(view.intent) if (condition.kind, condition.key) == (kind, key)]
        if kind in listening.KINDS:
            found += gateways.conflicts(stored, view)
        lost = {condition.site_id: condition.message for condition in found if condition.type == "Conflicted"}
        for condition in found:
            lost |= dict.fromkeys(topology(view.intent).edges, condition.message) if condition.type == "NotYours" else {}
        sites = [*await self._sites(cache, stored, wanted, lost), *await self._edges(cache, stored, wanted, lost)]
        held = self.leases.held.get(tenant_id, frozenset())
        told = (*found, *_of_sites(stored, sites), *_of_leases(stored, view, held))
        mesh = membership(stored, view.intent, view.fleet.multi_cluster) if kind == "site_mesh_group" else None
        return ObjectReport(wanted, tuple(sites), told, mesh)

    async def wait(self, tenant_id: UUID, kind: str, key: Key, revision: int | None, offline: str, timeout_s: float) -> ObjectReport:
        """Look until it is in force everywhere, cannot come to be, or the time is up."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while True:
            rung = self.bell.next(tenant_id)
            report = await self.look(tenant_id, kind, key, revision)
            missing = report.missing(offline)
            left_s = deadline - asyncio.get_running_loop().time()
            if left_s <= 0 or self.bell.silenced or all(site.state in FINAL for site in missing):
                return report
            try:
                await asyncio.wait_for(rung.wait(), min(left_s, _LOOK_EVERY_S))
            except TimeoutError:
                continue

    async def _sites(self, cache: TenantCache, stored: Stored[Any], revision: int, lost: Mapping[str, str]) -> list[SiteReport]:
        view = cache.view
        concerned = concerned_sites(stored.kind, stored.key, view.intent) - _shared_edges(stored, view)
        ids = sorted(concerned & view.sites.keys(), key=lambda site_id: view.sites[site_id].key)
        published = {site_id: await self.delivery.published(cache, site_id) for site_id in ids}
        known = [node.id for site_id in ids for node in view.fleet.live.get(site_id, ())]
        async with self.database.sessions(cache.id) as session:
            statuses = await nodes.statuses(session, cache.id, known)
            origins = await observations.origins(session, cache.id, known, _pools(stored))
            found = await observations.discoveries(session, cache.id, _watchers(stored, known, view))
        now = self.clock()
        carried = carriers(stored, view.intent)
        fresh = partial(is_fresh, fleet=view.fleet.size, now=now)
        silent = partial(self.heartbeats.is_silent, fleet=view.fleet.size, now=now)
        reports = []
        for site_id in ids:
            wanted = Wanted(carried, revision, published[site_id], lost.get(site_id, ""))
            said = [_node(node, statuses.get(node.id), wanted, fresh, silent) for node in view.fleet.live.get(site_id, ())]
            said = [replace(report, alarms=tuple(alarms(report.status, view.fleet.size, now)) if report.status else ()) for report in said]
            state, reason = _state(said, wanted)
            reports.append(SiteReport(view.sites[site_id], state, reason, tuple(said), _latest(origins, said), _found(stored, found, said)))
        return reports

    async def _edges(self, cache: TenantCache, stored: Stored[Any], revision: int, lost: Mapping[str, str]) -> list[SiteReport]:
        """Regional edges serve many tenants: what counts is this tenant's part of what they have. Of their nodes tenants are told nothing else."""
        ids = concerned_sites(stored.kind, stored.key, cache.view.intent) & _shared_edges(stored, cache.view)
        told = await self.delivery.on_edges(cache.id, revision) if ids else None
        if told is None:
            return []
        async with self.database.definer() as definer:
            statuses = await edge_store.statuses(definer)
        view, now = told.operator.view, self.clock()
        carried = frozenset((kind, f"{cache.id}/{key}") for kind, key in carriers(stored, cache.view.intent))
        fresh = partial(is_fresh, fleet=view.fleet.size, now=now)
        silent = partial(self.heartbeats.is_silent, fleet=view.fleet.size, now=now)
        reports = []
        for site_id in sorted(ids & told.published.keys(), key=lambda site_id: view.sites[site_id].key):
            wanted = Wanted(carried, revision, told.of(site_id, revision), lost.get(site_id, ""), partial(told.is_told, site_id))
            said = [_node(node, statuses.get(node.id), wanted, fresh, silent) for node in view.fleet.live.get(site_id, ())]
            state, reason = _state(said, wanted)
            reports.append(SiteReport(view.sites[site_id], state, _without_nodes(state, reason, said), ()))
        return reports


def _shared_edges(stored: Stored[Any], view: View) -> frozenset[str]:
    """Ids of the regional edges, as far as they matter to others than themselves."""
    return topology(view.intent).edges - {str(stored.uid)}


def _node(
    node: Node,
    status: NodeStatus | None,
    wanted: Wanted,
    is_fresh: Callable[[NodeStatus | None], bool],
    is_silent: Callable[[datetime | None], bool],
) -> NodeReport:
    applied = status is not None and wanted.in_force(status)
    rejected = tuple(wanted.rejections(status)) if status else ()
    silent = is_silent(status.last_heartbeat_at if status else node.created_at)
    return NodeReport(node, status, is_fresh(status), silent, applied, rejected)


def _state(said: Collection[NodeReport], wanted: Wanted) -> tuple[State, str]:
    """Of a site, by its nodes that live or may live. Words for people go with it."""
    if wanted.lost_to:
        return "Conflicted", wanted.lost_to
    if not said:
        return "NoNodes", "no node has registered"
    live = [report for report in said if report.fresh]
    for report in live:
        for rejection in report.rejected:
            return "Rejected", f"node {report.node.name}: {rejection['reason']}"
    if all(report.silent for report in said):
        return "Offline", _silence(said)
    unheard = ", ".join(report.node.name for report in said if not report.fresh and not report.silent)
    if unheard:
        return "Pending", f"waiting for a heartbeat of node {unheard}"
    if all(report.applied for report in live):
        return "Applied", ""
    if not wanted.compiled:
        return "Pending", "the configuration of this site cannot be compiled; see the control plane's log"
    waiting = ", ".join(report.node.name for report in live if not report.applied)
    return "Pending", f"waiting for node {waiting}"


def _without_nodes(state: State, reason: str, said: Iterable[NodeReport]) -> str:
    """The words for people of other tenants."""
    match state:
        case "Rejected":
            return next(str(rejection["reason"]) for report in said if report.fresh for rejection in report.rejected)
        case "Offline":
            return "nothing is heard of this regional edge"
        case "Pending":
            return "waiting for this regional edge"
    return reason


def _silence(said: Iterable[NodeReport]) -> str:
    heard = [report.status.last_heartbeat_at for report in said if report.status]
    return f"last heartbeat at {max(heard).isoformat(timespec='seconds')}" if heard else "never sent a heartbeat"


def _pools(stored: Stored[Any]) -> tuple[str, ...]:
    """Keys of the pools whose origins tell how the object does."""
    if stored.kind == "origin_pool":
        return (str(stored.key),)
    return tuple({str(ref.key) for ref in refs(stored.kind, stored.metadata, stored.spec) if ref.kind == "origin_pool"})


def _latest(origins: Iterable[OriginState], said: Iterable[NodeReport]) -> tuple[OriginState, ...]:
    """Nodes of a site see the same endpoints: for each pool, what was said last."""
    own = {report.node.id for report in said}
    found: dict[str, OriginState] = {}
    for origin in origins:
        if origin.node_id in own and (origin.pool not in found or origin.reported_at > found[origin.pool].reported_at):
            found[origin.pool] = origin
    return tuple(found.values())


def _watchers(stored: Stored[Any], known: Collection[UUID], view: View) -> Collection[UUID]:
    """Nodes that read the clusters of a discovery, or of a site: its own."""
    if stored.kind == "site":
        return [node.id for node in view.fleet.live.get(str(stored.uid), ())]
    return known if stored.kind == "discovery" else ()


def _found(stored: Stored[Any], found: Iterable[DiscoveryState], said: Iterable[NodeReport]) -> DiscoveryState | None:
    own = {report.node.id for report in said}
    cluster = IN_CLUSTER if stored.kind == "site" else str(stored.key)
    states = [state for state in found if state.node_id in own and state.discovery == cluster]
    return max(states, key=lambda state: (state.services is not None, state.reported_at), default=None)


def _of_sites(stored: Stored[Any], sites: Iterable[SiteReport]) -> Iterator[Condition]:
    for site in sites:
        if stored.kind == "site" and site.site.uid == stored.uid:
            for report in site.nodes:
                yield from (Condition("site", stored.key, type_, f"node {report.node.name}: {words}") for type_, words in report.alarms)
        if site.state in ("Rejected", "Offline"):
            yield Condition(stored.kind, stored.key, site.state, f"site {site.site.metadata.name}: {site.reason}")
        if site.discovery and not site.discovery.connected:
            yield Condition(stored.kind, stored.key, "Disconnected", f"site {site.site.metadata.name}: {site.discovery.reason}")


def _of_leases(stored: Stored[Any], view: View, held: Collection[UUID]) -> Iterator[Condition]:
    """Of a site: whether callers were told that it is gone, or why not."""
    if stored.kind != "site":
        return
    own = view.fleet.live.get(str(stored.uid), ())
    if str(stored.uid) in view.fleet.observations.lost:
        since = max(node.lost_at for node in own if node.lost_at).isoformat(timespec="seconds")
        yield Condition(
            stored.kind, stored.key, "Lost", f"nothing was heard of it for a lease; since {since} load balancers use it as they say"
        )
    elif stored.uid in held:
        message = f"nothing is heard of it, nor of {len(held) - 1} other sites: so many at once are not taken out of use"
        yield Condition(stored.kind, stored.key, "EvictionStopped", message)
