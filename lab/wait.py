"""Waiting for conditions, never for time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def until(condition: Callable[[], Awaitable[T | None]], what: str, *, within_s: float = 20, every_s: float = 0.05) -> T:
    """The first truthy result of `condition`; raises `TimeoutError` that names `what` and the last result.

    An `OSError` counts as not yet: whoever waits for a server to come up is refused at first.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    last: object = None
    while True:
        try:
            if result := await condition():
                return result
            last = result
        except OSError as error:
            last = error
        if loop.time() > deadline:
            raise TimeoutError(f"after {within_s:g} s still waiting for {what}; last seen: {last!r}")
        await asyncio.sleep(every_s)
