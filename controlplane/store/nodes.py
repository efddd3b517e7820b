"""Admitted nodes, their last heartbeats, and the proofs that they used."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import ARRAY, DateTime, Text, Uuid, bindparam, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from agent.protocol.enrolment import PROOF_LIFE_S
from agent.protocol.items import shard
from controlplane.store.rows import value, values
from controlplane.store.tables import NodeRow, NodeStatusRow, TenantRow


@dataclass(frozen=True)
class Node:
    """What replicas keep in memory of each."""

    id: UUID
    site_id: UUID
    name: str
    public_key_pem: str
    revision: int
    """The tenant's revision at which key, gateways, their listener, IPsec, exports, revocation or loss last changed."""
    created_at: datetime
    gateways: list[Any] = field(default_factory=list)
    """Of `agent.protocol.items.Gateway`, as JSON."""
    gateway_listener: dict[str, Any] | None = None
    """An `agent.protocol.report.GatewayListener`, as JSON."""
    ipsec: dict[str, Any] | None = None
    """An `agent.protocol.report.IpsecAbility`, as JSON."""
    revoked_at: datetime | None = None
    lost_at: datetime | None = None
    """Since when its site counts as lost."""
    exports: dict[str, Any] | None = None
    """An `agent.protocol.report.MultiClusterServices`, as JSON."""
    exports_revision: int = 0
    """At which it last said so: of the nodes of a site, the last one is right."""


@dataclass(frozen=True, kw_only=True)
class CertifiedNode(Node):
    """With what it was given to prove itself to its peers."""

    certificate_pem: str
    certificate_expires_at: datetime
    leaves: list[Any] = field(default_factory=list)
    """Serial (hex), end (Unix seconds) and issuer (key identifier) of each certificate that it was given and that had not expired when the last
    one was issued.
    """


@dataclass(frozen=True)
class NodeStatus:
    """A node's last heartbeat."""

    node_id: UUID
    boot_id: str
    sequence: int
    last_heartbeat_at: datetime
    applied_hash: str | None
    applied_revision: int
    rejected: list[Any]
    """Of `agent.protocol.report.Rejection`, as JSON."""
    proxy: str
    warnings: list[str]
    clock_skew_s: float
    version: str
    issuer: str = ""
    """Key identifier of the authority whose leaf it uses."""
    twin_at: datetime | None = None
    """When a boot of it was last heard of that another had replaced."""


async def add(session: AsyncSession, tenant_id: UUID, node: CertifiedNode) -> None:
    session.add(NodeRow(tenant_id=tenant_id, **asdict(node)))
    await session.flush()


async def get(session: AsyncSession, tenant_id: UUID, node_id: UUID, *, lock: bool = False) -> CertifiedNode | None:
    """`lock` keeps others from changing it until the transaction ends."""
    query = select(NodeRow).filter_by(tenant_id=tenant_id, id=node_id)
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    return value(CertifiedNode, await session.scalar(query))


async def live(session: AsyncSession, tenant_id: UUID, site_ids: Collection[UUID] | None = None) -> tuple[CertifiedNode, ...]:
    """Those that are not revoked, of these sites or of all, by site and name."""
    query = select(NodeRow).filter_by(tenant_id=tenant_id, revoked_at=None)
    if site_ids is not None:
        query = query.where(NodeRow.site_id.in_(site_ids))
    return values(CertifiedNode, await session.scalars(query.order_by(NodeRow.site_id, NodeRow.name)))


async def gateway_listeners(
    session: AsyncSession, tenant_id: UUID, site_ids: Collection[UUID], ports: Collection[int]
) -> tuple[tuple[str, str, dict[str, Any]], ...]:
    """Id of the site, name of the node and `Node.gateway_listener`, of the live nodes at these sites, by both; some of other ports may be among them."""
    columns = NodeRow.site_id, NodeRow.name, NodeRow.gateway_listener
    near = NodeRow.gateway_listener["port"].as_integer().between(min(ports), max(ports))
    query = select(*columns).filter_by(tenant_id=tenant_id, revoked_at=None).where(NodeRow.site_id.in_(site_ids), near)
    rows = await session.execute(query.order_by(NodeRow.site_id, NodeRow.name))
    return tuple((str(site_id), name, listener) for site_id, name, listener in rows if listener)


async def count_live(session: AsyncSession, tenant_id: UUID) -> int:
    """The size of the tenant's fleet."""
    return await session.scalar(select(func.count()).select_from(NodeRow).filter_by(tenant_id=tenant_id, revoked_at=None)) or 0


