"""The program as an operator runs it: real processes, ports and signals."""

import asyncio
import os
import signal
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from controlplane.__main__ import _uvicorn, app
from controlplane.pki import KeyRing
from controlplane.settings import Settings
from lab.wait import until
from tests.backend import DEBIAN_BINARIES, Postgres, debian

START_S = 90
RING = KeyRing.generate().dump().strip()


@dataclass
class Replica:
    """A running `isthmus-controlplane serve`."""

    process: asyncio.subprocess.Process
    url: str
    state: Path
    said: list[str] = field(default_factory=list)

    async def until_serving(self) -> None:
        async with asyncio.timeout(START_S):
            assert self.process.stderr
            async for line in self.process.stderr:
                self.said.append(line.decode())
                if "event=serving" in self.said[-1]:
                    return
        raise AssertionError("".join(self.said))

    def client(self, token: str | None = None) -> httpx.AsyncClient:
        token = token or (self.state / "operator.token").read_text().strip()
        trust: ssl.SSLContext | bool = False
        if self.url.startswith("https"):
            trust = ssl.create_default_context(cafile=self.state / "ca.pem")
        return httpx.AsyncClient(base_url=self.url, verify=trust, headers={"Authorization": f"APIToken {token}"})

    async def stop(self, number: int = signal.SIGTERM) -> int:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        async with asyncio.timeout(START_S):
            await self.process.communicate()
            return await self.process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


async def run(command: str, *options: str, **environment: str) -> asyncio.subprocess.Process:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONTROLPLANE_")}
    argv = [sys.executable, "-m", "controlplane", command, *options]
    return await asyncio.create_subprocess_exec(
        *argv, env=kept | environment, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )


async def refusal(command: str, *options: str, **environment: str) -> str:
    """What it says when it does not even start."""
    process = await run(command, *options, **environment)
    async with asyncio.timeout(START_S):
        _, said = await process.communicate()
    assert process.returncode == 2, said.decode()
    return said.decode()


@asynccontextmanager
async def serving(state: Path, *options: str, **environment: str) -> AsyncIterator[Replica]:
    port = free_port()
    process = await run("serve", "--state-dir", str(state), "--port", str(port), *options, **environment)
    replica = Replica(process, f"{'http' if '--plain-http' in options else 'https'}://127.0.0.1:{port}", state)
    try:
        yield replica
    finally:
        await replica.stop()


def postmaster(state: Path) -> Path:
    """Its directory in /proc."""
    return Path("/proc") / (state / "postgres" / "postmaster.pid").read_text().split()[0]


def runs(process: Path) -> bool:
    with suppress(FileNotFoundError):
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


async def test_it_serves_https_and_stops_with_its_database(state_dir: Path) -> None:
    async with serving(state_dir) as replica:
        await replica.until_serving()
        async with replica.client() as client:
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.get("/api/web/namespaces")).status_code == 200
            assert "ves.io.schema.http_loadbalancer.API.Create" in (await client.get("/openapi.json")).text
        database = postmaster(state_dir)
        assert await replica.stop() == 0
        assert not runs(database)


async def test_who_waits_is_answered_when_it_stops(state_dir: Path) -> None:
    async with serving(state_dir) as replica:
        await replica.until_serving()
        async with replica.client() as client:
            sites = "/api/config/namespaces/system/sites"
            await client.post(sites, json={"metadata": {"name": "a"}})
            wait = asyncio.create_task(client.get(f"{sites}/a/status?wait=applied&timeout=60s", timeout=70))

            async def waits() -> bool:
                return "isthmus_http_requests_in_progress 2.0" in (await client.get("/metrics")).text

            await until(waits, "the request to wait")
            loop = asyncio.get_running_loop()
            started_at = loop.time()
            assert await replica.stop() == 0
            assert (await wait).status_code == 504
            assert loop.time() - started_at < 10


