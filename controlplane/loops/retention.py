"""Forgetting what has had its time."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NoReturn
from uuid import UUID

import structlog
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.services.delivery import RELOADED_AFTER_S
from controlplane.store import nodes, registrations, telemetry, tenants, tokens
from controlplane.store.locks import Lock, try_take
from controlplane.store.session import Database

log = structlog.get_logger()

EVERY_S = 60.0
KEEP_TOMBSTONES = timedelta(seconds=4 * RELOADED_AFTER_S)
"""Longer than any cache goes without reading everything anew."""
KEEP_ENDED = timedelta(days=30)
"""Tokens that expired, registrations that were retired, and nodes that were revoked."""
KEEP_PENDING = timedelta(days=7)
"""Registrations that wait for a person."""
_RETAIN = text("SELECT retain(:rollups, :audit, :deletions)")


@dataclass(frozen=True)
class Keep:
    metrics: timedelta
    audit: timedelta


async def forget(database: Database, keep: Keep, clock: Callable[[], datetime]) -> NoReturn:
    """Every minute, in one replica at a time."""
    while True:
        try:
            await forget_once(database, keep, clock())
        except (SQLAlchemyError, OSError) as error:
            log.warning("cannot forget what is old", error=str(error))
        await asyncio.sleep(EVERY_S)


async def forget_once(database: Database, keep: Keep, now: datetime) -> None:
    """Nothing, if another replica is at it. Each step is a transaction with the lock, so that one connection will do."""
    async with database.transaction() as session:
        if not await try_take(session, Lock.RETENTION):
            return
        since = {"rollups": now - keep.metrics, "audit": now - keep.audit, "deletions": now - KEEP_TOMBSTONES}
        await session.execute(_RETAIN, since)
        known = await tenants.list_all(session)
    for tenant in known:
        async with database.sessions(tenant.id) as own:
            if not await try_take(own, Lock.RETENTION):
                return
            await _forget_of_tenant(own, tenant.id, now)


async def _forget_of_tenant(session: AsyncSession, tenant_id: UUID, now: datetime) -> None:
    await tokens.forget_ended(session, tenant_id, now - KEEP_ENDED)
    await registrations.retire_pending(session, tenant_id, now - KEEP_PENDING, now)
    await registrations.forget_retired(session, tenant_id, now - KEEP_ENDED)
    await nodes.forget_revoked(session, tenant_id, now - KEEP_ENDED)
    await telemetry.forget_gone(session, tenant_id)
