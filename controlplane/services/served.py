"""What nodes say their load balancers served, each added up in the tenant that the load balancer belongs to."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from uuid import UUID

from prometheus_client import Counter
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.items import LOAD_BALANCERS, ItemKind, Relay
from agent.protocol.report import EdgeMetrics, MetricsReport
from controlplane.compile.edge import tenant_of
from controlplane.compile.snapshot import CompiledItem, Snapshot
from controlplane.errors import NotFound, Unavailable
from controlplane.resources.base import Key
from controlplane.services.agents import Agent
from controlplane.services.delivery import Delivery
from controlplane.services.view import View
from controlplane.store import telemetry
from controlplane.store.session import enter
from controlplane.store.telemetry import BUCKET_S, Rollup

DROPPED = Counter("isthmus_metrics_dropped_total", "Records of nodes about load balancers or sites that are not theirs to report.")

_COUNTED = {"http": re.compile("[1-5]xx"), "tcp": re.compile("ok|failed")}
_BOUND = re.compile(r"inf|[0-9]{1,9}(\.[0-9]{1,6})?(e\+?[0-9]{1,2})?")
_RESOURCES = {"http": "http_loadbalancer", "tcp": "tcp_loadbalancer"}


async def on_edge(delivery: Delivery, agent: Agent) -> Snapshot | None:
    """What the node's site should have, if it is a regional edge; nothing while that is not known."""
    site = agent.cache.view.sites.get(agent.site_id)
    if site is None or not site.spec.is_edge:
        return None
    try:
        return (await delivery.published(agent.cache, agent.site_id)).snapshot
    except (NotFound, Unavailable):
        return Snapshot(agent.site_id, {})


async def take(session: AsyncSession, agent: Agent, boot_id: str, report: MetricsReport, snapshot: Snapshot | None, now: datetime) -> None:
    """Once for each sequence, whole or not at all. `snapshot`: of a regional edge, whose load balancers are those of many tenants."""
    if not await telemetry.accept(session, agent.tenant_id, agent.node.id, boot_id, report.sequence):
        return
    bucket = datetime.fromtimestamp(now.timestamp() // BUCKET_S * BUCKET_S, UTC)
    if snapshot is None:
        known = [edge for edge in report.edges if _is_own(edge, agent.cache.view)]
        await telemetry.add(session, agent.tenant_id, (_rollup(agent.site_id, bucket, edge) for edge in known))
    else:
        known = [edge for edge in report.edges if _is_advertised(edge, snapshot)]
        await _add_by_tenant(session, agent, bucket, known)
    DROPPED.inc(len(report.edges) - len(known))


async def _add_by_tenant(session: AsyncSession, agent: Agent, bucket: datetime, edges: Iterable[EdgeMetrics]) -> None:
    """Every tenant's rows as that tenant. All nodes go through tenants in the same order, so that no two wait for each other."""
    found: dict[UUID, list[EdgeMetrics]] = defaultdict(list)
    for edge in edges:
        found[UUID(tenant_of(edge.load_balancer))].append(edge)
    for tenant_id, own in sorted(found.items()):
        try:
            async with session.begin_nested():
                await enter(session, tenant_id)
                await telemetry.add(session, tenant_id, (_rollup(agent.site_id, bucket, edge, f"{tenant_id}/") for edge in own))
        except IntegrityError:  # the tenant was deleted a moment ago
            DROPPED.inc(len(own))
    await enter(session, agent.tenant_id)


def _is_own(edge: EdgeMetrics, view: View) -> bool:
    """Of a load balancer and a site that the tenant has: a node cannot make up names."""
    namespace, _, name = edge.load_balancer.partition("/")
    known = view.intent.of(_RESOURCES[edge.protocol])
    return Key(namespace, name) in known and (not edge.destination or edge.destination in view.sites)


def _is_advertised(edge: EdgeMetrics, snapshot: Snapshot) -> bool:
    """Of a load balancer that is on this regional edge, and of a site of the same tenant."""
    if (LOAD_BALANCERS[edge.protocol], edge.load_balancer) not in snapshot.items:
        return False
    relay = snapshot.items.get((ItemKind.RELAY, tenant_of(edge.load_balancer)))
    return not edge.destination or (relay is not None and edge.destination in _sites(relay))


@lru_cache(1024)
def _sites(relay: CompiledItem) -> frozenset[str]:
    return frozenset(Relay.read(relay.body).sites)


def _rollup(source_site: str, bucket: datetime, edge: EdgeMetrics, prefix: str = "") -> Rollup:
    return Rollup(
        bucket=bucket,
        load_balancer=edge.load_balancer.removeprefix(prefix),
        protocol=edge.protocol,
        source_site=source_site,
        destination_site=edge.destination,
        requests=_named(edge.requests, _COUNTED[edge.protocol]),
        latency_ms=_named(edge.latency_ms, _BOUND),
        latency_sum_ms=edge.latency_sum_ms,
        bytes_sent=edge.bytes_sent,
        bytes_received=edge.bytes_received,
    )


def _named(counts: Mapping[str, int], known: re.Pattern[str]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if known.fullmatch(name)}
