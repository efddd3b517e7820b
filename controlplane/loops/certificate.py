"""A replica's own HTTPS certificate."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog
from sqlalchemy.exc import SQLAlchemyError

from controlplane.pki import SERVER_LIFE

log = structlog.get_logger()

EVERY_S = SERVER_LIFE.total_seconds() / 3
LOOK_EVERY_S = 15.0
"""For another authority, or another root."""


async def renew(issued_by: str, authority: Callable[[], Awaitable[str]], issue: Callable[[], Awaitable[str]]) -> NoReturn:
    """A new one long before the last expires, and when another authority takes over; connections that are open keep theirs.

    `authority` says which one signs now, and `issue` which one has signed.
    """
    loop = asyncio.get_running_loop()
    due = loop.time() + EVERY_S
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        try:
            if loop.time() >= due or await authority() != issued_by:
                issued_by = await issue()
                due = loop.time() + EVERY_S
        except (SQLAlchemyError, OSError) as error:
            log.warning("cannot renew the HTTPS certificate", error=str(error))
