"""A steady stream of requests, and what became of each: nothing is retried and nothing forgotten."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import httpx


@dataclass(frozen=True)
class Outcome:
    at: float
    """Seconds from the start of the traffic to the answer."""
    latency_s: float
    status: int
    """0: no answer."""
    pod: str
    error: str = ""

    @property
    def failed(self) -> bool:
        return self.status == 0 or self.status >= 500


@dataclass
class Traffic:
    """`async with` starts it and stops it. Each of `workers` keeps one request under way, at `rate` requests per second in all."""

    client: httpx.AsyncClient
    path: str
    rate: float = 100
    workers: int = 4
    outcomes: list[Outcome] = field(default_factory=list)
    _tasks: Sequence[asyncio.Task[None]] = ()
    _stopping: bool = False
    _started: float = 0
    _seen: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def __aenter__(self) -> Self:
        self._started = asyncio.get_running_loop().time()
        self._tasks = [asyncio.create_task(self._work()) for _ in range(self.workers)]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)

    @property
    def failures(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.failed]

    async def more(self, count: int, where: Callable[[Outcome], bool] = lambda _: True, within_s: float = 20) -> list[Outcome]:
        """The next outcomes of this kind, from now on."""
        start = len(self.outcomes)

        def found() -> list[Outcome]:
            return [outcome for outcome in self.outcomes[start:] if where(outcome)]

        async with self._seen:
            await asyncio.wait_for(self._seen.wait_for(lambda: len(found()) >= count), within_s)
        return found()[:count]

    def pods(self, last: int) -> Counter[str]:
        """Who answered the latest requests."""
        return Counter(outcome.pod for outcome in self.outcomes[-last:] if not outcome.failed)

    def latency_ms(self, share: float) -> float:
        """Of the requests that were answered; `share` 0.5 is the median."""
        latencies = sorted(outcome.latency_s for outcome in self.outcomes if not outcome.failed)
        return 1000 * latencies[min(len(latencies) - 1, int(share * len(latencies)))]

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while not self._stopping:
            outcome = await self._request(loop)
            async with self._seen:
                self.outcomes.append(outcome)
                self._seen.notify_all()
            due = max(due + self.workers / self.rate, loop.time() - 1)
            await asyncio.sleep(max(0, due - loop.time()))

    async def _request(self, loop: asyncio.AbstractEventLoop) -> Outcome:
        start = loop.time()

        def outcome(status: int, pod: str, error: str) -> Outcome:
            return Outcome(round(loop.time() - self._started, 3), loop.time() - start, status, pod, error)

        try:
            answer = await self.client.get(self.path)
        except httpx.HTTPError as error:
            return outcome(0, "", f"{type(error).__name__}: {error}")
        return outcome(answer.status_code, answer.headers.get("x-pod", ""), "" if answer.is_success else answer.text[:200])
