"""The real Envoy as a process: it comes back, it is adopted, and it goes when told."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from agent.errors import Misconfigured
from agent.proxy import Proxy, find_envoy
from tests.agent.real_envoy import bare_bootstrap, until


@asynccontextmanager
async def supervised(proxy: Proxy) -> AsyncIterator[None]:
    """While an agent runs; leaving is to Envoy what a crash of the agent is."""
    running = asyncio.create_task(proxy.run())
    try:
        await until(lambda: proxy.pid is not None)
        await until(proxy.admin.ready)
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def static_bootstrap(run_dir: Path) -> dict[str, object]:
    """Without dynamic resources, so that it is live at once."""
    bootstrap = bare_bootstrap(run_dir)
    return {"node": bootstrap["node"], "admin": bootstrap["admin"]}


@pytest.fixture
async def proxy(run_dir: Path) -> AsyncIterator[Proxy]:
    proxy = Proxy(find_envoy(None), run_dir, run_dir / "envoy.log", static_bootstrap(run_dir), concurrency=1, drain_s=0.5)
    yield proxy
    await proxy.stop()
    await proxy.admin.close()


@pytest.fixture
async def successor(proxy: Proxy) -> AsyncIterator[Proxy]:
    """The next agent's."""
    successor = replace(proxy)
    yield successor
    await successor.stop()
    await successor.admin.close()
    proxy.pid = None


async def test_envoy_is_started_again_when_it_dies(envoy: Proxy) -> None:
    await until(envoy.admin.ready)
    first = envoy.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: envoy.pid not in (None, first))
    await until(envoy.admin.ready)


async def test_envoy_outlives_its_agent_and_the_next_one_adopts_it(proxy: Proxy, successor: Proxy) -> None:
    async with supervised(proxy):
        pid = proxy.pid
    assert pid is not None
    assert alive(pid)
    async with supervised(successor):
        assert successor.pid == pid
        assert await successor.state() == "live"
    await asyncio.gather(successor.stop(), asyncio.to_thread(proxy._reap))
    assert not alive(pid)


async def test_envoy_survives_the_death_of_the_process_that_started_it(proxy: Proxy, run_dir: Path) -> None:
    """Envoy asks the kernel to be terminated with its parent."""
    program = f"""
import asyncio, os
from pathlib import Path
from agent.proxy import Proxy, find_envoy
run_dir = Path({str(run_dir)!r})
proxy = Proxy(find_envoy(None), run_dir, run_dir / "envoy.log", {dict(proxy.bootstrap)!r}, concurrency=1, drain_s=0.5)
async def main():
    running = asyncio.create_task(proxy.run())
    while not await proxy.admin.ready():
        await asyncio.sleep(0.01)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await agent.wait() == -signal.SIGKILL
    async with supervised(proxy):
        assert proxy._child is None, "adopted, not started"
        assert "LIVE" in await proxy.admin.get("/server_info")


async def test_an_envoy_with_another_bootstrap_is_replaced(proxy: Proxy, successor: Proxy) -> None:
    async with supervised(proxy):
        pid = proxy.pid
    successor.bootstrap = {**proxy.bootstrap, "node": {"id": "other", "cluster": "c"}}
    async with supervised(successor):
        assert successor.pid != pid
        assert "other" in await successor.admin.get("/server_info")
    await asyncio.to_thread(proxy._reap)


async def test_a_process_that_only_has_the_same_id_is_not_adopted(proxy: Proxy, run_dir: Path) -> None:
    (run_dir / "envoy.json").write_text(f'{{"pid": {os.getpid()}, "started": 1, "fingerprint": "x"}}')
    assert await proxy._adopt() is None


async def test_stopping_ends_the_process(proxy: Proxy) -> None:
    async with supervised(proxy):
        pid = proxy.pid
    assert pid is not None
    await proxy.stop()
    assert not alive(pid)
    assert await proxy.state() == "down"


async def test_the_admin_interface_is_for_its_owner_alone(envoy: Proxy, run_dir: Path) -> None:
    await until(envoy.admin.ready)
    assert (run_dir / "admin.sock").stat().st_mode & 0o077 == 0


async def test_the_log_is_bounded(envoy: Proxy, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.proxy.LOG_LIMIT_BYTES", 0)
    await until(envoy.admin.ready)
    (run_dir / "envoy.log").write_text("x")
    await envoy._bound_log()
    assert (run_dir / "envoy.log.1").read_text() == "x"
    await envoy.admin.post("/logging?level=info")
    await until((run_dir / "envoy.log").exists)


def test_the_setting_must_name_a_program(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="not an executable"):
        find_envoy(tmp_path / "envoy")


def test_the_wheels_script_is_not_mistaken_for_envoy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "envoy"
    script.write_text("#!/usr/bin/python3\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_envoy(None).parent.name == "_bin"
