"""What load balancers served: counts in buckets of ten seconds, and in one that is never forgotten."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import bindparam, select, text, update
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.store.rows import values
from controlplane.store.tables import MetricRollupRow, MetricSequenceRow

BUCKET_S = 10
TOTAL = datetime(9999, 1, 1, tzinfo=UTC)
"""The bucket of the sums since ever, which counters for Prometheus need: retention never reaches it."""


@dataclass(frozen=True)
class Rollup:
    bucket: datetime
    load_balancer: str
    protocol: str
    source_site: str
    """Id, as is `destination_site`."""
    destination_site: str
    """Empty when none served."""
    requests: Mapping[str, int] = field(default_factory=dict)
    latency_ms: Mapping[str, int] = field(default_factory=dict)
    """Cumulative histogram."""
    latency_sum_ms: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0


_ADD = text("""
    INSERT INTO metric_rollups AS old (tenant_id, bucket, load_balancer, protocol, source_site, destination_site,
                                       requests, latency_ms, latency_sum_ms, bytes_sent, bytes_received)
    VALUES (:tenant_id, :bucket, :load_balancer, :protocol, :source_site, :destination_site,
            :requests, :latency_ms, :latency_sum_ms, :bytes_sent, :bytes_received)
    ON CONFLICT (tenant_id, bucket, load_balancer, protocol, source_site, destination_site) DO UPDATE SET
        requests = (
            SELECT coalesce(jsonb_object_agg(key, total), '{}') FROM (
                SELECT key, sum(value::bigint) AS total
                FROM (SELECT * FROM jsonb_each_text(old.requests) UNION ALL SELECT * FROM jsonb_each_text(excluded.requests)) AS pairs
                GROUP BY key
            ) AS sums
        ),
        latency_ms = (
            SELECT coalesce(jsonb_object_agg(key, total), '{}') FROM (
                SELECT key, sum(value::bigint) AS total
                FROM (SELECT * FROM jsonb_each_text(old.latency_ms) UNION ALL SELECT * FROM jsonb_each_text(excluded.latency_ms)) AS pairs
                GROUP BY key
            ) AS sums
        ),
        latency_sum_ms = old.latency_sum_ms + excluded.latency_sum_ms,
        bytes_sent = old.bytes_sent + excluded.bytes_sent,
        bytes_received = old.bytes_received + excluded.bytes_received
""").bindparams(bindparam("requests", type_=JSONB), bindparam("latency_ms", type_=JSONB))


async def accept(session: AsyncSession, tenant_id: UUID, node_id: UUID, boot_id: str, sequence: int) -> bool:
    """Whether this report of a boot that was noted is new; from then on it and older ones are not."""
    statement = (
        update(MetricSequenceRow)
        .filter_by(tenant_id=tenant_id, node_id=node_id, boot_id=boot_id)
        .where(MetricSequenceRow.sequence < sequence)
        .values(sequence=sequence)
        .returning(MetricSequenceRow.sequence)
        .execution_options(synchronize_session=False)
    )
    return await session.scalar(statement) is not None


async def add(session: AsyncSession, tenant_id: UUID, rollups: Iterable[Rollup]) -> None:
    """To their buckets and to the totals. In the order of keys, so that two reports cannot wait for each other."""
    rows = [{"tenant_id": tenant_id, **vars(rollup)} for rollup in rollups]
    rows += [{**row, "bucket": TOTAL} for row in rows]
    if rows:
        await session.execute(_ADD, sorted(rows, key=_key))


def _key(row: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(str(row[column]) for column in ("bucket", "load_balancer", "protocol", "source_site", "destination_site"))


async def between(
    session: AsyncSession,
    tenant_id: UUID,
    start: datetime,
    end: datetime,
    *,
    namespace: str | None = None,
    name: str | None = None,
    most: int,
) -> tuple[Rollup, ...]:
    """At most `most` buckets that begin in [start, end), oldest first: of the load balancers in that namespace and of that name."""
    query = select(MetricRollupRow).filter_by(tenant_id=tenant_id)
    query = query.where(MetricRollupRow.bucket >= start, MetricRollupRow.bucket < end)
    if namespace is not None:
        query = query.where(MetricRollupRow.load_balancer.startswith(f"{namespace}/", autoescape=True))
    if name is not None:
        query = query.where(MetricRollupRow.load_balancer.endswith(f"/{name}", autoescape=True))
    return values(Rollup, await session.scalars(query.order_by(MetricRollupRow.bucket).limit(most)))


async def totals(session: AsyncSession, tenant_id: UUID) -> tuple[Rollup, ...]:
    """Sums since ever."""
    query = select(MetricRollupRow).filter_by(tenant_id=tenant_id, bucket=TOTAL)
    return values(Rollup, await session.scalars(query.order_by(MetricRollupRow.load_balancer, MetricRollupRow.source_site)))


_FORGET = text("""
    DELETE FROM metric_rollups m WHERE m.tenant_id = :tenant_id AND m.bucket = :total AND NOT EXISTS (
        SELECT FROM resources r WHERE r.tenant_id = m.tenant_id AND r.kind = m.protocol || '_loadbalancer'
        AND r.namespace || '/' || r.name = m.load_balancer
    )
""")


async def forget_gone(session: AsyncSession, tenant_id: UUID) -> None:
    """Delete the sums of load balancers that are gone."""
    await session.execute(_FORGET, {"tenant_id": tenant_id, "total": TOTAL})
