"""Programs of the lab as real processes: clean environment, output in a file, nobody survives the lab."""

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lab.network import Place

MARK = "ISTHMUS_LAB"
"""Every process of a lab, and what it starts in turn, has this in its environment: `<process id of the lab>.<number of the fabric in it>`."""
LOG_LIMIT = 32 << 20
BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
"""Where all of it is imported from: this very tree, whatever else is installed."""


class ProcessFailed(Exception):
    """A program of the lab ended when it should not have; the message ends with what it said last."""


@dataclass
class Process:
    """One program; `start` may be called again after it ended."""

    name: str
    argv: Sequence[str]
    place: Place
    directory: Path
    """Holds its log, and is its working directory and home."""
    mark: str
    env: Mapping[str, str] = field(default_factory=dict)
    _process: asyncio.subprocess.Process | None = None

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    @property
    def pid(self) -> int:
        assert self._process is not None, f"{self.name} was never started"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        assert not self.running, f"{self.name} runs already"
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.place.command(self.argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env={**environment(self.directory), MARK: self.mark, **self.env},
                start_new_session=True,
            )

    async def stop(self, within_s: float = 10) -> None:
        """Ask it to end, and insist when it does not."""
        if not self.running:
            return
        self.signal(signal.SIGTERM)
        try:
            await self.ended(within_s)
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """SIGKILL, as the out-of-memory killer would."""
        if self.running:
            self.signal(signal.SIGKILL)
            await self.ended()

    async def ended(self, within_s: float = 10) -> int:
        """Its exit status, once it has ended."""
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), within_s)

    def freeze(self) -> None:
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def check(self) -> None:
        """Raise `ProcessFailed` if it ended."""
        if not self.running:
            status = self._process.returncode if self._process else "never started"
            raise ProcessFailed(f"{self.name} ended (status {status}). Last lines of {self.log}:\n{self.tail()}")

    def tail(self, lines: int = 15) -> str:
        """The last lines it wrote."""
        if not self.log.exists():
            return "(nothing)"
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - (1 << 16)))
            return "\n".join("  " + line for line in log.read().decode(errors="replace").splitlines()[-lines:])

    def trim(self) -> None:
        """Empty the log once it is too large; it is open for appending, so the program may go on writing."""
        if self.log.exists() and self.log.stat().st_size > LOG_LIMIT:
            os.truncate(self.log, 0)


def environment(home: Path) -> dict[str, str]:
    """What every program of the lab gets, and nothing of the user's own."""
    path = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "XDG_RUNTIME_DIR": str(home),
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
    }


_BIND = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit; shift 2; done; shift; exec "$@"'


def with_files(argv: Sequence[str], files: Mapping[str, Path]) -> list[str]:
    """The same program where these paths are files or directories of the lab: in a mount namespace of its own, which takes root."""
    pairs = [part for path, file in files.items() for part in (str(file), path)]
    return ["unshare", "--mount", "sh", "-c", _BIND, "with-files", *pairs, "--", *argv]


def end_marked(mark: str) -> None:
    """Kill whatever a fabric left behind, grandchildren such as Envoy included."""
    for pid, other in _marked():
        if other == mark:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def end_orphans() -> None:
    """The same for labs that were killed before they could do it themselves."""
    for mark in sorted({mark for _, mark in _marked()}):
        if not Path("/proc", mark.split(".")[0]).exists():
            end_marked(mark)


def _marked() -> Iterator[tuple[int, str]]:
    """Processes of any lab, as far as this user may see them, with their mark."""
    start = f"{MARK}=".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                for variable in (entry / "environ").read_bytes().split(b"\0"):
                    if variable.startswith(start):
                        yield int(entry.name), variable.removeprefix(start).decode()


def leaves(error: BaseException) -> list[BaseException]:
    """What went wrong, without the groups that it came in."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]
