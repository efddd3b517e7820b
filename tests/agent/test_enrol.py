"""Becoming a node and staying one, in virtual time, against a control plane that answers from a list."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.control import ControlPlane
from agent.enrol import Applicant, Identity, enrol
from agent.errors import Misconfigured, Refused, StorageFailed, Untrusted
from agent.protocol.enrolment import BACKDATED_S, Credentials
from agent.state import StateDirectory

pytestmark = pytest.mark.looptime
URL = "https://control.test"
BOOTSTRAP, REQUEST, RENEW = "/api/register/registerBootstrap", "/api/register/requestConfig", "/api/agent/v1/renew"


def token(**claims: Any) -> str:
    given = {"urls": [URL], "jti": "t1", "tenant_id": "t", "site_name": "a", "iat": 0, "exp": 1, **claims}
    return jwt.encode(given, "not verified by agents, so any key will do", algorithm="HS256")


def certificate(key: ec.EllipticCurvePrivateKey, age: timedelta = timedelta(), life: timedelta = timedelta(days=7)) -> str:
    name = x509.Name([])
    issued = datetime.now(UTC) - age  # noqa: TID251  # the agent reads the clock as well
    backdated = issued - timedelta(seconds=BACKDATED_S)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, backdated, issued + life)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def credentials(pem: str) -> Credentials:
    return Credentials(
        certificate_pem=pem,
        tenant_id="t",
        site_id="s",
        site_name="a",
        node_id="n1",
        node_name="a-1",
        trust_domain="td",
        peer_anchor_pem=pem,
    )


class Server:
    """Answers by path; a list is used up to its last element."""

    def __init__(self) -> None:
        self.answers: dict[str, list[httpx2.Response | Exception]] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        self.asked.append((path, json.loads(request.content)))
        answers = self.answers[path]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def said(body: Any, status: int = 200) -> httpx2.Response:
    return httpx2.Response(status, json=body)


def refusal(status: int, message: str) -> httpx2.Response:
    return said({"code": 9, "message": message, "details": []}, status)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(httpx2, "AsyncHTTPTransport", lambda **_: httpx2.MockTransport(server))
    return server


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StateDirectory]:
    with StateDirectory(tmp_path) as directory:
        yield directory


def admitting(server: Server, directory: StateDirectory) -> Credentials:
    given = credentials(certificate(directory.node_key()))
    server.answers = {BOOTSTRAP: [said({"name": "r-1", "state": "PENDING"})], REQUEST: [said(given.model_dump())]}
    return given


async def test_an_admitted_node_keeps_its_credentials(server: Server, directory: StateDirectory) -> None:
    given = admitting(server, directory)
    assert await enrol(directory, token(), (), Applicant(None, "a-1", {"tier": "x"}, 1.0, 2.0)) == given
    assert directory.credentials() == given
    spec = server.asked[0][1]["spec"]
    assert spec["passport"] == {"cluster_name": "a", "cluster_type": "ce", "cluster_size": 1, "latitude": 1.0, "longitude": 2.0}
    assert (spec["infra"]["hostname"], spec["infra"]["labels"]) == ("a-1", {"tier": "x"})
    asked_for = x509.load_pem_x509_csr(spec["csr_pem"].encode()).public_key()
    assert asked_for == directory.node_key().public_key()


async def test_approval_is_waited_for_and_the_wait_is_quiet(
    server: Server, directory: StateDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "isthmus")
    given = admitting(server, directory)
    server.answers[REQUEST] = [*[refusal(409, "waits for approval")] * 600, *server.answers[REQUEST]]
    assert await enrol(directory, token(), (), Applicant(None, "a-1")) == given
    waited = asyncio.get_running_loop().time()
    assert 600 * 2 <= waited <= 600 * 10
    assert len([record for record in caplog.records if record.getMessage() == "waiting"]) <= waited / 60 + 2


async def test_a_control_plane_that_is_away_is_waited_for(server: Server, directory: StateDirectory) -> None:
    given = admitting(server, directory)
    server.answers[BOOTSTRAP] = [httpx2.ConnectError("no"), refusal(503, "starting"), *server.answers[BOOTSTRAP]]
    assert await enrol(directory, token(), (), Applicant(None, "a-1")) == given


async def test_a_refusal_ends_it_with_the_reason(server: Server, directory: StateDirectory) -> None:
    admitting(server, directory)
    server.answers[BOOTSTRAP] = [refusal(409, "site a has a node a-1 already")]
    with pytest.raises(Refused, match="has a node a-1 already"):
        await enrol(directory, token(), (), Applicant(None, "a-1"))
    assert directory.credentials() is None


async def test_without_any_site_there_is_nothing_to_ask_for(server: Server, directory: StateDirectory) -> None:
    with pytest.raises(Misconfigured, match="AGENT_SITE"):
        await enrol(directory, token(site_name=None), (), Applicant(None, "a-1"))


async def test_nothing_is_sent_to_whom_the_token_does_not_name(
    server: Server, directory: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    stranger = httpx2.MockTransport(lambda _: httpx2.Response(200, text="the roots of somebody else"))
    monkeypatch.setattr(httpx2.AsyncClient, "_transport_for_url", lambda *_: stranger)
    with pytest.raises(Untrusted, match="not the control plane that the token names"):
        await enrol(directory, token(ca_pin="0" * 64), (), Applicant(None, "a-1"))
    assert server.asked == []


def identity(server: Server, directory: StateDirectory, pem: str) -> tuple[Identity, list[Credentials]]:
    renewed: list[Credentials] = []
    plane = ControlPlane([URL], transport=httpx2.MockTransport(server))
    return Identity(directory, plane, credentials(pem), renewed.append), renewed


async def test_a_young_certificate_is_left_alone(server: Server, directory: StateDirectory) -> None:
    held, renewed = identity(server, directory, certificate(directory.node_key()))
    running = asyncio.create_task(held.run())
    await asyncio.sleep(3 * 3600)
    running.cancel()
    assert (server.asked, renewed, held.warning) == ([], [], None)


async def test_at_half_of_its_life_a_certificate_is_renewed_and_handed_on(server: Server, directory: StateDirectory) -> None:
    held, renewed = identity(server, directory, certificate(directory.node_key(), age=timedelta(days=4)))
    young = credentials(certificate(directory.node_key()))
    server.answers[RENEW] = [httpx2.ConnectError("no"), said(young.model_dump())]
    running = asyncio.create_task(held.run())
    await asyncio.sleep(3600)
    running.cancel()
    assert renewed == [young]
    assert directory.credentials() == young
    assert len(server.asked) == 2


@pytest.mark.parametrize(("minutes", "renewals"), [(25, 0), (35, 1)])
async def test_a_short_life_counts_from_the_issue_and_not_from_the_backdated_beginning(
    server: Server, directory: StateDirectory, minutes: int, renewals: int
) -> None:
    short = certificate(directory.node_key(), timedelta(minutes=minutes), timedelta(hours=1))
    held, renewed = identity(server, directory, short)
    server.answers[RENEW] = [said(credentials(certificate(directory.node_key())).model_dump())]
    running = asyncio.create_task(held.run())
    await asyncio.sleep(60)
    running.cancel()
    assert (len(renewed), held.warning) == (renewals, None)


async def test_a_renewal_that_failed_is_tried_again_when_the_control_plane_is_back(server: Server, directory: StateDirectory) -> None:
    held, renewed = identity(server, directory, certificate(directory.node_key(), age=timedelta(days=8)))
    server.answers[RENEW] = [httpx2.ConnectError("away")]
    running = asyncio.create_task(held.run())
    await asyncio.sleep(6 * 3600)
    tried = len(server.asked)
    server.answers[RENEW] = [said(credentials(certificate(directory.node_key())).model_dump())]
    held.retry()
    await asyncio.sleep(11)
    assert (len(server.asked), len(renewed)) == (tried + 1, 1)
    held.retry()
    await asyncio.sleep(60)
    running.cancel()
    assert len(renewed) == 1, "nothing had failed"


async def test_a_certificate_that_nobody_renews_is_warned_of(server: Server, directory: StateDirectory) -> None:
    held, _ = identity(server, directory, certificate(directory.node_key(), age=timedelta(days=6)))
    server.answers[RENEW] = [httpx2.ConnectError("nobody there")]
    running = asyncio.create_task(held.run())
    await asyncio.sleep(3600)
    running.cancel()
    assert len(server.asked) < 40
    assert held.warning is not None
    assert "expires in 24" in held.warning or "expires in 23" in held.warning
    assert "nobody there" in held.warning


async def test_an_expired_certificate_is_said_to_be(server: Server, directory: StateDirectory) -> None:
    held, _ = identity(server, directory, certificate(directory.node_key(), age=timedelta(days=8)))
    assert "has expired" in str(held.warning)


async def test_a_renewed_certificate_is_used_even_if_the_disk_is_full(
    server: Server, directory: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, renewed = identity(server, directory, certificate(directory.node_key(), age=timedelta(days=4)))
    young = credentials(certificate(directory.node_key()))
    server.answers[RENEW] = [said(young.model_dump())]

    def full(_: Credentials) -> None:
        raise StorageFailed("no space left")

    monkeypatch.setattr(directory, "save_credentials", full)
    running = asyncio.create_task(held.run())
    await asyncio.sleep(60)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    assert renewed == [young]


async def test_a_certificate_whose_signer_retires_is_renewed_soon_and_not_again_and_again(
    server: Server, directory: StateDirectory
) -> None:
    held, renewed = identity(server, directory, certificate(directory.node_key()))
    young = credentials(certificate(directory.node_key()))
    server.answers[RENEW] = [said(young.model_dump())] * 2
    running = asyncio.create_task(held.run())
    for _ in range(10):
        held.hurry()
        await asyncio.sleep(3)
    running.cancel()
    assert renewed == [young]


async def test_roots_that_the_control_plane_announces_are_kept(
    server: Server, directory: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, _ = identity(server, directory, certificate(directory.node_key()))
    trusted: list[str] = []

    async def trust(anchor_pem: str) -> None:
        trusted.append(anchor_pem)

    monkeypatch.setattr(held.control, "trust", trust)
    for announced in ("", "new roots", "new roots"):
        await held.trust(announced)
    assert trusted == ["new roots"]
    stored = directory.credentials()
    assert stored is not None
    assert stored.control_plane_anchor_pem == "new roots"
