"""Giving memory back."""

import asyncio
import ctypes

EVERY_S = 5.0


async def trim() -> None:
    """The C library keeps what was freed between pieces that are in use, such as the buffers of thousands of handshakes; glibc can be told not to."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is None:
        return
    while True:
        await asyncio.sleep(EVERY_S)
        await asyncio.to_thread(malloc_trim, 0)
