"""Tasks that outlive their own defects."""

import asyncio
from typing import NoReturn

import pytest

from agent import tasks
from agent.tasks import lasting


async def test_what_breaks_off_is_told_without_its_words_and_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.0)
    runs: list[int] = []
    told: list[str] = []
    goes_on = asyncio.Event()

    async def broken() -> NoReturn:
        async with asyncio.TaskGroup():
            raise IndexError("hunter2")

    async def run() -> NoReturn:
        runs.append(1)
        if len(runs) < 3:
            await broken()
        goes_on.set()
        await asyncio.Event().wait()
        raise AssertionError

    task = lasting(run, "fragile", told.append)
    await asyncio.wait_for(goes_on.wait(), 30)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert len(told) == 2
    assert told[0].startswith("unexpectedly failed with IndexError in broken (test_tasks.py:")
    assert "hunter2" not in told[0]
