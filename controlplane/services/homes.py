"""Customer edges are connected to two regional edges each; here these are chosen, and moved when one is lost or drained."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.items import Gateway
from controlplane.compile.homes import HOMES, Candidate, basis, choose, trusted
from controlplane.resources.base import Stored
from controlplane.resources.site import Site
from controlplane.services.heartbeats import Heartbeats, is_fresh
from controlplane.services.view import Edges
from controlplane.store import changes, nodes, observations, tenants
from controlplane.store import edges as store
from controlplane.store.edges import Homes
from controlplane.store.locks import Lock, try_take
from controlplane.store.nodes import Node, NodeStatus
from controlplane.store.session import Database, enter


@dataclass
class Seen:
    """What was decided at last, so that nothing is looked at twice."""

    candidates: tuple[Candidate, ...] = ()
    revisions: dict[UUID, int] = field(default_factory=dict)
    """Of the tenants whose sites all have their edges."""


async def assign(database: Database, heartbeats: Heartbeats, seen: Seen, now: datetime) -> None:
    """Choose where something changed. One replica at a time; nothing, if another one is at it.

    Each step is a transaction with the lock, so that one connection will do.
    """
    async with database.transaction() as session:
        if not await try_take(session, Lock.HOMES):
            seen.revisions.clear()
            return
        listed = await store.list_all(session)
        if listed is None:
            return
        await enter(session, listed.operator_id)
        candidates = await _candidates(session, listed.operator_id, Edges.of(listed), heartbeats, now)
        known = await tenants.list_all(session)
    if candidates != seen.candidates:
        seen.candidates = candidates
        seen.revisions.clear()
    for tenant in known:
        if seen.revisions.get(tenant.id) == tenant.revision:
            continue
        async with database.sessions(tenant.id) as own:
            if not await try_take(own, Lock.HOMES):
                seen.revisions.clear()
                return
            settled = await _assign(own, tenant.id, candidates, now)
        if settled:
            seen.revisions[tenant.id] = tenant.revision


async def _assign(session: AsyncSession, tenant_id: UUID, candidates: tuple[Candidate, ...], now: datetime) -> bool:
    """Whether nothing is left to be done until something changes."""
    sites = await store.customers(session, tenant_id)
    known = await store.homes(session, tenant_id)
    up = await connected(session, tenant_id, [site_id for site_id, homes in known.items() if len(homes.edges) > HOMES], now)
    wanted = {}
    for site_id, spec in sites.items():
        by, old = basis(spec), known.get(site_id)
        current = old.edges if old and old.basis == by else ()
        chosen = choose(by, candidates, current, up.get(site_id, ()))
        if old is None or list(chosen) != old.edges or by != old.basis:
            wanted[site_id] = (list(chosen), by)
    if wanted or known.keys() - sites.keys():
        revision = await changes.raise_revision(session, tenant_id)
        for site_id, (chosen_edges, by) in wanted.items():
            await store.put_homes(session, tenant_id, Homes(site_id, chosen_edges, by, revision))
        await store.forget_homes(session, tenant_id, known.keys() - sites.keys())
        return False
    return not any(len(homes.edges) > HOMES for homes in known.values())


async def connected(session: AsyncSession, tenant_id: UUID, site_ids: Collection[UUID], now: datetime) -> Mapping[UUID, frozenset[str]]:
    """By site, ids of the edges to which every node that was heard of within its lease says that it has tunnels."""
    if not site_ids:
        return {}
    live = await nodes.live(session, tenant_id, site_ids)
    statuses = await nodes.statuses(session, tenant_id, [node.id for node in live])
    fleet = await nodes.count_live(session, tenant_id)
    fresh = {node.id: node.site_id for node in live if is_fresh(statuses.get(node.id), fleet, now)}
    up: dict[UUID, set[str]] = {node_id: set() for node_id in fresh}
    for state in await observations.edges(session, tenant_id, fresh.keys()):
        if state.report["state"] == "UP":
            up[state.node_id].add(state.site_id)
    found: dict[UUID, frozenset[str]] = {}
    for node_id, site_id in fresh.items():
        found[site_id] = found.get(site_id, frozenset(up[node_id])) & up[node_id]
    return found


async def _candidates(
    session: AsyncSession, operator_id: UUID, edges: Edges, heartbeats: Heartbeats, now: datetime
) -> tuple[Candidate, ...]:
    live = await nodes.live(session, operator_id, [site.uid for site in edges.sites.values()])
    statuses = await nodes.statuses(session, operator_id, [node.id for node in live])
    fleet = await nodes.count_live(session, operator_id)
    found = []
    for site in edges.sites.values():
        own = [(node, statuses.get(node.id)) for node in live if node.site_id == site.uid]
        found.append(_candidate(site, own, edges.gateways.get(str(site.uid), ()), heartbeats, fleet, now))
    return trusted(sorted((each for each in found if each), key=lambda each: each.id))


def _candidate(
    site: Stored[Site],
    own: Sequence[tuple[Node, NodeStatus | None]],
    gateways: tuple[Gateway, ...],
    heartbeats: Heartbeats,
    fleet: int,
    now: datetime,
) -> Candidate | None:
    if site.metadata.disable:
        return None
    at = site.spec.coordinates
    fresh = [status for _, status in own if status and is_fresh(status, fleet, now)]
    silent = all(heartbeats.is_silent(status.last_heartbeat_at if status else node.created_at, fleet, now) for node, status in own)
    return Candidate(
        id=str(site.uid),
        name=site.metadata.name,
        coordinates=(at.latitude, at.longitude) if at else None,
        usable=bool(gateways) and any(status.proxy == "live" for status in fresh),
        lost=silent or all(status and status.proxy == "down" for _, status in own),
        draining=site.spec.drain,
    )
