"""The Postgres that comes with the package: shared, restarted, and robust against what a killed process leaves."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine

from controlplane.store.embedded import Embedded
from controlplane.store.schema import Refused

KEEP_RUNNING = """
import sys, time
from pathlib import Path
from controlplane.store.embedded import Embedded
Embedded(Path(sys.argv[1]))
print("up", flush=True)
sys.stdin.read()
"""


def answers(server: Embedded) -> bool:
    with create_engine(server.owner_url, poolclass=NullPool).connect() as connection:
        return bool(connection.exec_driver_sql("SELECT true").scalar_one())


def postmaster(directory: Path) -> int:
    return int((directory / "postgres" / "postmaster.pid").read_text().split()[0])


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_last_to_leave_stops_it(state_dir: Path) -> None:
    first, second = Embedded(state_dir), Embedded(state_dir)
    pid = postmaster(state_dir)
    first.stop()
    assert answers(second)
    second.stop()
    assert not runs(pid)


def test_it_outlives_a_killed_process_and_is_joined(state_dir: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KEEP_RUNNING, str(state_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout
        assert child.stdout.readline() == "up\n"
        child.send_signal(signal.SIGKILL)
    pid = postmaster(state_dir)
    server = Embedded(state_dir)
    assert answers(server)
    assert postmaster(state_dir) == pid
    server.stop()
    assert not runs(pid)


@pytest.mark.parametrize("left_behind", ["", "not a pid\n", f"{os.getpid()}\n", "999999999\n"], ids=["empty", "garbage", "another", "gone"])
def test_a_stale_pid_file_does_not_matter(state_dir: Path, left_behind: str) -> None:
    Embedded(state_dir).stop()
    (state_dir / "postgres" / "postmaster.pid").write_text(left_behind)
    server = Embedded(state_dir)
    assert answers(server)
    server.stop()


def test_a_path_that_is_too_long_for_a_socket_is_refused(state_dir: Path) -> None:
    deep = state_dir / ("d" * 100)
    deep.mkdir()
    with pytest.raises(Refused, match="too long"):
        Embedded(deep)


def test_nobody_else_can_reach_it(state_dir: Path) -> None:
    server = Embedded(state_dir)
    assert (state_dir / "postgres").stat().st_mode & 0o077 == 0
    assert server.owner_url.query["host"] == str(state_dir / "postgres")
    server.stop()
