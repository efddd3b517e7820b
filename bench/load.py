"""Steady load from one node: idempotent requests, and connections that are meant to live for ever. Nothing is retried, nothing forgotten."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from lab.site import Node

Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]

PATIENCE_S = 15.0
"""Until a client takes an answer for lost."""
RATE, WORKERS = 100, 10
TALKS, TALK_EVERY_S = 8, 0.1
_PAUSE_S = 0.05
"""Before a client that was refused tries again."""


@dataclass(frozen=True)
class Attempt:
    """One request, or one word said on a connection; `error` is empty when it was answered well."""

    began: float
    ended: float
    error: str = ""
    talk: int = 0
    """Of words: whose."""

    @property
    def took_s(self) -> float:
        return self.ended - self.began


@dataclass
class Load:
    """`async with` starts it and stops it. `at` are the nodes that are called in turn, at these ports of their inside network."""

    at: Sequence[Node]
    domain: str
    http_port: int
    tcp_port: int
    requests: list[Attempt] = field(default_factory=list)
    words: list[Attempt] = field(default_factory=list)
    """Of all connections; one that breaks is an error, and so is each vain attempt to have a new one."""
    _tasks: Sequence[asyncio.Task[None]] = ()
    _stopping: bool = False

    async def __aenter__(self) -> Self:
        nodes = [self.at[number % len(self.at)] for number in range(WORKERS)]
        self._tasks = [
            *(asyncio.create_task(self._ask_on(node, number / RATE)) for number, node in enumerate(nodes)),
            *(asyncio.create_task(self._talk(number, self.at[number % len(self.at)])) for number in range(TALKS)),
        ]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        for ended in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(ended, Exception) and kind is None:
                raise ended

    def well_since(self, moment: float) -> bool:
        """Whether everything that ended since then was answered well, and everything was heard of."""
        return all(
            attempts and attempts[-1].ended > moment and not any(attempt.error for attempt in reversed_until(attempts, moment))
            for attempts in (self.requests, self.words)
        )

    async def _ask_on(self, node: Node, offset_s: float) -> None:
        loop = asyncio.get_running_loop()
        due, stream = loop.time() + offset_s, None
        while not self._stopping:
            began = loop.time()
            stream, error = await self._attempt(self._request, node, self.http_port, stream)
            self.requests.append(Attempt(began, loop.time(), error))
            due = max(due + WORKERS / RATE, loop.time() - 1)
            await asyncio.sleep(max(_PAUSE_S if error else 0, due - loop.time()))

    async def _talk(self, number: int, node: Node) -> None:
        loop, stream = asyncio.get_running_loop(), None
        while not self._stopping:
            began = loop.time()
            stream, error = await self._attempt(self._word, node, self.tcp_port, stream)
            self.words.append(Attempt(began, loop.time(), error, number))
            await asyncio.sleep(_PAUSE_S if error else TALK_EVERY_S)

    async def _attempt(
        self, say: Callable[[Stream, bool], Awaitable[bool]], node: Node, port: int, stream: Stream | None
    ) -> tuple[Stream | None, str]:
        """The connection for the next attempt, and what went wrong."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                fresh = stream is None
                stream = stream or await node.connect(port)
                if not await say(stream, fresh):
                    stream[1].transport.abort()
                    return None, ""
        except (OSError, asyncio.IncompleteReadError, _Refused) as error:
            if stream:
                stream[1].transport.abort()
            return None, str(error) or type(error).__name__
        except asyncio.CancelledError:
            if stream:
                stream[1].transport.abort()
            raise
        return stream, ""

    async def _request(self, stream: Stream, fresh: bool) -> bool:
        """Whether the connection may be used again."""
        reader, writer = stream
        writer.write(f"GET / HTTP/1.1\r\nhost: {self.domain}\r\n\r\n".encode())
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        lines = dict(line.partition(b": ")[::2] for line in head.split(b"\r\n")[1:])
        body = await reader.readexactly(int(lines.get(b"content-length", b"0")))
        if not head.startswith(b"http/1.1 200"):
            raise _Refused(f"{head[9:12].decode()} {body[:80].decode(errors='replace')}")
        return lines.get(b"connection") != b"close"

    async def _word(self, stream: Stream, fresh: bool) -> bool:
        reader, writer = stream
        if fresh:
            await reader.readuntil(b"\n")
        writer.write(b"still there?")
        await reader.readexactly(12)
        return True


class _Refused(Exception):
    """An answer, but not a good one."""


def reversed_until(attempts: Sequence[Attempt], moment: float) -> Iterator[Attempt]:
    """From the last one back to the first that ended after `moment`."""
    for attempt in reversed(attempts):
        if attempt.ended < moment:
            return
        yield attempt


async def steady(load: Load, *, for_s: float, within_s: float) -> None:
    """Until nothing has gone wrong for so long; raises TimeoutError with what did."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within_s
    began = loop.time()
    while not (loop.time() - began > for_s and load.well_since(loop.time() - for_s)):
        if loop.time() > deadline:
            last = [attempt.error for attempts in (load.requests, load.words) for attempt in attempts[-200:] if attempt.error]
            raise TimeoutError(f"the load is not steady after {within_s:g} s: {', '.join(sorted(set(last))) or 'nothing is heard'}")
        await asyncio.sleep(0.1)
