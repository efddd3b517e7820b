"""Carries TCP connections from one place to another, and misbehaves on demand: the kernel here may have no netem, so the lab has this."""

import asyncio
import random
import socket
from contextlib import suppress
from dataclasses import dataclass, field

from lab.network import Place

CHUNK = 1 << 16
RECORD_LIMIT = 8 << 20
RETRANSMISSION_S = 0.2
"""What one lost packet costs a TCP stream, roughly: the stack's smallest retransmission timeout."""


@dataclass
class Forwarder:
    """From a listening socket to `target` as seen from `place`. The faults may be changed at any time."""

    listener: socket.socket
    place: Place
    target: tuple[str, int]
    delay_s: float = 0
    """One way, added to each direction."""
    window: int | None = None
    """Bytes that each direction may have under way until they are acknowledged, as TCP would on a path of that delay; None: no limit."""
    loss: float = 0
    """Probability that a chunk is late by a retransmission."""
    recording: bytearray | None = None
    """When set, every byte of both directions is appended, up to a limit."""
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _refusing: bool = False
    _server: asyncio.Server | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.listener.getsockname()[:2]
        return host, port

    async def start(self) -> None:
        self._flowing.set()
        self._server = await asyncio.start_server(self._accept, sock=self.listener)

    async def stop(self) -> None:
        if self._server:
            self._server.close()
        await self._drop()

    def record(self) -> bytearray:
        """Start recording; the bytes appear in what this returns."""
        self.recording = bytearray()
        return self.recording

    async def cut(self) -> None:
        """Reset what is connected and refuse what comes, until `mend`."""
        self._refusing = True
        await self._drop()

    def freeze(self) -> None:
        """Let nothing through and close nothing, as a path that swallows packets, until `mend`."""
        self._flowing.clear()

    def mend(self) -> None:
        self._refusing = False
        self._flowing.set()

    async def _drop(self) -> None:
        connections = tuple(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if not self._refusing:
                await self._carry(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # the peer is gone, or the path was cut: both ends learn it by the reset below
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        dialled = self.place.socket()
        try:
            await asyncio.get_running_loop().sock_connect(dialled, self.target)
        except BaseException:
            dialled.close()
            raise
        far_reader, far_writer = await asyncio.open_connection(sock=dialled)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer))
                group.create_task(self._pump(far_reader, writer))
        except* OSError:
            pass  # as in `_accept`
        finally:
            far_writer.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Two tasks and a queue, so that a delay does not become a limit of throughput."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(maxsize=256)
        flight = _Flight()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read(reader, queue, flight))
            group.create_task(self._write(queue, writer, flight))

    async def _read(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]], flight: "_Flight") -> None:
        loop = asyncio.get_running_loop()
        while True:
            await flight.below(self.window)
            data = await reader.read(CHUNK)
            flight.began(len(data))
            if self.recording is not None and len(self.recording) < RECORD_LIMIT:
                self.recording += data
            late = RETRANSMISSION_S if self.loss and random.random() < self.loss else 0
            await queue.put((loop.time() + self.delay_s + late, data))
            if not data:
                return

    async def _write(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, flight: "_Flight") -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, data = await queue.get()
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            await self._flowing.wait()
            if not data:
                with suppress(OSError):
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()
            loop.call_later(self.delay_s, flight.ended, len(data))


class _Flight:
    """Bytes of one direction that were sent and not acknowledged."""

    def __init__(self) -> None:
        self._bytes = 0
        self._landed = asyncio.Event()

    def began(self, count: int) -> None:
        self._bytes += count

    def ended(self, count: int) -> None:
        self._bytes -= count
        self._landed.set()

    async def below(self, window: int | None) -> None:
        while window is not None and self._bytes >= window:
            self._landed.clear()
            await self._landed.wait()