async def test_replicas_share_a_state_directory_and_survive_each_other(state_dir: Path) -> None:
    async with serving(state_dir) as one, serving(state_dir) as other:
        await asyncio.gather(one.until_serving(), other.until_serving())
        async with one.client() as first, other.client() as second:
            assert (await first.post("/api/web/namespaces", json={"metadata": {"name": "shop"}})).status_code == 200
            assert (await second.get("/api/web/namespaces/shop")).status_code == 200
            await one.stop(signal.SIGKILL)
            assert (await second.get("/api/web/namespaces/shop")).status_code == 200
        await other.stop(signal.SIGKILL)
    async with serving(state_dir) as again:
        await again.until_serving()
        async with again.client() as client:
            assert (await client.get("/api/web/namespaces/shop")).status_code == 200


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--plain-http", "--host", "0.0.0.0"], "listen on loopback"),
        (["--tls-cert-file", "/dev/null"], "go together"),
        (["--migration-database-url", "postgresql://owner@localhost/isthmus"], "needs database_url"),
        (["--port", "http"], "port"),
        (["--operator-token", "short"], "operator_token"),
        (["--log-level", "loud"], "log_level"),
        (["--rate-limit", "fast"], "rate_limit"),
        (["--trusted-proxies", "proxy.test"], "trusted_proxies"),
        (["--public-urls", "control.test:8443"], "public_urls: Value error, 'control.test:8443' is not a URL"),
        (["--public-urls", "https://control.test:99999"], "public_urls: Value error, Port out of range"),
        (["--public-names-resolver", "dns.test"], "public_names_resolver"),
        (["--public-names-resolver", "192.0.2.1:99999"], "public_names_resolver: Value error, the port should be"),
        (["--database-url", "isthmus", "--key-encryption-key", RING], "a database URL is written postgresql://"),
        (["--database-url", "mysql://a@localhost/b", "--key-encryption-key", RING], "a database URL is written postgresql://"),
        (
            ["--database-url", "postgresql://a:secret@localhost:port/b", "--key-encryption-key", RING],
            "a database URL is written postgresql://",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused_with_a_reason(options: list[str], says: str) -> None:
    outcome = CliRunner().invoke(app, ["serve", *options])
    assert outcome.exit_code == 2
    assert says in outcome.output
    assert "secret" not in outcome.output


async def test_a_certificate_that_cannot_be_used_is_named(state_dir: Path, tmp_path: Path) -> None:
    missing, empty = tmp_path / "missing.pem", tmp_path / "empty.pem"
    empty.touch()
    for chain in (missing, empty):
        said = await refusal("serve", "--state-dir", str(state_dir), "--tls-cert-file", str(chain), "--tls-key-file", str(empty))
        assert f"{chain} and {empty} cannot be used for TLS: " in said


@pytest.mark.parametrize(("peer", "client"), [("10.1.2.3", "192.0.2.9"), ("192.0.2.1", "192.0.2.1")])
async def test_only_proxies_that_are_trusted_say_where_a_request_comes_from(peer: str, client: str) -> None:
    """And of what they say, what they did not add themselves is not believed."""
    seen: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["client"][0])

    config = _uvicorn(Settings(trusted_proxies=("10.0.0.0/8",)), application, None)
    config.load()
    headers = [(b"x-forwarded-for", b"198.51.100.6, 192.0.2.9, 10.9.9.9")]
    loaded: Any = config.loaded_app
    await loaded({"type": "http", "client": (peer, 1), "headers": headers}, None, None)
    assert seen == [client]


async def test_a_port_that_is_taken_is_named(state_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1 port {port}" in await refusal("serve", "--state-dir", str(state_dir), "--port", port)


@pytest.fixture
def external() -> Iterator[Postgres]:
    if not DEBIAN_BINARIES.exists():
        pytest.skip("Debian's Postgres is not installed")
    with debian() as server:
        yield server


async def test_on_a_database_that_is_given(external: Postgres, state_dir: Path) -> None:
    serve_url, owner_url = (url.render_as_string(hide_password=False) for url in (external.app_url, external.owner_url))
    state = ("--state-dir", str(state_dir))
    key = {"CONTROLPLANE_KEY_ENCRYPTION_KEY": RING}
    assert "cannot be used" in await refusal("serve", *state, CONTROLPLANE_DATABASE_URL=serve_url, **key)
    migrated = await run("migrate", *state, CONTROLPLANE_DATABASE_URL=serve_url, CONTROLPLANE_MIGRATION_DATABASE_URL=owner_url)
    await migrated.communicate()
    assert migrated.returncode == 0
    assert "owns the tables" in await refusal("serve", *state, CONTROLPLANE_DATABASE_URL=owner_url, **key)
    token = "token-from-the-environment-0123456789"
    given = {"CONTROLPLANE_DATABASE_URL": serve_url, "CONTROLPLANE_OPERATOR_TOKEN": token, **key}
    async with serving(state_dir, "--plain-http", **given) as replica:
        await replica.until_serving()
        async with replica.client(token) as client:
            assert (await client.get("/api/web/namespaces")).status_code == 200
        assert not (state_dir / "operator.token").exists()
        assert token not in "".join(replica.said)


async def test_the_description_needs_no_database() -> None:
    process = await run("openapi")
    async with asyncio.timeout(START_S):
        described, _ = await process.communicate()
    assert process.returncode == 0
    assert b'"/api/config/namespaces/{namespace}/origin_pools/{name}"' in described
