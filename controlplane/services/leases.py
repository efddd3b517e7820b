"""Which sites count as lost: those of which nothing was heard for a lease, unless too many fall silent at once.

Traffic follows the data plane, which notices sooner. This is for what a site that is gone cannot say itself, and each load balancer says what it means.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from uuid import UUID

import structlog
from prometheus_client.core import GaugeMetricFamily, Metric
from sqlalchemy.exc import SQLAlchemyError

from controlplane.services.heartbeats import SHORTEST_PACE_S, Heartbeats, lease
from controlplane.store import nodes, tenants
from controlplane.store.changes import raise_revision
from controlplane.store.locks import Lock, try_take
from controlplane.store.nodes import SiteLease
from controlplane.store.session import Database

log = structlog.get_logger()

MOST_LOST = 0.3
"""Share of a tenant's sites that may be lost within `WINDOW`; one always may. Beyond that the control plane is the likelier patient."""
WINDOW = timedelta(minutes=5)


@dataclass(frozen=True)
class Judgement:
    """On the sites of one tenant."""

    lost: frozenset[UUID] = frozenset()
    """Those that count as lost from now on."""
    found: frozenset[UUID] = frozenset()
    """Those that were, and are back."""
    held: frozenset[UUID] = frozenset()
    """Those that look lost, but too many do."""


def judge(leases: Collection[SiteLease], now: datetime) -> Judgement:
    """`leases` are all of one tenant. A site that was never heard of is not known to have lived."""
    heard = [(each, each.heard_at) for each in leases if each.heard_at]
    longest = lease(sum(each.nodes for each in leases))
    silent = frozenset(each.site_id for each, heard_at in heard if now - heard_at > longest)
    found = frozenset(each.site_id for each, _ in heard if each.site_id not in silent and each.lost_at)
    fresh = frozenset(each.site_id for each, _ in heard if each.site_id in silent and not each.lost)
    lately = sum(1 for each, _ in heard if each.lost and each.lost_at and now - each.lost_at <= WINDOW and each.site_id not in found)
    if fresh and len(fresh) + lately > max(1, int(MOST_LOST * len(heard))):
        return Judgement(found=found, held=fresh)
    return Judgement(lost=fresh, found=found)


@dataclass
class Leases:
    """As one replica sees them. What is decided is in the database, so all replicas decide alike."""

    database: Database
    heartbeats: Heartbeats
    held: Mapping[UUID, frozenset[UUID]] = field(default_factory=dict, init=False)
    """By tenant: sites that would count as lost, were they not so many."""
    _looked_at: datetime | None = field(default=None, init=False)

    async def look(self, now: datetime) -> None:
        """Judge every site; change what has changed, unless another replica is at it."""
        self._note_gap(now)
        try:
            judged = _judged(await self._read(), now)
            self._hold(judged)
            for tenant_id, judgement in judged.items():
                if judgement.lost or judgement.found:
                    await self._change(tenant_id, now)
        except (SQLAlchemyError, OSError):
            self.heartbeats.deaf()
            raise
        self.heartbeats.hears(now)

    def _note_gap(self, now: datetime) -> None:
        """Who was frozen heard nothing, which says nothing about sites."""
        before, self._looked_at = self._looked_at, now
        if before and now - before > timedelta(seconds=SHORTEST_PACE_S):
            self.heartbeats.deaf()

    async def _read(self) -> Mapping[UUID, list[SiteLease]]:
        found: dict[UUID, list[SiteLease]] = defaultdict(list)
        async with self.database.definer() as definer:
            for each in await nodes.leases(definer):
                found[each.tenant_id].append(each)
        return found

    async def _change(self, tenant_id: UUID, now: datetime) -> None:
        """Look again where nobody else changes anything."""
        async with self.database.sessions(tenant_id) as session:
            if not await try_take(session, Lock.LEASES):
                return
            own = await nodes.leases(session, tenant_id)
            judgement = judge(own, now)
            lost = judgement.lost if self.heartbeats.could_hear(sum(each.nodes for each in own), now) else frozenset[UUID]()
            found = judgement.found
            if not lost and not found:
                return
            revision = await raise_revision(session, tenant_id)
            await nodes.mark_lost(session, tenant_id, lost, revision, now)
            await nodes.mark_lost(session, tenant_id, found, revision, None)
        for site_id in sorted(lost):
            log.warning("site is lost: nothing was heard of it for a lease", tenant=str(tenant_id), site=str(site_id))
        for site_id in sorted(found):
            log.info("site is back", tenant=str(tenant_id), site=str(site_id))

    def _hold(self, judged: Mapping[UUID, Judgement]) -> None:
        held = {tenant_id: judgement.held for tenant_id, judgement in judged.items() if judgement.held}
        for tenant_id in held.keys() - self.held.keys():
            log.error(
                "too many sites fell silent at once: none of them is taken out of use", tenant=str(tenant_id), sites=len(held[tenant_id])
            )
        self.held = held

    async def exposition(self, now: datetime) -> list[Metric]:
        """Families for Prometheus, of all tenants."""
        sites = GaugeMetricFamily("isthmus_sites", "Sites with nodes, by what is known of them.", labels=("tenant", "state"))
        stopped = GaugeMetricFamily(
            "isthmus_eviction_stopped", "1: so many sites fell silent at once that none is taken out of use.", labels=("tenant",)
        )
        async with self.database.definer() as definer:
            names = {tenant.id: tenant.name for tenant in await tenants.list_all(definer)}
        found = await self._read()
        for tenant_id, judgement in _judged(found, now).items():
            name = names.get(tenant_id, str(tenant_id))
            silent = sum(1 for each in found[tenant_id] if each.lost and each.site_id not in judgement.found)
            unheard = sum(1 for each in found[tenant_id] if not each.heard_at)
            known = {"lost": silent + len(judgement.lost), "held": len(judgement.held), "unknown": unheard}
            known["live"] = len(found[tenant_id]) - sum(known.values())
            for state, count in sorted(known.items()):
                sites.add_metric((name, state), count)
            stopped.add_metric((name,), 1 if judgement.held else 0)
        return [sites, stopped]


def _judged(leases: Mapping[UUID, list[SiteLease]], now: datetime) -> Mapping[UUID, Judgement]:
    return {tenant_id: judge(own, now) for tenant_id, own in leases.items()}
