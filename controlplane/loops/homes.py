"""Choosing the regional edges of customer edges."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import NoReturn

import structlog
from sqlalchemy.exc import SQLAlchemyError

from controlplane.errors import NotFound
from controlplane.services.heartbeats import Heartbeats
from controlplane.services.homes import Seen, assign
from controlplane.store.session import Database

log = structlog.get_logger()

EVERY_S = 1.0


async def follow(database: Database, heartbeats: Heartbeats, clock: Callable[[], datetime]) -> NoReturn:
    """Every second; a site that appears waits so long for its edges, and one that lost an edge for another."""
    seen = Seen()
    while True:
        try:
            await assign(database, heartbeats, seen, clock())
        except (SQLAlchemyError, OSError, NotFound) as error:
            log.warning("cannot choose regional edges", error=str(error))
        await asyncio.sleep(EVERY_S)
