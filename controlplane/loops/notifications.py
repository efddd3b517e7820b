"""Hearing that something changed."""

import asyncio
from contextlib import suppress
from typing import NoReturn
from uuid import UUID

import psycopg
import structlog
from sqlalchemy.exc import SQLAlchemyError

from controlplane.services.bell import Bell
from controlplane.services.delivery import Delivery
from controlplane.store.session import INTENT_CHANNEL, STATUS_CHANNEL, Database

log = structlog.get_logger()

LOOK_EVERY_S = 15.0
"""Even if all seems well: a notification costs at most so much time."""
LOOK_WHILE_DEAF_EVERY_S = 1.0


async def follow(database: Database, delivery: Delivery, bell: Bell) -> NoReturn:
    """Catch up when Postgres says so. While it cannot be heard, look every second."""
    deaf = False
    while True:
        try:
            async with await database.listen(INTENT_CHANNEL, STATUS_CHANNEL) as connection:
                if deaf:
                    log.info("hearing notifications again")
                deaf = False
                await _hear(connection, delivery, bell)
        except (psycopg.Error, OSError) as error:
            if not deaf:
                log.warning("cannot hear notifications, looking every second instead", error=str(error))
            deaf = True
        with suppress(SQLAlchemyError, OSError):
            await delivery.compare()
        await asyncio.sleep(LOOK_WHILE_DEAF_EVERY_S)


async def _hear(connection: psycopg.AsyncConnection, delivery: Delivery, bell: Bell) -> NoReturn:
    while True:
        with suppress(SQLAlchemyError):
            await delivery.compare()
        async for notification in connection.notifies(timeout=LOOK_EVERY_S):
            tenant_id, _, revision = notification.payload.partition(":")
            if notification.channel == INTENT_CHANNEL:
                delivery.hear(UUID(tenant_id), int(revision))
            else:
                bell.ring(UUID(tenant_id))
