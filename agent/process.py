"""Programs that outlive the agent: kept alive by it, found again by the next one, and ended only when told to."""

import asyncio
import os
import signal
import subprocess
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NoReturn

from agent.backoff import backoff
from agent.log import log
from agent.protocol.base import Message, content_hash

_LOG_CHECK_S = 30.0
_STEADY_S = 30.0
"""What lived so long starts again at once when it ends."""
_STOP_S = 5.0
"""After SIGTERM, before SIGKILL."""


class Running(Message):
    """Which process to adopt. The start time tells it from a later process with the same id."""

    pid: int
    started: int
    fingerprint: str


@dataclass
class Program(ABC):
    """`run` keeps one process of it alive; `stop` ends it."""

    name: ClassVar[str]
    binary: Path
    run_dir: Path
    log_path: Path
    pid: int | None = field(default=None, init=False)
    starts: int = field(default=0, init=False)
    """How often another process took over, which knows nothing of what the one before was told."""
    _child: subprocess.Popen[bytes] | None = field(default=None, init=False)
    """The process or its parent, unless it was adopted."""

    @property
    def adopted(self) -> bool:
        """Whether what runs was started by an earlier agent."""
        return self.pid is not None and self._child is None

    @abstractmethod
    def _config(self) -> str:
        """All that is decided when it starts; where that differs, what runs is replaced."""

    @abstractmethod
    def _launch(self) -> int:
        """Start `_child`, and tell the process id of the program."""

    @abstractmethod
    async def _fault(self) -> str:
        """Why what runs cannot be adopted; empty if it can."""

    @abstractmethod
    async def _bound_log(self) -> None:
        """From time to time."""

    async def run(self) -> NoReturn:
        """Adopt or start it, and start it again whenever it ends."""
        loop = asyncio.get_running_loop()
        delays = backoff(0.2, 10.0)
        while True:
            began = loop.time()
            try:
                self.pid = await self._adopt() or self._start()
                self.starts += 1
                await self._ended(self.pid)
                log.warning(f"{self.name} ended", pid=self.pid, code=self._reap())
            except OSError as error:
                log.error(f"{self.name} does not start", error=str(error))  # the message says it all
            self.pid = None
            if loop.time() - began > _STEADY_S:
                delays = backoff(0.2, 10.0)
            await asyncio.sleep(next(delays))

    async def stop(self) -> None:
        """Ask it to end; then make it end."""
        pid = self.pid
        if pid is None:
            return
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
            with suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    await exit_of(pid)
                    break
        self._reap()
        self.pid = None

    @property
    def _note(self) -> Path:
        """Tells the next agent of the process."""
        return self.run_dir / f"{self.name}.json"

    def _fingerprint(self) -> str:
        binary = self.binary.stat()
        return content_hash(f"{self.binary} {binary.st_size} {binary.st_mtime_ns} {self._config()}".encode())

    async def _adopt(self) -> int | None:
        """What an earlier agent left, if it is what this one would start."""
        running = alive(self._note)
        if running is None:
            return None
        self.pid = running.pid
        fault = await self._fault() if running.fingerprint == self._fingerprint() else "its binary or config changed"
        if not fault:
            log.info(f"{self.name} adopted", pid=running.pid)
            return running.pid
        log.warning(f"{self.name} is replaced", pid=running.pid, reason=fault)
        await self.stop()
        return None

    def _start(self) -> int:
        pid = self._launch()
        try:
            overwrite(self._note, Running(pid=pid, started=started(pid), fingerprint=self._fingerprint()).model_dump_json())
        except OSError:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # or nobody would know of it, and the next one would share its ports
            self._reap()
            raise
        log.info(f"{self.name} started", pid=pid, binary=str(self.binary))
        return pid

    async def _ended(self, pid: int) -> None:
        """Wait for the process, and keep its log bounded meanwhile."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOG_CHECK_S):
                    await exit_of(pid)
                    return
            await self._bound_log()

    def _reap(self) -> int | None:
        child, self._child = self._child, None
        return None if child is None else child.wait()


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
