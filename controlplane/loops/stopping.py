"""Letting go of those who wait, when the replica stops."""

import asyncio

from controlplane.services.bell import Bell
from controlplane.services.delivery import Delivery


async def release(delivery: Delivery, bell: Bell, stopping: asyncio.Event) -> None:
    """Answer all polls as soon as the replica is told to stop, so that whoever waits can go to another one."""
    await stopping.wait()
    delivery.release()
    bell.silence()
