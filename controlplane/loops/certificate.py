"""A replica's own HTTPS certificate."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog
from sqlalchemy.exc import SQLAlchemyError

from controlplane.pki import SERVER_LIFE

log = structlog.get_logger()

EVERY_S = SERVER_LIFE.total_seconds() / 3
AGAIN_S = 60.0


async def renew(issue: Callable[[], Awaitable[None]]) -> NoReturn:
    """A new one long before the last expires; connections that are open keep theirs."""
    pause = EVERY_S
    while True:
        await asyncio.sleep(pause)
        try:
            await issue()
            pause = EVERY_S
        except (SQLAlchemyError, OSError) as error:
            log.warning("cannot renew the HTTPS certificate", error=str(error))
            pause = AGAIN_S
