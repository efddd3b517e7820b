"""What nodes report about their surroundings: the last word of each node, replaced as a whole."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import delete, insert, select
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.store.rows import values
from controlplane.store.tables import DiscoveryReportRow, EdgeReportRow, MetricSequenceRow, OfNode, OriginReportRow, PeerReportRow


@dataclass(frozen=True)
class DiscoveryState:
    """What one node found in one cluster."""

    node_id: UUID
    discovery: str
    """Key of the discovery, or `in-cluster`."""
    connected: bool
    reason: str
    services: list[Any] | None
    """Of `agent.protocol.report.DiscoveredService`, as JSON. None: another node of the site tells them."""
    reported_at: datetime


@dataclass(frozen=True)
class OriginState:
    """Endpoints of one pool at one node's site."""

    node_id: UUID
    pool: str
    healthy: int
    total: int
    reported_at: datetime


@dataclass(frozen=True)
class PeerState:
    """One path from one node to a peer."""

    node_id: UUID
    site_id: str
    """The peer."""
    path: str
    report: dict[str, Any]
    """An `agent.protocol.report.PeerHealth`, as JSON."""
    reported_at: datetime


@dataclass(frozen=True)
class EdgeState:
    """One node's reverse tunnels to a regional edge."""

    node_id: UUID
    site_id: str
    """The edge."""
    report: dict[str, Any]
    """An `agent.protocol.report.EdgeHealth`, as JSON."""
    reported_at: datetime


async def replace_discoveries(session: AsyncSession, tenant_id: UUID, node_id: UUID, states: Iterable[DiscoveryState]) -> None:
    await _replace(session, tenant_id, node_id, DiscoveryReportRow, (vars(state) for state in states))


async def replace_origins(session: AsyncSession, tenant_id: UUID, node_id: UUID, states: Iterable[OriginState]) -> None:
    await _replace(session, tenant_id, node_id, OriginReportRow, (vars(state) for state in states))


async def replace_peers(session: AsyncSession, tenant_id: UUID, node_id: UUID, states: Iterable[PeerState]) -> None:
    await _replace(session, tenant_id, node_id, PeerReportRow, (vars(state) for state in states))


async def replace_edges(session: AsyncSession, tenant_id: UUID, node_id: UUID, states: Iterable[EdgeState]) -> None:
    await _replace(session, tenant_id, node_id, EdgeReportRow, (vars(state) for state in states))


async def _replace(session: AsyncSession, tenant_id: UUID, node_id: UUID, table: type[OfNode], rows: Iterable[Mapping[str, Any]]) -> None:
    await session.execute(delete(table).where(table.tenant_id == tenant_id, table.node_id == node_id))
    if found := [{"tenant_id": tenant_id, **row} for row in rows]:
        await session.execute(insert(table), found)


async def discoveries(session: AsyncSession, tenant_id: UUID, node_ids: Collection[UUID]) -> tuple[DiscoveryState, ...]:
    query = select(DiscoveryReportRow).filter_by(tenant_id=tenant_id).where(DiscoveryReportRow.node_id.in_(node_ids))
    return values(DiscoveryState, await session.scalars(query.order_by(DiscoveryReportRow.discovery, DiscoveryReportRow.node_id)))


async def origins(session: AsyncSession, tenant_id: UUID, node_ids: Collection[UUID], pools: Collection[str]) -> tuple[OriginState, ...]:
    """Sorted by pool."""
    query = select(OriginReportRow).filter_by(tenant_id=tenant_id)
    query = query.where(OriginReportRow.node_id.in_(node_ids), OriginReportRow.pool.in_(pools))
    return values(OriginState, await session.scalars(query.order_by(OriginReportRow.pool, OriginReportRow.node_id)))


async def peers(session: AsyncSession, tenant_id: UUID, node_ids: Collection[UUID]) -> tuple[PeerState, ...]:
    query = select(PeerReportRow).filter_by(tenant_id=tenant_id).where(PeerReportRow.node_id.in_(node_ids))
    return values(PeerState, await session.scalars(query.order_by(PeerReportRow.site_id, PeerReportRow.path, PeerReportRow.node_id)))


async def edges(session: AsyncSession, tenant_id: UUID, node_ids: Collection[UUID]) -> tuple[EdgeState, ...]:
    query = select(EdgeReportRow).filter_by(tenant_id=tenant_id).where(EdgeReportRow.node_id.in_(node_ids))
    return values(EdgeState, await session.scalars(query.order_by(EdgeReportRow.site_id, EdgeReportRow.node_id)))


# Boots of nodes: a report is known by (boot id, sequence)


async def known_boots(session: AsyncSession, tenant_id: UUID, boots: Collection[tuple[UUID, str]]) -> set[tuple[UUID, str]]:
    """Those of these boots of nodes that have reported at all."""
    columns = (MetricSequenceRow.node_id, MetricSequenceRow.boot_id)
    query = select(*columns).filter_by(tenant_id=tenant_id).where(MetricSequenceRow.node_id.in_([node_id for node_id, _ in boots]))
    return {(node_id, boot_id) for node_id, boot_id in await session.execute(query)} & {*boots}


async def note_boot(session: AsyncSession, tenant_id: UUID, node_id: UUID, boot_id: str) -> None:
    """From its first report on, a boot replaces those before it. Until the transaction ends, other reports of the node wait."""
    row = {"tenant_id": tenant_id, "node_id": node_id, "boot_id": boot_id, "sequence": -1}
    statement = upsert(MetricSequenceRow).values(row)
    statement = statement.on_conflict_do_update(index_elements=["tenant_id", "node_id", "boot_id"], set_={"boot_id": boot_id})
    if await session.scalar(statement.returning(MetricSequenceRow.sequence)) == -1:
        older = delete(MetricSequenceRow).filter_by(tenant_id=tenant_id, node_id=node_id).where(MetricSequenceRow.boot_id != boot_id)
        await session.execute(older.execution_options(synchronize_session=False))
