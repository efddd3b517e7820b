"""The emulator as a process."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

START_S = 20


@dataclass
class Emulator:
    """On loopback, at the same port after every start, and with what it knew."""

    directory: Path
    flags: tuple[str, ...] = ()
    port: int = 0
    _process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    async def start(self) -> None:
        """Returns once it serves."""
        own = ("--listen", f"127.0.0.1:{self.port}", "--kubeconfig-out", str(self.kubeconfig), "--state", str(self.directory / "state"))
        argv = (sys.executable, "-m", "lab.kubernetes", *own, *self.flags)
        self._process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_S)
        assert line.startswith(b"serving "), "the emulator did not start"
        self.port = int(line.rsplit(b":", 1)[1])

    async def kill(self) -> None:
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def running(directory: Path, *flags: str) -> AsyncIterator[Emulator]:
    """With more flags of `python -m lab.kubernetes`. `directory` keeps its kubeconfig and state."""
    emulator = Emulator(directory, flags)
    await emulator.start()
    try:
        yield emulator
    finally:
        await emulator.kill()
