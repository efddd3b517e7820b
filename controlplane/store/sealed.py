"""What is sealed under which version of the key-encryption key: secrets of objects, and keys of authorities."""

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from sqlalchemy import LargeBinary, func, literal, select, text, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from controlplane.store.rows import values
from controlplane.store.secrets import SealedSecret
from controlplane.store.tables import SecretRow

_VERSION_BYTES = 4
"""With which everything sealed begins."""


async def under(definer: AsyncConnection | AsyncSession) -> dict[int, int]:
    """How much of all tenants and the fabric is sealed under each version."""
    rows = await definer.execute(text("SELECT version, amount FROM sealed_under() ORDER BY version"))
    return {row.version: row.amount for row in rows}


async def secrets_not_under(
    session: AsyncSession, tenant_id: UUID, version: int, after: SealedSecret | None, most: int
) -> tuple[SealedSecret, ...]:
    """A tenant's secrets that are sealed under other versions, from the one after `after`; nobody else changes them until the transaction ends."""
    header = literal(version.to_bytes(_VERSION_BYTES, "big"), LargeBinary)
    query = select(SecretRow).where(SecretRow.tenant_id == tenant_id, func.substring(SecretRow.sealed, 1, _VERSION_BYTES) != header)
    if after is not None:
        query = query.where(tuple_(SecretRow.uid, SecretRow.version) > (after.uid, after.version))
    query = query.order_by(SecretRow.uid, SecretRow.version).limit(most).with_for_update()
    return values(SealedSecret, await session.scalars(query))


async def put_secrets(session: AsyncSession, tenant_id: UUID, sealed: Sequence[tuple[SealedSecret, bytes]]) -> None:
    """Each as it is sealed now."""
    for secret, new in sealed:
        fresh = replace(secret, sealed=new)
        statement = update(SecretRow).filter_by(tenant_id=tenant_id, uid=fresh.uid, version=fresh.version).values(sealed=fresh.sealed)
        await session.execute(statement.execution_options(synchronize_session=False))
