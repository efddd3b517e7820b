"""Tasks that go on until they are cancelled, whatever goes wrong in them, and what they wait for."""

import asyncio
import traceback
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, NoReturn

from agent.log import log

AGAIN_S = 5.0
"""After which what broke off begins again."""


def lasting(
    run: Callable[[], Coroutine[Any, Any, NoReturn]], name: str, failed: Callable[[str], None] = lambda _: None
) -> "asyncio.Task[NoReturn]":
    """Runs it; when it breaks off, which is a defect, that is logged, `failed` is told why, and it begins again."""
    return asyncio.create_task(_again_and_again(run, name, failed), name=name)


async def end(tasks: "Iterable[asyncio.Task[Any]]") -> None:
    """Cancel them, and wait until they are gone."""
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)


async def woken(event: asyncio.Event, within_s: float | None) -> bool:
    """Whether the event was set within that time; None: however long it takes."""
    try:
        async with asyncio.timeout(within_s):
            await event.wait()
    except TimeoutError:
        return False
    return True


async def _again_and_again(run: Callable[[], Coroutine[Any, Any, NoReturn]], name: str, failed: Callable[[str], None]) -> NoReturn:
    while True:
        try:
            await run()
        except Exception as error:  # noqa: BLE001 - whatever it is, others are not to suffer from it
            reason = f"unexpectedly failed with {_where(error)}"
            log.error("a task broke off, and begins again", task=name, reason=reason)
            failed(reason)
        await asyncio.sleep(AGAIN_S)


def _where(error: BaseException) -> str:
    """Not in the error's own words, which may show what nobody is to see."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.name} ({frame.filename.rpartition('/')[2]}:{frame.lineno})"
