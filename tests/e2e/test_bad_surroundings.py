"""Agents whose surroundings fail: they serve on, say what is wrong, and go on as before when it is mended."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from lab.cluster import API_PORT
from lab.fabric import Fabric
from lab.network import can_use_namespaces
from lab.site import Site
from lab.specs import http_loadbalancer, k8s_pool
from lab.wait import until
from tests.e2e import skew
from tests.e2e.calls import a_change_arrives, answers, traffic
from tests.e2e.newcomers import newcomer, said, token_for

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

Json = dict[str, Any]

ECHO = (sys.executable, "-m", "lab.echo")
HOUR_S = 3600
DISK_BYTES = 4 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fabric(show_logs_of: list[Fabric]) -> AsyncIterator[Fabric]:
    """Service `echo` in b, called from a and from b."""
    async with Fabric(("a", "b")) as fabric:
        show_logs_of.append(fabric)
        await fabric.site("b").cluster.deploy("echo", ECHO)
        await fabric.api.create("origin_pool", "echo", k8s_pool("echo", ["b"]))
        await fabric.api.create("http_loadbalancer", "echo", http_loadbalancer("echo.test", ["echo"], ["a", "b"]))
        await fabric.api.applied("http_loadbalancer", "echo")
        yield fabric


async def node_of(fabric: Fabric, site: str) -> Json:
    """What is known of a site and its only node."""
    status = await fabric.api.status("site", site)
    (found,) = (each for each in status["sites"] if each["site"] == site)
    return {**found, **found["nodes"][0]}


async def warned(fabric: Fabric, site: str, words: str) -> Json:
    """The node, once it gives this warning."""

    async def is_warned() -> Json | None:
        node = await node_of(fabric, site)
        return node if any(words in warning for warning in node.get("warnings", ())) else None

    found = await until(is_warned, f"the node of {site} to warn of {words!r}")
    assert found
    return found


async def has_no_warnings(fabric: Fabric, site: str) -> None:
    async def is_calm() -> bool:
        node = await node_of(fabric, site)
        return bool(node["live"] and not node["warnings"])

    await until(is_calm, f"the node of {site} to have nothing to warn of", within_s=40)


# The Kubernetes API


async def test_a_kubernetes_api_that_vanishes_is_named_and_stops_no_traffic(fabric: Fabric) -> None:
    b = fabric.site("b")

    async def reported(connected: bool) -> Json | None:
        discovery: Json = (await node_of(fabric, "b"))["discovery"]
        return discovery if discovery["connected"] is connected else None

    async with traffic(fabric, "a") as served:
        await b.cluster.emulator.kill()
        gone = await until(partial(reported, False), "the outage to be reported")
        assert gone
        assert gone["reason"].startswith(f"http://{b.place.cluster}:{API_PORT}: ")
        assert gone["services"] > 0, "what cannot be read still exists"
        (condition,) = (await fabric.api.status("site", "b"))["conditions"]
        assert condition["type"] == "Disconnected"
        assert "site b" in condition["message"]
        await a_change_arrives(fabric, "without-kubernetes")
        await served.more(50)
        await b.cluster.emulator.start()
        await until(partial(reported, True), "the end of the outage to be reported", within_s=40)
        await b.cluster.scale("echo", 2)
        pods = {pod.name for pod in b.cluster.services["echo"].pods}

        async def follows() -> bool:
            return set(served.pods(20)) == pods

        await until(follows, "traffic to reach the new pod")


# The clock


@pytest.mark.parametrize(
    ("wrong", "seconds"),
    [
        pytest.param(skew.in_python, HOUR_S, id="agent ahead"),
        pytest.param(
            skew.everywhere, HOUR_S, id="machine ahead", marks=pytest.mark.skipif(not skew.can_compile, reason="needs a C compiler")
        ),
        pytest.param(
            skew.everywhere, -HOUR_S, id="machine behind", marks=pytest.mark.skipif(not skew.can_compile, reason="needs a C compiler")
        ),
    ],
)
async def test_a_clock_that_is_an_hour_off_is_named_and_stops_nothing(
    fabric: Fabric, tmp_path: Path, wrong: Callable[[Path, int], dict[str, str]], seconds: int
) -> None:
    env = wrong(tmp_path, seconds)
    name = f"clock-{wrong.__name__.replace('_', '-')}-{'ahead' if seconds > 0 else 'behind'}"
    async with restarted(fabric.site("b"), env):
        node = await warned(fabric, "b", f"s {'ahead of' if seconds > 0 else 'behind'} the control plane's")
        assert node["clock_skew_s"] == pytest.approx(seconds, abs=60)
        async with traffic(fabric, "a"):
            await a_change_arrives(fabric, name)
            agent = newcomer(fabric, await token_for(fabric, name, type="JWT", site_name=name), name="n1", site=name, **env)
            await agent.start()
            await until(partial(said, agent, "applied"), "a new agent to serve")
            await agent.process.stop()
    await has_no_warnings(fabric, "b")


@asynccontextmanager
async def restarted(site: Site, env: dict[str, str]) -> AsyncIterator[None]:
    """The site's agent and its Envoy, under this environment for a while."""
    usual = site.agent.env
    await site.agent.stop()
    site.agent.env = {**usual, **env}
    await site.agent.start()
    try:
        yield
    finally:
        await site.agent.stop()
        site.agent.env = usual
        await site.agent.start()


