"""Writing heartbeats."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import NoReturn

from controlplane.services.heartbeats import Heartbeats

EVERY_S = 1.0


async def flush(heartbeats: Heartbeats, clock: Callable[[], datetime]) -> NoReturn:
    """Every second; at once when something is urgent."""
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(heartbeats.urgent.wait(), EVERY_S)
        await heartbeats.flush(clock())
        heartbeats.forget(clock())
