"""Noticing that sites are gone, and that they are back."""

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import NoReturn

import structlog
from sqlalchemy.exc import SQLAlchemyError

from controlplane.errors import NotFound
from controlplane.services.leases import Leases

log = structlog.get_logger()

EVERY_S = 0.5
"""With the lease of a small fleet, a site is lost within ten seconds."""


async def watch(leases: Leases, clock: Callable[[], datetime]) -> NoReturn:
    failing = False
    while True:
        try:
            await leases.look(clock())
            failing = False
        except (SQLAlchemyError, OSError, NotFound) as error:
            if not failing:
                log.warning("cannot judge leases", error=str(error))
            failing = True
        await asyncio.sleep(EVERY_S)
