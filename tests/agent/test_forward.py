"""A control plane that is reached through a regional edge: TLS from end to end over real sockets."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent import forward
from agent.control import ControlPlane
from agent.errors import Unreachable
from agent.forward import Forwarder
from agent.protocol.report import Heartbeat, HeartbeatAnswer
from tests.agent.real_envoy import until

NAME = "control.test"
BEAT = Heartbeat(boot_id="b", sequence=1, sent_at=0.0)


def certificate(name: str, directory: Path) -> tuple[str, ssl.SSLContext]:
    """A root that is its own server certificate, and the server's side."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.fromtimestamp(time.time(), UTC)
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    built = (
        built.serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
    )
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    signed = built.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False).sign(key, hashes.SHA256())
    pem = signed.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / f"{name}.pem").write_bytes(private + pem)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(directory / f"{name}.pem")
    return pem.decode(), context


@asynccontextmanager
async def served(context: ssl.SSLContext, heads: list[str]) -> AsyncIterator[int]:
    """A control plane that answers heartbeats and keeps what it was asked."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            body = HeartbeatAnswer(pace_s=3, now=0).model_dump_json()
            writer.write(f"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode())
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def carrying(urls: Callable[[], list[str]], port: int) -> AsyncIterator[Forwarder]:
    forwarder = Forwarder("127.0.0.1", port, urls)
    running = asyncio.create_task(forwarder.run())
    try:
        yield forwarder
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def heard(plane: ControlPlane) -> bool:
    try:
        await plane.heartbeat(BEAT)
    except Unreachable:
        return False
    return True


async def test_a_control_plane_is_reached_through_an_edge_and_proves_its_own_name(tmp_path: Path, unused_tcp_port: int) -> None:
    pem, context = certificate(NAME, tmp_path)
    heads: list[str] = []
    async with served(context, heads) as port, carrying(lambda: [f"https://127.0.0.1:{port}"], unused_tcp_port):
        plane = ControlPlane(["https://127.0.0.1:1", f"https://{NAME}:{port}#127.0.0.1:{unused_tcp_port}"], pem)
        await until(lambda: heard(plane))
        await plane.close()
    assert f"host: {NAME}:{port}" in heads[0].lower()
    assert plane.own_urls == ("https://127.0.0.1:1",)


async def test_an_edge_cannot_stand_in_for_the_control_plane(tmp_path: Path, unused_tcp_port: int) -> None:
    pem, _ = certificate(NAME, tmp_path)
    _, stranger = certificate("edge.test", tmp_path)
    heads: list[str] = []
    async with served(stranger, heads) as port:
        plane = ControlPlane([f"https://{NAME}#127.0.0.1:{port}"], pem)
        with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
            await plane.heartbeat(BEAT)
        await plane.close()
    assert heads == []


async def test_connections_that_lead_nowhere_end_and_there_are_only_so_many(unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async with carrying(lambda: ["https://127.0.0.1:1"], unused_tcp_port):
        assert await until(lambda: _first_byte(unused_tcp_port)) == "ended"
    monkeypatch.setattr(forward, "MOST_CONNECTIONS", 0)
    async with carrying(lambda: [f"https://127.0.0.1:{unused_tcp_port}"], unused_tcp_port):
        assert await until(lambda: _first_byte(unused_tcp_port)) == "ended"


async def _first_byte(port: int) -> str:
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return ""
    data = await reader.read(1)
    writer.close()
    return "ended" if not data else "answered"
