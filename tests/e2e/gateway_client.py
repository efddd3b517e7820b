"""A hand-written client of gateways: what someone can do who has the key of a node."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h2.connection
import h2.events

from agent.envoy import names
from agent.envoy.inputs import NodeIdentity
from agent.protocol.items import Gateway, shard

Headers = Iterable[tuple[str, str]]


@dataclass
class Http2:
    """One HTTP/2 connection over any pair of byte streams, with one request at a time."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    connection: h2.connection.H2Connection

    @classmethod
    def over(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> "Http2":
        client = cls(reader, writer, h2.connection.H2Connection())
        client.connection.initiate_connection()
        client.flush()
        return client

    def flush(self) -> None:
        self.writer.write(self.connection.data_to_send())

    async def events(self) -> list[h2.events.Event]:
        """Of the next bytes; raises ConnectionError when there are no more."""
        data = await self.reader.read(65536)
        if not data:
            raise ConnectionError("closed")
        events = self.connection.receive_data(data)
        self.flush()
        return events

    async def ask(self, headers: Headers, *, ends: bool = True) -> tuple[int, int]:
        """The stream's id and the status of the response."""
        stream = self.connection.get_next_available_stream_id()
        self.connection.send_headers(stream, list(headers), end_stream=ends)
        self.flush()
        while True:
            for event in await self.events():
                if isinstance(event, h2.events.StreamReset) and event.stream_id == stream:
                    raise ConnectionError("reset")
                if isinstance(event, h2.events.ResponseReceived) and event.stream_id == stream:
                    return stream, int(dict(event.headers)[b":status"])

    async def status(self, headers: Headers) -> int:
        return (await self.ask(headers))[1]


def client_context(node: NodeIdentity | None, directory: Path) -> ssl.SSLContext:
    """Of a client that shows this certificate, or none, and believes everybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if node is not None:
        pem = directory / "node.pem"
        pem.write_text(node.certificate_pem + node.private_key_pem)
        context.load_cert_chain(pem)
    return context


@asynccontextmanager
async def dial(
    gateway: Gateway,
    node: NodeIdentity | None,
    directory: Path,
    *,
    newest: bool = True,
    dialled: socket.socket | None = None,
    server_name: str = "",
    within_s: float = 10,
) -> AsyncIterator[Http2]:
    """As a node would, but without asking who answers; over a socket that is connected already, if one is given.

    `server_name`: unless it is given, what a peer asks for.
    """
    if not server_name and node is not None:
        server_name = names.peers_server_name(shard(node.site_id))
    context = client_context(node, directory)
    context.set_alpn_protocols(["h2"])
    if not newest:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with asyncio.timeout(within_s):
        where: dict[str, Any] = {"sock": dialled} if dialled else {"host": gateway.host, "port": gateway.port}
        where["server_hostname"] = server_name
        reader, writer = await asyncio.open_connection(ssl=context, **where)
        try:
            yield Http2.over(reader, writer)
        finally:
            writer.close()


def get(authority: str, path: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [(":method", "GET"), (":scheme", "https"), (":authority", authority), (":path", path), *more]


def connect(authority: str) -> list[tuple[str, str]]:
    return [(":method", "CONNECT"), (":authority", authority)]


async def through(client: Http2, authority: str, headers: Headers) -> int:
    """The status of a request in a CONNECT stream to an export."""
    stream, status = await client.ask(connect(authority), ends=False)
    assert status == 200
    inner = h2.connection.H2Connection()
    inner.initiate_connection()
    inner.send_headers(1, list(headers), end_stream=True)
    client.connection.send_data(stream, inner.data_to_send())
    client.flush()
    while True:
        for event in await client.events():
            if isinstance(event, h2.events.DataReceived) and event.stream_id == stream:
                for answer in inner.receive_data(event.data):
                    if isinstance(answer, h2.events.ResponseReceived):
                        return int(dict(answer.headers)[b":status"])
                client.connection.send_data(stream, inner.data_to_send())
                client.flush()


@asynccontextmanager
async def carried(client: Http2, stream: int) -> AsyncIterator[socket.socket]:
    """A connected socket whose bytes go through the stream; nothing else may use the client meanwhile."""
    near, far = socket.socketpair()
    near.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=far)

    async def send() -> None:
        while data := await reader.read(16384):
            client.connection.send_data(stream, data)
            client.flush()

    async def receive() -> None:
        with suppress(ConnectionError):
            while True:
                for event in await client.events():
                    if isinstance(event, h2.events.DataReceived) and event.stream_id == stream:
                        writer.write(event.data)
                    if isinstance(event, h2.events.StreamReset | h2.events.StreamEnded):
                        writer.close()

    tasks = [asyncio.create_task(send()), asyncio.create_task(receive())]
    try:
        yield near
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        writer.close()
