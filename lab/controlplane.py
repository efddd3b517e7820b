"""One replica of the control plane, and waiting for programs to become ready."""

import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lab.api import Api
from lab.process import Process, ProcessFailed
from lab.wait import until


@dataclass
class ControlPlane:
    """One replica."""

    port: int
    process: Process
    _api: Api | None = None

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def state(self) -> Path:
        return Path(self.process.env["CONTROLPLANE_STATE_DIR"])

    @property
    def ca(self) -> Path:
        return self.state / "ca.pem"

    @property
    def token(self) -> Path:
        return self.state / "operator.token"

    @property
    def api(self) -> Api:
        assert self._api is not None
        return self._api

    async def start(self) -> None:
        """Start, or start again; returns when it is ready to serve."""
        await self.process.start()
        await ready(self.process, self._is_ready, "the control plane to be ready", 40)

    async def stop(self) -> None:
        if self._api:
            await self._api.close()
            self._api = None
        await self.process.stop()

    async def _is_ready(self) -> bool:
        self.process.check()
        if not (self.ca.exists() and self.token.exists()):
            return False
        if self._api is None:
            self._api = Api(self.url, self.ca, self.token.read_text().strip())
        try:
            return (await self._api.client.get("/readyz")).is_success
        except httpx.TransportError as error:
            raise ConnectionError(str(error)) from error


async def ready(process: Process, condition: Callable[[], Awaitable[Any]], what: str, within_s: float) -> None:
    """`until`, with the last lines of the program that does not get there."""
    try:
        await until(condition, what, within_s=within_s)
    except TimeoutError as error:
        raise ProcessFailed(f"{error}. Last lines of {process.log}:\n{process.tail()}") from error


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
