"""Origins that a test holds in its hand: servers in the test's own process, listening within a site, that misbehave on demand."""

import asyncio
import json
import ssl
from contextlib import suppress
from dataclasses import dataclass, field

from lab.network import Place

PORT = 8080


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    """By lower-case name; the last one of several."""
    sni: str | None


@dataclass
class Origin:
    """Answers HTTP/1.1 with its name in `x-origin` and what it was asked as JSON; echoes WebSockets.

    `/slow` waits for `released`. `/health` is 200 or 503 as `healthy` says, everything else `status`; the first `failing` requests
    get 503 whatever `status` is. `/forge` is answered with a header that only nodes may send, `/reset` not at all.
    """

    name: str
    site: str
    address: str
    port: int = PORT
    status: int = 200
    healthy: bool = True
    failing: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[Request] = field(default_factory=list)
    """Health checks apart."""
    checks: int = 0
    sni: str | None = None
    _server: asyncio.Server | None = None

    async def start(self, place: Place, tls: ssl.SSLContext | None = None) -> None:
        if tls is not None:
            tls.sni_callback = self._named
        listening = place.listen(self.address, self.port)
        self.port = listening.getsockname()[1]
        self._server = await asyncio.start_server(self._connected, sock=listening, ssl=tls)

    def stop(self) -> None:
        """Accept no more connections."""
        assert self._server is not None
        self._server.close()

    def _named(self, _: ssl.SSLObject | ssl.SSLSocket, name: str | None, __: ssl.SSLContext) -> None:
        self.sni = name

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while await self._answer(reader, writer):
                pass
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        await reader.readexactly(int(headers.get("content-length", "0")))
        if path.startswith("/health"):
            self.checks += 1
            return await self._reply(writer, 200 if self.healthy else 503, b"")
        self.seen.append(Request(method, path, headers, self.sni))
        if headers.get("upgrade") == "websocket":
            return await _echo(reader, writer)
        if path.startswith("/reset"):
            return False
        if path.startswith("/slow"):
            await self.released.wait()
        status = self.status
        if self.failing:
            self.failing -= 1
            status = 503
        said = {"origin": self.name, "method": method, "path": path, "headers": headers}
        value = path.partition("?value=")[2] or "unreached"
        forged = f"x-isthmus-failed: {value}\r\n" if path.startswith("/forge") else ""
        return await self._reply(writer, status, json.dumps(said).encode(), forged)

    async def _reply(self, writer: asyncio.StreamWriter, status: int, body: bytes, more: str = "") -> bool:
        head = f"HTTP/1.1 {status} Said\r\ncontent-length: {len(body)}\r\nx-origin: {self.name}\r\nx-gone: yes\r\n{more}\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        return True


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """As good as a WebSocket to a proxy: bytes both ways after 101."""
    writer.write(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n")
    while data := await reader.read(65536):
        writer.write(data)
    return False
