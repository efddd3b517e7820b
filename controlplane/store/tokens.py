"""Registration tokens: who may enrol, how often, until when."""

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import delete as delete_rows
from sqlalchemy import or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.store.rows import value, values
from controlplane.store.tables import TokenRow


@dataclass(frozen=True)
class Token:
    id: UUID
    name: str
    meta: dict[str, Any]
    """`resources.base.Metadata` as JSON."""
    site_name: str | None
    """None: it may bring any new site."""
    approve: bool
    """Whether its bearers are admitted without a person."""
    uses: int
    max_uses: int
    """0: unlimited."""
    created_at: datetime
    expires_at: datetime
    revoked_at: datetime | None = None
    edge: bool = False
    """Whether the operator made it for a regional edge."""
    creator_id: str = ""
    creator_class: str = ""

    def refusal(self, now: datetime) -> str | None:
        """Why it admits nobody; None if it does."""
        if self.revoked_at:
            return f"was revoked at {self.revoked_at.isoformat(timespec='seconds')}"
        if now >= self.expires_at:
            expired, ours = self.expires_at.isoformat(timespec="seconds"), now.isoformat(timespec="seconds")
            return f"expired at {expired}; the control plane's clock says {ours}"
        if self.meta["disable"]:
            return "is disabled"
        if self.max_uses and self.uses >= self.max_uses:
            return f"was used {self.uses} of {self.max_uses} times"
        return None


async def create(session: AsyncSession, tenant_id: UUID, token: Token) -> None:
    session.add(TokenRow(tenant_id=tenant_id, **asdict(token)))
    await session.flush()


async def get(session: AsyncSession, tenant_id: UUID, name: str) -> Token | None:
    return value(Token, await session.scalar(select(TokenRow).filter_by(tenant_id=tenant_id, name=name)))


async def by_id(session: AsyncSession, tenant_id: UUID, token_id: UUID) -> Token | None:
    return value(Token, await session.scalar(select(TokenRow).filter_by(tenant_id=tenant_id, id=token_id)))


async def list_all(session: AsyncSession, tenant_id: UUID) -> tuple[Token, ...]:
    """By name."""
    return values(Token, await session.scalars(select(TokenRow).filter_by(tenant_id=tenant_id).order_by(TokenRow.name)))


async def use(session: AsyncSession, tenant_id: UUID, token_id: UUID, now: datetime) -> bool:
    """Count one use; False if the token admits nobody."""
    statement = (
        update(TokenRow)
        .filter_by(tenant_id=tenant_id, id=token_id, revoked_at=None)
        .where(TokenRow.expires_at > now, ~TokenRow.meta["disable"].as_boolean())
        .where(or_(TokenRow.max_uses == 0, TokenRow.uses < TokenRow.max_uses))
        .values(uses=TokenRow.uses + 1)
        .returning(TokenRow.id)
        .execution_options(synchronize_session=False)
    )
    return await session.scalar(statement) is not None


async def describe(session: AsyncSession, tenant_id: UUID, name: str, meta: dict[str, Any]) -> None:
    statement = update(TokenRow).filter_by(tenant_id=tenant_id, name=name).values(meta=meta)
    await session.execute(statement.execution_options(synchronize_session=False))
    session.expire_all()


async def revoke(session: AsyncSession, tenant_id: UUID, name: str, now: datetime) -> None:
    """A token that was revoked stays so."""
    statement = update(TokenRow).filter_by(tenant_id=tenant_id, name=name, revoked_at=None).values(revoked_at=now)
    await session.execute(statement.execution_options(synchronize_session=False))
    session.expire_all()


async def revoke_of_site(session: AsyncSession, tenant_id: UUID, site_name: str, now: datetime) -> None:
    """All that admit to it alone."""
    statement = update(TokenRow).filter_by(tenant_id=tenant_id, site_name=site_name, revoked_at=None).values(revoked_at=now)
    await session.execute(statement.execution_options(synchronize_session=False))
    session.expire_all()


async def delete(session: AsyncSession, tenant_id: UUID, name: str) -> None:
    statement = delete_rows(TokenRow).filter_by(tenant_id=tenant_id, name=name)
    await session.execute(statement.execution_options(synchronize_session=False))


async def forget_ended(session: AsyncSession, tenant_id: UUID, before: datetime) -> None:
    """Delete those that expired or were revoked before that time."""
    ended = or_(TokenRow.expires_at < before, TokenRow.revoked_at < before)
    await session.execute(delete_rows(TokenRow).filter_by(tenant_id=tenant_id).where(ended).execution_options(synchronize_session=False))
