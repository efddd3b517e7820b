"""What tenants and regional edges know of each other, and which edges a site is connected to."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any
from uuid import UUID

from sqlalchemy import delete, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controlplane.resources.base import Key
from controlplane.store.changes import StoredJson, written
from controlplane.store.nodes import NodeStatus
from controlplane.store.rows import values
from controlplane.store.tables import HomeEdgesRow, ResourceRow


@dataclass(frozen=True)
class EdgeList:
    """All regional edges, as every tenant may know them."""

    operator_id: UUID
    """The tenant that they are in."""
    revision: int
    """Of that tenant."""
    edges: tuple[tuple[StoredJson, tuple[Any, ...]], ...]
    """With the gateways of each, of `agent.protocol.items.Gateway` as JSON, by node id."""


@dataclass(frozen=True)
class ShareRow:
    """What regional edges need to know of a tenant."""

    tenant_id: UUID
    revision: int
    anchor_pem: str
    crl_pem: str
    sites: tuple[str, ...]
    """Ids of the customer edges that have live nodes, sorted."""
    public: bool
    """Whether it owns public names, and so may have load balancers on edges."""
    revocations: Mapping[str, int]
    """See `Site.revocations` of the items."""


@dataclass(frozen=True)
class Homes:
    site_id: UUID
    edges: list[str]
    """Ids, in the order of use."""
    basis: dict[str, Any]
    revision: int


async def list_all(definer: AsyncConnection | AsyncSession) -> EdgeList | None:
    """None before the first start."""
    rows = (await definer.execute(text("SELECT * FROM edge_list()"))).all()
    if not rows:
        return None
    found = ((written(row.site), tuple(row.gateways or ())) for row in rows if row.site)
    return EdgeList(rows[0].tenant_id, rows[0].revision, tuple(found))


async def names(session: AsyncSession) -> frozenset[Key]:
    listed = await list_all(session)
    return frozenset(json.key for json, _ in listed.edges) if listed else frozenset()


async def shares(definer: AsyncConnection, tenant_ids: Collection[UUID] | None) -> tuple[ShareRow, ...]:
    """Of these tenants, without those that are gone; None: of all."""
    wanted = None if tenant_ids is None else list(tenant_ids)
    rows = await definer.execute(text("SELECT * FROM edge_shares(CAST(:wanted AS uuid[]))"), {"wanted": wanted})
    return tuple(
        ShareRow(row.tenant_id, row.revision, row.anchor_pem, row.crl_pem, tuple(row.sites), row.public, row.revocations) for row in rows
    )


async def statuses(definer: AsyncConnection) -> dict[UUID, NodeStatus]:
    """Last heartbeats of the nodes of regional edges, by node."""
    rows = await definer.execute(text("SELECT * FROM edge_status_list()"))
    return {row.node_id: NodeStatus(**{field.name: getattr(row, field.name) for field in fields(NodeStatus)}) for row in rows}


# Homes of customer edges


async def homes(session: AsyncSession, tenant_id: UUID) -> dict[UUID, Homes]:
    """By site."""
    rows = await session.scalars(select(HomeEdgesRow).filter_by(tenant_id=tenant_id))
    return {found.site_id: found for found in values(Homes, rows)}


async def put_homes(session: AsyncSession, tenant_id: UUID, found: Homes) -> None:
    statement = insert(HomeEdgesRow).values(tenant_id=tenant_id, **vars(found))
    new = {"edges": found.edges, "basis": found.basis, "revision": found.revision}
    await session.execute(statement.on_conflict_do_update(index_elements=["tenant_id", "site_id"], set_=new))


async def forget_homes(session: AsyncSession, tenant_id: UUID, site_ids: Collection[UUID]) -> None:
    statement = delete(HomeEdgesRow).filter_by(tenant_id=tenant_id).where(HomeEdgesRow.site_id.in_(site_ids))
    await session.execute(statement.execution_options(synchronize_session=False))


async def customers(session: AsyncSession, tenant_id: UUID) -> Mapping[UUID, dict[str, Any]]:
    """Specs of the tenant's customer edges, by id."""
    spec = ResourceRow.spec
    query = select(ResourceRow.uid, spec).filter_by(tenant_id=tenant_id, kind="site")
    return {row.uid: row.spec for row in await session.execute(query) if row.spec["site_type"] == "CUSTOMER_EDGE"}
