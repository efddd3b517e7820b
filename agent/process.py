"""Programs that outlive the agent: how the next one finds them again, and notices that they end."""

import asyncio
import os
from pathlib import Path

from agent.protocol.base import Message


class Running(Message):
    """Which process to adopt. The start time tells it from a later process with the same id."""

    pid: int
    started: int
    fingerprint: str


def alive(path: Path) -> Running | None:
    """What was written there, if that very process still runs."""
    try:
        running = Running.model_validate_json(path.read_bytes())
        return running if started(running.pid) == running.started else None
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None


async def exit_of(pid: int) -> None:
    """Returns when the process is gone, whether or not it is our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(descriptor, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def overwrite(path: Path, text: str) -> None:
    """In place: what was there keeps its blocks, so that a program can be started again on a full disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(text.encode())
        file.truncate()


def environment() -> dict[str, str]:
    """Without the agent's settings, of which the token is nobody else's business."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AGENT_")}


def started(pid: int) -> int:
    """Start time of a process in clock ticks since boot; raises ProcessLookupError, also for a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    fields = text.rpartition(")")[2].split()
    if fields[0] == "Z":
        raise ProcessLookupError(pid)
    return int(fields[19])
