"""Giving memory back. The C library keeps what was freed between pieces that are in use; glibc can be told not to."""

import asyncio
import ctypes

EVERY_S = 5.0
LARGE = 64 << 10
"""Bytes."""
_M_MMAP_THRESHOLD = -3
"""Of glibc's `malloc.h`."""


def map_large() -> None:
    """What is large lives in pages of its own from now on, which go with it.

    Each TLS connection has a buffer of 256 KiB of which it touches a few KiB. Among the rest it would be put where something else was before,
    and keep all of that.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, LARGE)


async def trim() -> None:
    """Again and again: of what is small, such as what thousands of handshakes took."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is None:
        return
    while True:
        await asyncio.sleep(EVERY_S)
        await asyncio.to_thread(malloc_trim, 0)
