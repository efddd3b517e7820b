"""Public names, each of which belongs to one tenant of all."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import delete, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controlplane.store.locks import Lock, take
from controlplane.store.rows import values
from controlplane.store.tables import PublicClaimRow


@dataclass(frozen=True)
class PublicName:
    name: str
    granted: bool
    """Whether the operator gave it; otherwise its DNS proved it."""
    created_at: datetime


@dataclass(frozen=True)
class OwnedName(PublicName):
    tenant: str
    """Name of the owner."""


async def list_own(session: AsyncSession, tenant_id: UUID) -> tuple[PublicName, ...]:
    """By name."""
    return values(PublicName, await session.scalars(select(PublicClaimRow).filter_by(tenant_id=tenant_id).order_by(PublicClaimRow.name)))


async def add(session: AsyncSession, tenant_id: UUID, wanted: PublicName) -> bool:
    """False if it, something under it, or what it is under belongs to another tenant. Whoever has it keeps it."""
    await take(session, Lock.PUBLIC_NAMES)
    taken = text("SELECT public_name_is_taken(:name, :tenant_id)")
    if (await session.execute(taken, {"name": wanted.name, "tenant_id": tenant_id})).scalar_one():
        return False
    row = {"tenant_id": tenant_id, "name": wanted.name, "granted": wanted.granted, "created_at": wanted.created_at}
    await session.execute(insert(PublicClaimRow).values(row).on_conflict_do_nothing())
    return True


async def remove(session: AsyncSession, tenant_id: UUID, name: str) -> bool:
    """False if the tenant does not have it."""
    statement = delete(PublicClaimRow).filter_by(tenant_id=tenant_id, name=name).returning(PublicClaimRow.name)
    return await session.scalar(statement.execution_options(synchronize_session=False)) is not None


async def list_all(definer: AsyncConnection | AsyncSession) -> tuple[OwnedName, ...]:
    """Of all tenants, by name; for operators."""
    rows = await definer.execute(text("SELECT name, tenant, granted, created_at FROM public_claim_list()"))
    return tuple(OwnedName(row.name, row.granted, row.created_at, row.tenant) for row in rows)
