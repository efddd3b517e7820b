"""Nodes as the control plane sees them: the agent's own client, without an Envoy behind it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import httpx
import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI

from agent.control import ControlPlane, Signer
from agent.protocol.enrolment import BootstrapRequest, BootstrapSpec, ConfigRequest, Credentials, Infra, Passport
from agent.protocol.items import ItemKind
from agent.protocol.manifest import ManifestAnswer
from agent.protocol.report import Heartbeat, HeartbeatAnswer, Report
from controlplane.app import running
from controlplane.loops.retention import Keep
from controlplane.pki import create_key
from tests.backend import now

TOKENS = "/api/register/namespaces/system/tokens"
REGISTRATIONS = "/api/register/namespaces/system/registrations"
SITES = "/api/config/namespaces/system/sites"
Json = dict[str, Any]


@pytest.fixture
async def live(app: FastAPI) -> AsyncIterator[FastAPI]:
    """The application with its background loops."""
    keep = Keep(metrics=timedelta(days=1), audit=timedelta(days=1))
    async with running(app.state.services, keep)(app):
        yield app


@dataclass
class Node:
    """What an agent knows of itself."""

    site: str
    name: str
    control: ControlPlane
    token: str
    key: ec.EllipticCurvePrivateKey = field(default_factory=create_key)
    registration: str = ""
    credentials: Credentials | None = None
    boot_id: str = field(default_factory=lambda: uuid4().hex)
    sequence: int = 0

    async def bootstrap(self, passport: Passport | None = None, **infra: Any) -> str:
        """Ask to be let in; gives the registration's state."""
        passport = passport or Passport(cluster_name=self.site)
        spec = BootstrapSpec(token=self.token, passport=passport, infra=Infra(hostname=self.name, **infra), csr_pem=csr(self.key))
        answer = await self.control.bootstrap(BootstrapRequest(spec=spec))
        self.registration = answer.name
        return answer.state

    async def fetch_credentials(self) -> Credentials:
        self.credentials = await self.control.request_config(ConfigRequest(name=self.registration, token=self.token, csr_pem=csr(self.key)))
        self.control.signer = Signer(self.credentials.node_id, self.key)
        return self.credentials

    async def manifest(self, known: str | None = None) -> ManifestAnswer:
        """With a known one, waits for another."""
        return await self.control.manifest(known, wait=known is not None)

    async def beat(self, **said: Any) -> HeartbeatAnswer:
        self.sequence += 1
        defaults = {"boot_id": self.boot_id, "sequence": self.sequence, "sent_at": now().timestamp(), "proxy": "live"}
        return await self.control.heartbeat(Heartbeat(**(defaults | said)))

    async def report(self, **said: Any) -> None:
        await self.control.report(Report(boot_id=self.boot_id, **said))

    async def apply(self) -> str:
        """Say that the current manifest is in force; gives its hash."""
        manifest = await self.manifest()
        await self.beat(applied_hash=manifest.hash, applied_revision=manifest.revision)
        return manifest.hash

    async def keys_of(self, kind: ItemKind) -> set[str]:
        return {entry.key for entry in (await self.manifest()).entries if entry.kind == kind}


@asynccontextmanager
async def node(app: FastAPI, token: str, site: str, name: str = "node-1") -> AsyncIterator[Node]:
    """Not enrolled yet."""
    control = ControlPlane(["https://controlplane.test"], transport=httpx2.ASGITransport(app))
    try:
        yield Node(site, name, control, token)
    finally:
        await control.close()


@asynccontextmanager
async def admitted(app: FastAPI, user: httpx.AsyncClient, site: str, name: str = "node-1") -> AsyncIterator[Node]:
    """A node of a site, let in by a token for that site."""
    async with node(app, await token_for(user, site), site, name) as made:
        assert await made.bootstrap() == "APPROVED"
        await made.fetch_credentials()
        yield made


async def token_for(user: httpx.AsyncClient, site: str, **spec: Any) -> str:
    return str((await create_token(user, type="JWT", site_name=site, **spec))["spec"]["content"])


async def caught_up(app: FastAPI, tenant_id: str) -> None:
    """What was committed in the tenant is known to this replica, as it soon is after a notification."""
    delivery = app.state.services.delivery
    await delivery.catch_up(await delivery.cache(UUID(tenant_id)))


async def create_token(user: httpx.AsyncClient, **spec: Any) -> Json:
    answer = await user.post(TOKENS, json={"metadata": {"name": f"t-{uuid4().hex[:12]}"}, "spec": spec})
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    return body


def csr(key: ec.EllipticCurvePrivateKey) -> str:
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()
