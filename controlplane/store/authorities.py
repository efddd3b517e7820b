"""Certificate authorities as stored: certificates in clear, keys sealed."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID, uuid4

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.store.rows import value
from controlplane.store.tables import AuthorityRow


@dataclass(frozen=True)
class SealedAuthority:
    role: str
    """`root`, `servers`, `edges`, `tokens` or `tenant`."""
    tenant_id: UUID | None
    """None: the fabric's."""
    version: int
    certificate_pem: str
    sealed_key: bytes


async def add(session: AsyncSession, authority: SealedAuthority, now: datetime) -> None:
    session.add(AuthorityRow(id=uuid4(), created_at=now, **vars(authority)))
    await session.flush()


async def newest(session: AsyncSession, tenant_id: UUID | None, role: str) -> SealedAuthority | None:
    """The one that signs; None if the role has none yet."""
    query = select(AuthorityRow).where(AuthorityRow.role == role, AuthorityRow.tenant_id.is_not_distinct_from(tenant_id))
    row = await session.scalar(query.order_by(AuthorityRow.version.desc()).limit(1))
    return value(SealedAuthority, row)


async def certificates(session: AsyncSession, tenant_id: UUID | None, role: str) -> tuple[str, ...]:
    """Every version in PEM, newest first: what to trust while a rotation is under way."""
    query = select(AuthorityRow.certificate_pem).where(AuthorityRow.role == role, AuthorityRow.tenant_id.is_not_distinct_from(tenant_id))
    return tuple(await session.scalars(query.order_by(AuthorityRow.version.desc())))
