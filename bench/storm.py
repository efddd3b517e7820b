"""Many simulated agents that lose their control plane and come back, as real ones do: with backoff, heartbeats, and what they had applied."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit
from uuid import uuid4

import httpx

from agent.backoff import backoff
from agent.protocol.manifest import MANIFEST_PATH, ManifestAnswer
from agent.protocol.report import HEARTBEAT_PATH, Heartbeat, HeartbeatAnswer
from bench.memory import Simulated, read_answer
from lab.controlplane import ControlPlane

WAIT_S = 50
_PATIENCE_S = 15.0
"""Beyond what a poll may wait."""
_BUSY = (429, 503)
_FIRST_S, _CEILING_S = 1.0, 15.0


class _Busy(Exception):
    """The control plane asks to be left alone for a while."""


@dataclass
class Connection:
    """One TLS connection to a control plane; one request at a time."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    url: str

    async def ask(self, node: Simulated, method: str, path: str, body: bytes = b"", read_s: float = _PATIENCE_S) -> bytes:
        """The body of the answer; raises `_Busy`, and `RuntimeError` for whatever else is not 200."""
        request = httpx.Request(method, self.url + path, content=body)
        proof = node.signer.authorization(request, time.time())
        head = f"{method} {path} HTTP/1.1\r\nhost: {urlsplit(self.url).netloc}\r\nauthorization: {proof}\r\n"
        self.writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        async with asyncio.timeout(read_s):
            status, said = await read_answer(self.reader)
        if status in _BUSY:
            raise _Busy
        if status != 200:
            raise RuntimeError(f"{method} {path}: {status} {said.decode(errors='replace')[:200]}")
        return said


@dataclass
class Returning:
    """A node that follows its manifest, says what it has, and tries again whenever it is cut off."""

    node: Simulated
    boot_id: str = field(default_factory=lambda: str(uuid4()))
    sequence: int = 0
    pace_s: float = 3.0
    answers: int = 0
    """From the control plane, since it was set to 0."""
    task: asyncio.Task[None] | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self) -> None:
        """Raise what ended it."""
        if self.task and self.task.done():
            self.task.result()

    async def live(self, replica: ControlPlane, trust: ssl.SSLContext) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._persist(replica, trust, self._follow))
            group.create_task(self._persist(replica, trust, self._beat))

    async def _persist(self, replica: ControlPlane, trust: ssl.SSLContext, work: Callable[[Connection], Awaitable[None]]) -> None:
        """`work` on one connection after the other; who was answered begins anew with short delays."""
        delays = backoff(_FIRST_S, _CEILING_S)
        while True:
            before = self.answers
            try:
                async with _connected(replica, trust) as connection:
                    await work(connection)
            except (OSError, asyncio.IncompleteReadError, _Busy):
                if self.answers > before:
                    delays = backoff(_FIRST_S, _CEILING_S)
                await asyncio.sleep(next(delays))

    async def _follow(self, connection: Connection) -> None:
        while True:
            known = f"?hash={self.node.hash}&wait={WAIT_S}" if self.node.hash else ""
            said = await connection.ask(self.node, "GET", MANIFEST_PATH + known, read_s=WAIT_S + _PATIENCE_S)
            found = ManifestAnswer.model_validate_json(said)
            self.answers += 1
            self.node.hash, self.node.revision = found.hash, found.revision
            self._news.set()

    async def _beat(self, connection: Connection) -> None:
        while True:
            self._news.clear()
            self.sequence += 1
            body = Heartbeat(
                boot_id=self.boot_id,
                sequence=self.sequence,
                sent_at=time.time(),
                applied_hash=self.node.hash,
                applied_revision=self.node.revision,
                proxy="live",
            )
            said = await connection.ask(self.node, "POST", HEARTBEAT_PATH, body.model_dump_json().encode())
            self.answers += 1
            self.pace_s = HeartbeatAnswer.model_validate_json(said).pace_s
            try:
                await asyncio.wait_for(self._news.wait(), self.pace_s)
            except TimeoutError:
                continue


@asynccontextmanager
async def _connected(replica: ControlPlane, trust: ssl.SSLContext) -> AsyncIterator[Connection]:
    address = urlsplit(replica.url)
    async with asyncio.timeout(_PATIENCE_S):
        reader, writer = await asyncio.open_connection(address.hostname, address.port, ssl=trust, limit=1 << 18)
    try:
        yield Connection(reader, writer, replica.url)
    finally:
        writer.transport.abort()


@asynccontextmanager
async def living(nodes: Sequence[Simulated], replica: ControlPlane) -> AsyncIterator[list[Returning]]:
    """All of them, until the end; raises what ended one too early."""
    trust = ssl.create_default_context(cafile=str(replica.ca))
    agents = [Returning(node) for node in nodes]
    for agent in agents:
        agent.task = asyncio.create_task(agent.live(replica, trust))
    tasks = [agent.task for agent in agents if agent.task]
    try:
        yield agents
        for agent in agents:
            agent.check()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
