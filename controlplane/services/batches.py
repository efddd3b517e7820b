"""Many small questions to the database, asked together: what comes while one transaction runs shares the next."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from uuid import UUID

K = TypeVar("K", bound=Hashable)
A = TypeVar("A")
V = TypeVar("V")


@dataclass
class _Batch(Generic[K, A, V]):
    """Questions of one tenant, by key."""

    asked: dict[K, A] = field(default_factory=dict)
    answers: "asyncio.Future[Mapping[K, V]]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batches(Generic[K, A, V]):
    """`answer` gets the questions of one tenant, and answers each; one call at a time for each tenant."""

    def __init__(self, answer: Callable[[UUID, Mapping[K, A]], Awaitable[Mapping[K, V]]]) -> None:
        self._answer = answer
        self._next: dict[UUID, _Batch[K, A, V]] = {}
        self._running: dict[UUID, asyncio.Task[None]] = {}

    def waits(self, tenant_id: UUID, key: K) -> bool:
        """Whether the same is asked already, and not yet being answered."""
        return tenant_id in self._next and key in self._next[tenant_id].asked

    async def ask(self, tenant_id: UUID, key: K, question: A) -> V:
        """Raises what `answer` raises."""
        batch = self._next.get(tenant_id)
        if batch is None:
            batch = self._next[tenant_id] = _Batch()
        batch.asked[key] = question
        if tenant_id not in self._running:
            self._running[tenant_id] = asyncio.create_task(self._run(tenant_id))
        return (await asyncio.shield(batch.answers))[key]

    async def _run(self, tenant_id: UUID) -> None:
        try:
            while batch := self._next.pop(tenant_id, None):
                try:
                    batch.answers.set_result(await self._answer(tenant_id, batch.asked))
                except Exception as error:  # noqa: BLE001 - it is for those who asked
                    batch.answers.set_exception(error)
                    batch.answers.exception()
        finally:
            del self._running[tenant_id]
