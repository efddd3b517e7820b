"""API credentials: of a token only the hash is kept."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import ColumnElement, delete, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controlplane.store.rows import value, values
from controlplane.store.tables import CredentialRow


@dataclass(frozen=True)
class Credential:
    id: UUID
    name: str
    namespace: str
    service: bool
    type: str
    hash: bytes
    operator: bool
    active: bool
    created_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True)
class Bearer:
    """Whose token it is."""

    tenant_id: UUID
    tenant: str
    id: UUID
    name: str
    operator: bool
    active: bool
    expires_at: datetime | None


async def bearer(definer: AsyncConnection, token_hash: bytes) -> Bearer | None:
    """Looks in all tenants: it is the token that says which one its bearer belongs to."""
    query = text("SELECT tenant_id, tenant, id, name, operator, active, expires_at FROM credential_by_hash(:hash)")
    row = (await definer.execute(query, {"hash": token_hash})).first()
    return Bearer(*row) if row else None


async def add(session: AsyncSession, tenant_id: UUID, credential: Credential) -> None:
    """Raises `IntegrityError` if the name is taken."""
    session.add(CredentialRow(tenant_id=tenant_id, **vars(credential)))
    await session.flush()


async def find(session: AsyncSession, tenant_id: UUID, name: str, *, service: bool) -> Credential | None:
    return value(Credential, await session.scalar(select(CredentialRow).where(*_named(tenant_id, name, service))))


async def list_all(session: AsyncSession, tenant_id: UUID, *, service: bool) -> tuple[Credential, ...]:
    """By name; not the operator's."""
    query = select(CredentialRow).where(
        CredentialRow.tenant_id == tenant_id, CredentialRow.service == service, CredentialRow.operator.is_(False)
    )
    return values(Credential, await session.scalars(query.order_by(CredentialRow.name)))


async def remove(session: AsyncSession, tenant_id: UUID, name: str, *, service: bool) -> None:
    await session.execute(delete(CredentialRow).where(*_named(tenant_id, name, service)))


async def renew(session: AsyncSession, tenant_id: UUID, name: str, *, service: bool, expires_at: datetime) -> None:
    await session.execute(update(CredentialRow).where(*_named(tenant_id, name, service)).values(expires_at=expires_at))


async def activate(session: AsyncSession, tenant_id: UUID, name: str, *, service: bool, active: bool) -> None:
    await session.execute(update(CredentialRow).where(*_named(tenant_id, name, service)).values(active=active))


def _named(tenant_id: UUID, name: str, service: bool) -> tuple[ColumnElement[bool], ...]:
    return CredentialRow.tenant_id == tenant_id, CredentialRow.name == name, CredentialRow.service == service
