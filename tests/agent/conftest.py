"""A real Envoy with nothing but an admin socket and delta ADS, and resources to give it."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from agent.proxy import Proxy, find_envoy
from tests.agent.real_envoy import bare_bootstrap, until

# Before Python 3.12 pytest-asyncio asks for the current loop before the first asynchronous test, which would make one that nobody closes.
asyncio.set_event_loop(None)


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="isth-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def proxy(run_dir: Path) -> Proxy:
    return Proxy(
        binary=find_envoy(None),
        run_dir=run_dir,
        log_path=run_dir / "envoy.log",
        bootstrap=bare_bootstrap(run_dir),
        concurrency=1,
        drain_s=0.5,
    )


@pytest.fixture
async def envoy(proxy: Proxy) -> AsyncIterator[Proxy]:
    """One that runs; whoever uses it serves xDS."""
    running = asyncio.create_task(proxy.run())
    await until(lambda: proxy.pid is not None)
    yield proxy
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    await proxy.stop()
    await proxy.admin.close()
