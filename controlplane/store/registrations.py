"""Nodes that asked to become part of a site."""

from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import delete as delete_rows
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.store.rows import value, values
from controlplane.store.tables import RegistrationRow


@dataclass(frozen=True)
class Registration:
    name: str
    """`r-<uid>`."""
    uid: UUID
    token_id: UUID
    key_hash: bytes
    """SHA-256 of the public key (SubjectPublicKeyInfo in PEM)."""
    csr_pem: str
    state: str
    """`PENDING`, `APPROVED`, `ADMITTED` or `RETIRED`."""
    site_name: str
    node_name: str
    passport: dict[str, Any]
    infra: dict[str, Any]
    created_at: datetime
    state_at: datetime
    site_id: UUID | None = None
    node_id: UUID | None = None
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    clock_skew_s: float | None = None
    """Of the node when it enrolled."""
    tunnel_type: str | None = None
    """What its site's is to be; None: what it is."""


async def create(session: AsyncSession, tenant_id: UUID, registration: Registration) -> None:
    session.add(RegistrationRow(tenant_id=tenant_id, **asdict(registration)))
    await session.flush()


async def get(session: AsyncSession, tenant_id: UUID, name: str, *, lock: bool = False) -> Registration | None:
    """`lock` keeps others from changing it until the transaction ends."""
    query = select(RegistrationRow).filter_by(tenant_id=tenant_id, name=name)
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    return value(Registration, await session.scalar(query))


async def by_key(session: AsyncSession, tenant_id: UUID, key_hash: bytes) -> Registration | None:
    return value(Registration, await session.scalar(select(RegistrationRow).filter_by(tenant_id=tenant_id, key_hash=key_hash)))


async def search(
    session: AsyncSession,
    tenant_id: UUID,
    *,
    state: str | None = None,
    site_name: str | None = None,
    node_name: str | None = None,
    token_id: UUID | None = None,
) -> tuple[Registration, ...]:
    """Those that match everything that is given, oldest first."""
    wanted = {"state": state, "site_name": site_name, "node_name": node_name, "token_id": token_id}
    query = select(RegistrationRow).filter_by(tenant_id=tenant_id, **{column: want for column, want in wanted.items() if want is not None})
    return values(Registration, await session.scalars(query.order_by(RegistrationRow.created_at, RegistrationRow.name)))


async def change(session: AsyncSession, tenant_id: UUID, name: str, **columns: Any) -> Registration:
    """Set columns of a registration that exists."""
    statement = update(RegistrationRow).filter_by(tenant_id=tenant_id, name=name).values(**columns).returning(RegistrationRow)
    row = await session.scalar(statement.execution_options(populate_existing=True))
    assert row is not None
    return value(Registration, row)


async def retire_of_site(session: AsyncSession, tenant_id: UUID, site_name: str, now: datetime) -> None:
    """All of them, waiting ones too."""
    statement = update(RegistrationRow).filter_by(tenant_id=tenant_id, site_name=site_name).where(RegistrationRow.state != "RETIRED")
    await session.execute(statement.values(state="RETIRED", state_at=now).execution_options(synchronize_session=False))


async def delete(session: AsyncSession, tenant_id: UUID, name: str) -> None:
    statement = delete_rows(RegistrationRow).filter_by(tenant_id=tenant_id, name=name)
    await session.execute(statement.execution_options(synchronize_session=False))


async def retire_pending(session: AsyncSession, tenant_id: UUID, before: datetime, now: datetime) -> None:
    """Those that nobody decided about since that time."""
    statement = update(RegistrationRow).filter_by(tenant_id=tenant_id, state="PENDING").where(RegistrationRow.created_at < before)
    await session.execute(statement.values(state="RETIRED", state_at=now).execution_options(synchronize_session=False))


async def forget_retired(session: AsyncSession, tenant_id: UUID, before: datetime) -> None:
    """Delete those that retired before that time."""
    statement = delete_rows(RegistrationRow).filter_by(tenant_id=tenant_id, state="RETIRED").where(RegistrationRow.state_at < before)
    await session.execute(statement.execution_options(synchronize_session=False))