async def change(session: AsyncSession, tenant_id: UUID, node_id: UUID, **columns: Any) -> None:
    """Set columns of a node."""
    statement = update(NodeRow).filter_by(tenant_id=tenant_id, id=node_id).values(**columns)
    await session.execute(statement.execution_options(synchronize_session=False))


async def revoke(session: AsyncSession, tenant_id: UUID, node_ids: Collection[UUID], revision: int, now: datetime) -> bool:
    """From that revision on they are nobody's peers, and their proofs are refused. False if all of them were revoked before."""
    statement = update(NodeRow).filter_by(tenant_id=tenant_id, revoked_at=None).where(NodeRow.id.in_(node_ids))
    statement = statement.values(revoked_at=now, revision=revision, gateways=[], gateway_listener=None, ipsec=None).returning(
        NodeRow.site_id
    )
    sites = (await session.scalars(statement.execution_options(synchronize_session=False))).all()
    if sites:
        latest = {shard(str(site_id)): revision for site_id in sites}
        noted = update(TenantRow).filter_by(id=tenant_id).values(revocations=TenantRow.revocations.concat(latest))
        await session.execute(noted.execution_options(synchronize_session=False))
    return bool(sites)


async def revoked_serials(session: AsyncSession, tenant_id: UUID, now: datetime) -> tuple[int, ...]:
    """Of certificates that would be good if their nodes were not revoked."""
    query = (
        select(NodeRow.leaves).filter_by(tenant_id=tenant_id).where(NodeRow.revoked_at.is_not(None), NodeRow.certificate_expires_at > now)
    )
    return tuple(int(serial, 16) for leaves in await session.scalars(query) for serial, until, _ in leaves if until > now.timestamp())


async def forget_revoked(session: AsyncSession, tenant_id: UUID, before: datetime) -> None:
    """Delete those that were revoked before that time, with all that they said."""
    statement = delete(NodeRow).filter_by(tenant_id=tenant_id).where(NodeRow.revoked_at < before)
    await session.execute(statement.execution_options(synchronize_session=False))


# Leases


@dataclass(frozen=True)
class SiteLease:
    """When a site that has nodes was last heard of."""

    tenant_id: UUID
    site_id: UUID
    nodes: int
    heard_at: datetime | None
    """The last heartbeat of any of its nodes."""
    lost_at: datetime | None
    """Since when some of its nodes count as lost."""
    lost: bool
    """Whether all of them do."""


async def leases(definer: AsyncConnection | AsyncSession, tenant_id: UUID | None = None) -> tuple[SiteLease, ...]:
    """Of one tenant, or of all."""
    query = text("SELECT tenant_id, site_id, nodes, heard_at, lost_at, lost FROM site_leases(CAST(:wanted AS uuid))")
    found = await definer.execute(query, {"wanted": tenant_id})
    return tuple(SiteLease(*row) for row in found)


async def mark_lost(session: AsyncSession, tenant_id: UUID, site_ids: Collection[UUID], revision: int, at: datetime | None) -> None:
    """From that revision on these sites count as lost; None: no more."""
    statement = update(NodeRow).filter_by(tenant_id=tenant_id, revoked_at=None).where(NodeRow.site_id.in_(site_ids))
    await session.execute(statement.values(lost_at=at, revision=revision).execution_options(synchronize_session=False))


# Heartbeats


async def statuses(session: AsyncSession, tenant_id: UUID, node_ids: Collection[UUID] | None = None) -> dict[UUID, NodeStatus]:
    """By node; those that never sent a heartbeat are missing."""
    query = select(NodeStatusRow).filter_by(tenant_id=tenant_id)
    if node_ids is not None:
        query = query.where(NodeStatusRow.node_id.in_(node_ids))
    return {row.node_id: value(NodeStatus, row) for row in await session.scalars(query)}


_REPEATABLE_S = 2 * PROOF_LIFE_S
"""A proof from a clock that is ahead is good for so long."""
_REPLACED = text("""
    CASE WHEN node_status.boot_id = excluded.boot_id THEN node_status.replaced ELSE (
        SELECT coalesce(jsonb_object_agg(key, value), '{}') FROM jsonb_each(node_status.replaced)
        WHERE value::float > extract(epoch FROM excluded.last_heartbeat_at) - :repeatable_s
    ) || jsonb_build_object(node_status.boot_id, extract(epoch FROM excluded.last_heartbeat_at)) END
""").bindparams(repeatable_s=_REPEATABLE_S)
_IS_NEWER = text("""
    CASE WHEN node_status.boot_id = excluded.boot_id THEN node_status.sequence < excluded.sequence
    ELSE node_status.last_heartbeat_at < excluded.last_heartbeat_at AND coalesce(
        (node_status.replaced ->> excluded.boot_id)::float <= extract(epoch FROM excluded.last_heartbeat_at) - :repeatable_s, true
    ) END
""").bindparams(repeatable_s=_REPEATABLE_S)


