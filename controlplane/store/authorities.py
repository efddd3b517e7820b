"""Certificate authorities as stored: certificates in clear, keys sealed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID, uuid4

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controlplane.store.rows import value, values
from controlplane.store.tables import AuthorityRow

State = Literal["added", "active", "retiring", "removed"]
TRUSTED: Sequence[State] = ("added", "active", "retiring")


@dataclass(frozen=True)
class SealedAuthority:
    role: str
    """`root`, `servers`, `edges`, `tokens` or `tenant`."""
    tenant_id: UUID | None
    """None: the fabric's."""
    version: int
    state: State
    state_at: datetime
    """Since when it is in that state."""
    certificate_pem: str
    sealed_key: bytes
    crl_pem: str = ""


async def add(session: AsyncSession, authority: SealedAuthority, now: datetime) -> None:
    session.add(AuthorityRow(id=uuid4(), created_at=now, **vars(authority)))
    await session.flush()


async def active(session: AsyncSession, tenant_id: UUID | None, role: str) -> SealedAuthority | None:
    """The one that signs; None if the role has none yet."""
    query = select(AuthorityRow).where(*_of(tenant_id, role), AuthorityRow.state == "active")
    return value(SealedAuthority, await session.scalar(query))


async def versions(session: AsyncSession, tenant_id: UUID | None, role: str, *, lock: bool = False) -> tuple[SealedAuthority, ...]:
    """All there ever were, newest first. `lock` keeps others from taking a step at the same time."""
    query = select(AuthorityRow).where(*_of(tenant_id, role)).order_by(AuthorityRow.version.desc())
    return values(SealedAuthority, await session.scalars(query.with_for_update() if lock else query))


async def of_owner(session: AsyncSession, tenant_id: UUID | None) -> tuple[SealedAuthority, ...]:
    """Of all roles, those that have a key; nobody else changes them until the transaction ends."""
    query = select(AuthorityRow).where(AuthorityRow.tenant_id.is_not_distinct_from(tenant_id), AuthorityRow.state.in_(TRUSTED))
    return values(SealedAuthority, await session.scalars(query.order_by(AuthorityRow.role, AuthorityRow.version).with_for_update()))


async def certificates(session: AsyncSession, tenant_id: UUID | None, role: str) -> tuple[str, ...]:
    """Every version that is trusted, in PEM, newest first."""
    query = select(AuthorityRow.certificate_pem).where(*_of(tenant_id, role), AuthorityRow.state.in_(TRUSTED))
    return tuple(await session.scalars(query.order_by(AuthorityRow.version.desc())))


async def change(session: AsyncSession, tenant_id: UUID | None, authority: SealedAuthority, **columns: Any) -> None:
    """Set columns of one version."""
    statement = update(AuthorityRow).where(*_of(tenant_id, authority.role), AuthorityRow.version == authority.version)
    await session.execute(statement.values(**columns).execution_options(synchronize_session=False))
    session.expire_all()


async def remove(session: AsyncSession, tenant_id: UUID | None, authority: SealedAuthority, now: datetime) -> None:
    """Nobody trusts it any more; its key is destroyed."""
    await change(session, tenant_id, authority, state="removed", state_at=now, sealed_key=b"", crl_pem="")


async def forget_removed(session: AsyncSession, tenant_id: UUID | None, role: str, *, keep: int) -> None:
    """All but the latest of those that were removed."""
    removed = [version for version in await versions(session, tenant_id, role) if version.state == "removed"]
    gone = delete(AuthorityRow).where(*_of(tenant_id, role))
    gone = gone.where(AuthorityRow.version.in_([version.version for version in removed[keep:]]))
    await session.execute(gone.execution_options(synchronize_session=False))


async def roots(definer: AsyncConnection) -> tuple[str, ...]:
    """As `certificates`, outside any tenant."""
    query = select(AuthorityRow.certificate_pem).where(*_of(None, "root"), AuthorityRow.state.in_(TRUSTED))
    return tuple((await definer.scalars(query.order_by(AuthorityRow.version.desc()))).all())


def _of(tenant_id: UUID | None, role: str) -> tuple[ColumnElement[bool], ...]:
    return AuthorityRow.role == role, AuthorityRow.tenant_id.is_not_distinct_from(tenant_id)
