"""What `isthmus-agent status` makes of the file that an agent leaves."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from agent.__main__ import app

ROME, EDGE = "35a586c0-9ea7-4492-9ad0-cab4660c4f53", "0ce32f7f-6248-41c1-970c-1e858d4ff73b"


@pytest.fixture
def ended() -> int:
    """The id of a process that has."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def shown(run_dir: Path, **differently: Any) -> Result:
    now = time.time()
    peer = {"site_id": ROME, "path": "direct", "state": "UP", "since": now - 7, "in_use": True, "reason": "preferred", "error": ""}
    said = {
        "pid": os.getpid(),
        "version": "0.1.0",
        "kind": "customer_edge",
        "site": "paris",
        "node": "n1",
        "control_plane": "https://control.test",
        "connected": True,
        "last_error": "",
        "gateways": ["192.0.2.1:15443"],
        "envoy": "live",
        "envoy_pid": os.getpid(),
        "applied": "3198af4c",
        "revision": 24,
        "since": now - 44,
        "rejected": [],
        "peers": [peer, {**peer, "path": EDGE, "in_use": False, "reason": "stands by"}],
        "edges": [{"site_id": EDGE, "state": "UP", "since": now - 57, "tunnels": 4, "error": ""}],
        "names": {ROME: "rome", EDGE: "frankfurt"},
        "discoveries": {},
        "ipsec": "AGENT_IPSEC is off",
        "warnings": [],
    }
    (run_dir / "status.json").write_text(json.dumps(said | differently))
    return CliRunner().invoke(app, ["status", "--run-dir", str(run_dir)], env={"COLUMNS": "200"})


def test_peers_and_edges_have_names(tmp_path: Path) -> None:
    status = shown(tmp_path)
    assert status.exit_code == 0
    for line in (
        "rome direct UP for 7 s: in use, preferred",
        "rome through frankfurt UP for 7 s: stands by",
        "frankfurt UP for 57 s, 4 tunnels",
    ):
        assert line in status.output


def test_what_the_agent_knows_of_itself_is_shown(tmp_path: Path) -> None:
    status = shown(tmp_path, connected=False)
    for text in ("n1 of customer edge paris", "192.0.2.1:15443", "AGENT_IPSEC is off", "away: it has not answered yet"):
        assert text in status.output


def test_an_agent_that_has_ended_is_not_taken_for_one_that_runs(tmp_path: Path, ended: int) -> None:
    """Envoy may outlive it."""
    alone = shown(tmp_path, pid=ended)
    assert (alone.exit_code, "is not running any more: the above is what it said last; Envoy serves on" in alone.output) == (1, True)
    both = shown(tmp_path, pid=ended, envoy_pid=ended)
    assert (both.exit_code, "what it said last; Envoy does not run either" in both.output) == (1, True)