async def write_statuses(session: AsyncSession, tenant_id: UUID, heartbeats: Iterable[NodeStatus]) -> None:
    """One statement for all. What is older never overwrites: by its sequence within a boot, by the time it was heard between boots.

    A boot that was replaced stays so for as long as somebody could repeat a proof of it.
    """
    rows = [{"tenant_id": tenant_id, **asdict(status)} for status in heartbeats]
    statement = insert(NodeStatusRow)
    new = statement.excluded
    statement = statement.on_conflict_do_update(
        index_elements=["tenant_id", "node_id"],
        set_={column: new[column] for column in rows[0] if column not in ("tenant_id", "node_id")}
        | {"replaced": _REPLACED, "twin_at": func.coalesce(new.twin_at, NodeStatusRow.twin_at)},
        where=_IS_NEWER,
    )
    await session.execute(statement, rows)


_TWINS = text("""
    UPDATE node_status s SET twin_at = b.heard_at
    FROM unnest(:nodes, :boots, :heard) AS b (node_id, boot_id, heard_at)
    WHERE s.tenant_id = :tenant_id AND s.node_id = b.node_id AND s.boot_id <> b.boot_id
        AND extract(epoch FROM b.heard_at) > (s.replaced ->> b.boot_id)::float + :margin_s
""").bindparams(
    bindparam("nodes", type_=ARRAY(Uuid())),
    bindparam("boots", type_=ARRAY(Text())),
    bindparam("heard", type_=ARRAY(DateTime(timezone=True))),
)
_TWIN_MARGIN_S = 5.0
"""A restart may be heard of by another replica, whose clock differs, before the last word of the boot before it."""


async def note_twins(session: AsyncSession, tenant_id: UUID, heartbeats: Collection[NodeStatus]) -> None:
    """A boot that goes on speaking after another one replaced it is no restart: somebody has copied a state directory."""
    heard = {
        "nodes": [status.node_id for status in heartbeats],
        "boots": [status.boot_id for status in heartbeats],
        "heard": [status.last_heartbeat_at for status in heartbeats],
    }
    await session.execute(_TWINS, {"tenant_id": tenant_id, "margin_s": _TWIN_MARGIN_S, **heard})


# Proofs


Verdict = Literal["spent", "replayed", "revoked"]
"""On a proof."""
_SPEND = text("""
    WITH asked AS (
        SELECT * FROM unnest(CAST(:nodes AS uuid[]), CAST(:jtis AS text[]), CAST(:ends AS timestamptz[])) AS a(node_id, jti, expires_at)
    ), live AS (
        SELECT asked.* FROM asked JOIN nodes n ON n.tenant_id = :tenant_id AND n.id = asked.node_id AND n.revoked_at IS NULL
    ), fresh AS (
        INSERT INTO proofs (tenant_id, node_id, jti, expires_at)
        SELECT :tenant_id, node_id, jti, expires_at FROM live ORDER BY node_id, jti
        ON CONFLICT DO NOTHING RETURNING node_id, jti
    )
    SELECT asked.node_id, asked.jti, live.jti IS NOT NULL, fresh.jti IS NOT NULL
    FROM asked LEFT JOIN live USING (node_id, jti) LEFT JOIN fresh USING (node_id, jti)
""")


async def spend(session: AsyncSession, tenant_id: UUID, node_id: UUID, jti: str, expires_at: datetime) -> Verdict:
    """Note that a proof was used: by a node that is not revoked, by what is committed now, and for the first time."""
    return (await spend_all(session, tenant_id, {(node_id, jti): expires_at}))[node_id, jti]


async def spend_all(session: AsyncSession, tenant_id: UUID, proofs: Mapping[tuple[UUID, str], datetime]) -> dict[tuple[UUID, str], Verdict]:
    """Likewise many, by node and `jti`, with when each expires."""
    given = {
        "tenant_id": tenant_id,
        "nodes": [node_id for node_id, _ in proofs],
        "jtis": [jti for _, jti in proofs],
        "ends": [*proofs.values()],
    }
    found = await session.execute(_SPEND, given)
    return {(node_id, jti): "revoked" if not live else "spent" if fresh else "replayed" for node_id, jti, live, fresh in found}
