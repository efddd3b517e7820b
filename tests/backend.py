"""A real Postgres with the real schema, and the real application on it: fixtures for the folders that need them.

One server serves the whole run; each test that writes gets tenants of its own.
"""

import asyncio
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import URL

from controlplane.app import create_app, open_services
from controlplane.auth import Caller
from controlplane.services import tenants
from controlplane.services.authorities import Fabric
from controlplane.services.start import Given, start
from controlplane.settings import Settings
from controlplane.store.embedded import Embedded
from controlplane.store.schema import migrate
from controlplane.store.session import Database

DEBIAN_BINARIES = Path("/usr/lib/postgresql/15/bin")
OPERATOR_TOKEN = "operator-token-of-the-tests-0123456789"


@dataclass(frozen=True)
class Postgres:
    app_url: URL
    owner_url: URL


def now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251 - tests are an edge too


@contextmanager
def open_directory() -> Iterator[Path]:
    """One that Postgres may enter as another user: pytest keeps its own closed."""
    with tempfile.TemporaryDirectory(prefix="postgres-") as directory:
        yield Path(directory)


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with open_directory() as directory:
        yield directory


@contextmanager
def embedded() -> Iterator[Postgres]:
    with open_directory() as directory:
        server = Embedded(directory)
        try:
            yield Postgres(server.app_url, server.owner_url)
        finally:
            server.stop()


@contextmanager
def debian() -> Iterator[Postgres]:
    """Debian's Postgres, as an unprivileged user, with an owner who is not a superuser and an application's role with a password."""
    user = "nobody" if os.geteuid() == 0 else None
    with open_directory() as directory:
        if user:
            shutil.chown(directory, user)
        yield from _debian(directory, user)


def _debian(directory: Path, user: str | None) -> Iterator[Postgres]:
    data = directory / "data"

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [DEBIAN_BINARIES / program, *arguments], check=True, capture_output=True, user=user, cwd=directory, env={"LC_ALL": "C.UTF-8"}
        )

    run("initdb", "-D", str(data), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
    run("pg_ctl", "-w", "-D", str(data), "-l", str(directory / "log"), "-o", f"-h '' -k {directory} -F", "start")
    try:
        run("psql", "-h", str(directory), "-U", "postgres", "-c", "CREATE ROLE owner LOGIN CREATEROLE")
        run("createdb", "-h", str(directory), "-U", "postgres", "-O", "owner", "isthmus")
        owner_url = URL.create("postgresql+psycopg", username="owner", database="isthmus", query={"host": str(directory)})
        yield Postgres(owner_url.set(username="app", password="it's 100% secret"), owner_url)
    finally:
        run("pg_ctl", "-w", "-D", str(data), "-m", "immediate", "stop")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The embedded server, migrated."""
    with embedded() as server:
        migrate(server.owner_url, server.app_url)
        yield server


@pytest.fixture(scope="session")
def fabric(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Fabric:
    """After its first start."""
    return founded(postgres, tmp_path_factory.mktemp("state"))


def founded(postgres: Postgres, state_dir: Path) -> Fabric:
    """A first start."""
    given = Given(state_dir, ring=None, trust_domain="", operator_token=OPERATOR_TOKEN)

    async def first_start() -> Fabric:
        database = Database(postgres.app_url)
        try:
            return await start(database, given, now())
        finally:
            await database.close()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, first_start()).result()  # a loop of its own: the tests have theirs


@pytest.fixture
async def database(postgres: Postgres) -> AsyncIterator[Database]:
    """As the application's role."""
    database = Database(postgres.app_url)
    yield database
    await database.close()


@pytest.fixture
def new_tenant(database: Database, fabric: Fabric) -> Callable[[], Any]:
    """Makes tenants; gives a caller inside."""

    async def make() -> Caller:
        name = f"t-{secrets.token_hex(6)}"
        async with database.transaction() as session:
            tenant_id = await tenants.found(session, fabric, name, now())
        return Caller(tenant_id, name, operator=False, credential="test")

    return make


@pytest.fixture
async def caller(new_tenant: Callable[[], Any]) -> Caller:
    """Somebody in a tenant of their own."""
    made: Caller = await new_tenant()
    return made


@pytest.fixture
def app(database: Database, fabric: Fabric, tmp_path: Path) -> Iterator[FastAPI]:
    """The application without its background loops."""
    settings = Settings(state_dir=tmp_path, rate_limit="100000/minute", failure_rate_limit="100000/minute")
    app = create_app()
    with ThreadPoolExecutor(1) as compiler:
        app.state.services = open_services(settings, database, fabric, compiler, now)
        yield app


@pytest.fixture
async def operator(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """The operator's client."""
    async with client_of(app, OPERATOR_TOKEN) as client:
        yield client


@pytest.fixture
async def inside(app: FastAPI, operator: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    """An administrator of the operator's tenant, who is not the operator."""
    body = {"name": f"c-{secrets.token_hex(6)}", "namespace": "system", "spec": {"type": "API_TOKEN"}, "expiration_days": 1}
    answer = await operator.post("/api/web/namespaces/system/api_credentials", json=body)
    assert answer.status_code == 200, answer.text
    async with client_of(app, answer.json()["data"]) as client:
        yield client


@pytest.fixture
async def anonymous(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app, None) as client:
        yield client


@pytest.fixture
async def user(app: FastAPI, operator: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    """The administrator of a new tenant that has the namespace `shop`."""
    async with client_of(app, await _new_token(operator)) as client:
        assert (await client.post("/api/web/namespaces", json={"metadata": {"name": "shop"}})).status_code == 200
        yield client


@pytest.fixture
async def stranger(app: FastAPI, operator: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    """The administrator of another tenant."""
    async with client_of(app, await _new_token(operator)) as client:
        yield client


def client_of(app: FastAPI, token: str | None) -> httpx.AsyncClient:
    """In process, without sockets; a bug in the application is an answer of 500, as it would be over the network."""
    headers = {"Authorization": f"APIToken {token}"} if token else {}
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="https://controlplane.test", headers=headers)


async def _new_token(operator: httpx.AsyncClient) -> str:
    answer = await operator.post("/api/operator/tenants", json={"name": f"t-{secrets.token_hex(6)}"})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])
