"""A cluster to apply manifests to: the lab's API emulator in the test's own process, and `kubectl`."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from aiohttp import web

from lab.kubernetes.access import Access
from lab.kubernetes.admission import Admission
from lab.kubernetes.client import Client, connect
from lab.kubernetes.kubeconfig import kubeconfig
from lab.kubernetes.server import ApiServer
from lab.kubernetes.store import Store
from lab.kubernetes.tls import Authority
from lab.kubernetes.writing import Writer


@dataclass(frozen=True)
class Cluster:
    kubeconfig: Path
    api: Client
    """As an administrator."""

    async def kubectl(self, *arguments: str, stdin: str = "", fails: bool = False) -> str:
        """What it prints."""
        process = await asyncio.create_subprocess_exec(
            "kubectl",
            f"--kubeconfig={self.kubeconfig}",
            "--cache-dir=/dev/null",
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate(stdin.encode())
        assert (process.returncode != 0) is fails, said.decode()
        return said.decode()


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    """Skips the test where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    server = ApiServer(Writer(Store(None), Admission()), Access({"administrator"}))
    runner = web.AppRunner(server.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0)
    authority = Authority()
    """kubectl shows no token to a server without TLS."""
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=authority.context("127.0.0.1")).start()
        with TemporaryDirectory() as directory:
            file = Path(directory, "kubeconfig")
            file.write_text(kubeconfig(f"https://127.0.0.1:{runner.addresses[0][1]}", token="administrator", authority=authority))
            async with connect(file) as api:
                yield Cluster(file, api)
    finally:
        await runner.cleanup()
