"""At a regional edge: carries connections of sites that have no other way to the control plane.

Nothing is read or decided here. The session inside is TLS between an agent and the control plane, which both prove who they are; and it leads
nowhere else.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NoReturn
from urllib.parse import urlsplit

from agent.log import log

MOST_CONNECTIONS = 2_000
_CONNECT_S = 5.0
_IDLE_S = 120.0
"""Several times as long as a long poll."""
_CHUNK = 64 << 10


@dataclass
class Forwarder:
    """Listens on `host:port`; each connection leads to the first of the control plane's URLs that takes it."""

    host: str
    port: int
    urls: Callable[[], Sequence[str]]
    _open: set["asyncio.Task[None]"] = field(default_factory=set, init=False)

    async def run(self) -> NoReturn:
        while True:
            try:
                server = await asyncio.start_server(self._accepted, self.host, self.port)
            except OSError as error:
                log.error("cannot carry connections to the control plane", reason=str(error))
                await asyncio.sleep(10)
                continue
            try:
                await server.serve_forever()
            finally:
                for task in self._open:
                    task.cancel()

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= MOST_CONNECTIONS:
            writer.close()
            return
        task = asyncio.create_task(self._carry(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await self._connect()
            if there is None:
                return
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_pump(reader, there[1]))
                    group.create_task(_pump(there[0], writer))
            except* (OSError, TimeoutError):
                pass  # both ends hear of it
            finally:
                there[1].close()
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for url in self.urls():
            parts = urlsplit(url)
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CONNECT_S):
                    return await asyncio.open_connection(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
        return None


async def _pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while True:
        async with asyncio.timeout(_IDLE_S):
            data = await source.read(_CHUNK)
        if not data:
            break
        target.write(data)
        await target.drain()
    if target.can_write_eof():
        target.write_eof()
