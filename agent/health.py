"""For the probes of a kubelet or a load balancer: `/healthz` answers while this process does, `/readyz` while the node serves."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from agent.errors import Misconfigured

DEFAULT_PORT = 15021
_LONGEST_REQUEST = 4096
"""Bytes."""
_PATIENCE_S = 5.0
_MOST_CALLERS = 32


class Health:
    """HTTP/1.1, one request per connection: all that probes want, and nothing else to be found."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        self._ready = ready
        self._callers = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._callers += 1
        try:
            if self._callers <= _MOST_CALLERS:
                async with asyncio.timeout(_PATIENCE_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                    writer.write(self._response(head))
                    await writer.drain()
        except (TimeoutError, ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever speaks like this gets a closed connection
        finally:
            self._callers -= 1
            writer.close()

    def _response(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0]
        known = {b"/healthz": True, b"/readyz": self._ready()}
        if method != b"GET" or path not in known:
            status, body = b"404 Not Found", b"there is /healthz and /readyz\n"
        elif known[path]:
            status, body = b"200 OK", b"ok\n"
        else:
            status, body = b"503 Service Unavailable", b"this node does not serve yet\n"
        return b"HTTP/1.1 %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (status, len(body), body)


@asynccontextmanager
async def answering(address: tuple[str, int] | None, ready: Callable[[], bool]) -> AsyncIterator[None]:
    """At this address, if there is one. Raises `Misconfigured` if it cannot be had."""
    if address is None:
        yield
        return
    try:
        server = await asyncio.start_server(Health(ready).answer, *address, limit=_LONGEST_REQUEST)
    except OSError as error:
        raise Misconfigured(f"probes cannot be answered on {address[0]} port {address[1]}: {error.strerror}") from error
    try:
        yield
    finally:
        server.close()
        with suppress(OSError):
            await server.wait_closed()
