"""Asks a load balancer over and over on one connection: a change is in force when the answer shows it, which is a little after the ACK."""

import asyncio

from lab.network import Place

EVERY_S = 0.001


class Probe:
    """One keep-alive connection, made from within a place. Not for concurrent use."""

    def __init__(self, place: Place, host: str, port: int, domain: str) -> None:
        self._place, self._target = place, (host, port)
        self._request = f"GET / HTTP/1.1\r\nhost: {domain}\r\n\r\n".encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def shows(self, marker: bytes, within_s: float = 20, every_s: float = EVERY_S) -> float:
        """The loop's clock when an answer first contained the marker."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + within_s
        while marker not in (answer := await self._ask()):
            if loop.time() > deadline:
                raise TimeoutError(f"no answer with {marker!r}; the last one was {answer!r}")
            await asyncio.sleep(every_s)
        return loop.time()

    def close(self) -> None:
        if self._streams:
            self._streams[1].close()
            self._streams = None

    async def _ask(self) -> bytes:
        """Head and body of an answer; empty when the connection broke."""
        try:
            if self._streams is None:
                dialled = self._place.socket()
                await asyncio.get_running_loop().sock_connect(dialled, self._target)
                self._streams = await asyncio.open_connection(sock=dialled)
            reader, writer = self._streams
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            return head + await reader.readexactly(_length(head))
        except (OSError, asyncio.IncompleteReadError):
            self.close()
            return b""


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0