# The disk


@pytest.mark.root
@pytest.mark.skipif(not can_use_namespaces(), reason="needs root and the right to mount")
async def test_a_full_disk_is_named_and_stops_nothing(fabric: Fabric) -> None:
    """Agent and Envoy even come back while it is full; once there is room, what was not saved is."""
    b, replica = fabric.site("b"), fabric.replicas[0]
    async with small_disk(b) as disk:
        with filled(disk):
            async with traffic(fabric, "a"):
                await a_change_arrives(fabric, "while-full")
                node = await warned(fabric, "b", "the config cannot be saved")
                assert "No space left on device" in str(node["warnings"])
            await kill_envoy(b)
            await answers(fabric, "b", "while-full.test")
            await b.agent.kill()
            await b.agent.start()
            await a_change_arrives(fabric, "restarted-while-full")
            await warned(fabric, "b", "the config cannot be saved")
        await has_no_warnings(fabric, "b")
        replica.process.freeze()
        try:
            await b.agent.kill()
            await kill_envoy(b)
            await b.agent.start()
            await answers(fabric, "b", "restarted-while-full.test")
        finally:
            replica.process.thaw()


@asynccontextmanager
async def small_disk(site: Site) -> AsyncIterator[Path]:
    """The state directory of the site's agent, on a file system of its own for a while."""
    state = site.agent.directory / "state"
    usual = state.with_name("state.usual")
    await site.agent.stop()
    state.rename(usual)
    state.mkdir()
    _root(f"mount -t tmpfs -o size={DISK_BYTES},mode=700 tmpfs {state}")
    shutil.copytree(usual, state, dirs_exist_ok=True, ignore=shutil.ignore_patterns("run"))
    await site.agent.start()
    try:
        await answers(site.fabric, site.name)
        yield state
    finally:
        await site.agent.stop()
        _root(f"umount {state}")
        state.rmdir()
        usual.rename(state)
        await site.agent.start()


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Without a free byte: what becomes free is taken at once, as by a log that grows."""
    path, full, mended = disk / "filler", threading.Event(), threading.Event()
    filler = threading.Thread(target=_fill, args=(path, full, mended))
    filler.start()
    try:
        assert full.wait(10)
        yield
    finally:
        mended.set()
        filler.join()
        path.unlink()


def _fill(path: Path, full: threading.Event, mended: threading.Event) -> None:
    with path.open("wb", buffering=0) as file:
        while not mended.is_set():
            try:
                file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017  # in a thread there is nobody to raise it to
                full.set()
                mended.wait(0.001)


async def kill_envoy(site: Site) -> None:
    pid = site.envoy_pid()
    os.kill(pid, signal.SIGKILL)

    async def is_gone() -> bool:
        return not Path(f"/proc/{pid}").exists()

    await until(is_gone, "the killed Envoy to be gone")


def _root(command: str) -> None:
    subprocess.run(command.split(), check=True)
