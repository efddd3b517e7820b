"""Tenants and their revisions."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import delete, select, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controlplane.store.tables import NodeRow, ResourceRow, TenantRow


@dataclass(frozen=True)
class TenantRecord:
    id: UUID
    name: str
    revision: int
    created_at: datetime


async def create(session: AsyncSession, tenant_id: UUID, name: str, now: datetime) -> None:
    """The session must have entered the new tenant already. Raises `IntegrityError` if the name is taken."""
    session.add(TenantRow(id=tenant_id, name=name, created_at=now))
    await session.flush()


async def remove(session: AsyncSession, tenant_id: UUID) -> None:
    """With everything that belongs to it."""
    await session.execute(delete(TenantRow).where(TenantRow.id == tenant_id))


async def name(session: AsyncSession, tenant_id: UUID) -> str:
    return (await session.execute(select(TenantRow.name).where(TenantRow.id == tenant_id))).scalar_one()


async def lock(session: AsyncSession, tenant_id: UUID) -> None:
    """Until the end of the transaction its revision is raised by nobody else."""
    await session.execute(select(TenantRow.id).where(TenantRow.id == tenant_id).with_for_update(key_share=True))


async def has_sites(session: AsyncSession, tenant_id: UUID) -> bool:
    """Whether it has sites, or nodes that were not revoked."""
    sites = select(ResourceRow.uid).where(ResourceRow.tenant_id == tenant_id, ResourceRow.kind == "site").limit(1)
    nodes = select(NodeRow.id).where(NodeRow.tenant_id == tenant_id, NodeRow.revoked_at.is_(None)).limit(1)
    return await session.scalar(sites) is not None or await session.scalar(nodes) is not None


async def find(definer: AsyncConnection | AsyncSession, name: str) -> UUID | None:
    """The id of any tenant; for operators."""
    return (await definer.execute(text("SELECT id FROM tenant_by_name(:name)"), {"name": name})).scalar()


async def list_all(definer: AsyncConnection | AsyncSession) -> tuple[TenantRecord, ...]:
    """Every tenant, by name; for operators, and for loops that visit each."""
    rows = await definer.execute(text("SELECT id, name, revision, created_at FROM tenant_list()"))
    return tuple(TenantRecord(row.id, row.name, row.revision, row.created_at) for row in rows)
