"""Advisory locks of the database: one for each job that is done by one replica at a time."""

from enum import IntEnum, unique

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

_TAKE = text("SELECT pg_advisory_xact_lock(:lock)")
_TRY = text("SELECT pg_try_advisory_xact_lock(:lock)")


@unique
class Lock(IntEnum):
    """Values are those in the database, so they stay."""

    MIGRATION = 0x1571_0001
    START = 0x1571_0002
    RETENTION = 0x1571_0003
    LEASES = 0x1571_0004
    PUBLIC_NAMES = 0x1571_0005
    HOMES = 0x1571_0006
    ROTATION = 0x1571_0007


async def take(session: AsyncSession, lock: Lock) -> None:
    """Wait for it; it is held until the transaction ends."""
    await session.execute(_TAKE, {"lock": int(lock)})


async def try_take(session: AsyncSession, lock: Lock) -> bool:
    """False if another transaction holds it; otherwise it is held until this one ends."""
    return bool((await session.execute(_TRY, {"lock": int(lock)})).scalar_one())
