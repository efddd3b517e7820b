"""How many agents are served at once. When all of them come back together, users are still answered, and so is everybody, in turn."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from random import uniform
from uuid import UUID

from controlplane.errors import TooManyRequests
from controlplane.services.agents import Agent, expiry, judge
from controlplane.store import nodes
from controlplane.store.nodes import Verdict
from controlplane.store.session import Database

AT_ONCE = 8
"""Of the database's connections, which users need too."""
MOST_WAITING = 256
"""Some seconds of work; who comes then had better come later."""
_LATER_S = (2.0, 10.0)


class Gate:
    """Lets in so many at once, and so many wait. One for each replica."""

    def __init__(self, at_once: int = AT_ONCE, most_waiting: int = MOST_WAITING) -> None:
        self._places = asyncio.Semaphore(at_once)
        self._most_waiting = most_waiting
        self._waiting = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Raises `TooManyRequests` instead of waiting in a queue that is too long; not all come back at the same moment."""
        if self._waiting >= self._most_waiting:
            raise TooManyRequests("too many agents ask at once", retry_after_s=uniform(*_LATER_S))
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._places.release()


Key = tuple[UUID, str]
"""Of a proof: node and `jti`."""


@dataclass
class _Batch:
    """Proofs of one tenant that are spent in one transaction."""

    proofs: dict[Key, datetime] = field(default_factory=dict)
    verdicts: asyncio.Future[dict[Key, Verdict]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Proofs:
    """Spends proofs of calls that only read. What comes while one transaction runs shares the next."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._next: dict[UUID, _Batch] = {}
        self._running: dict[UUID, asyncio.Task[None]] = {}

    async def spend(self, agent: Agent) -> None:
        """Raises `Unauthenticated` for a proof that was used before, and for a node that was revoked a moment ago."""
        batch = self._next.get(agent.tenant_id)
        if batch is None:
            batch = self._next[agent.tenant_id] = _Batch()
        mine = (agent.node.id, agent.proof.jti)
        if mine in batch.proofs:
            judge(agent, "replayed")
        batch.proofs[mine] = expiry(agent.proof)
        if agent.tenant_id not in self._running:
            self._running[agent.tenant_id] = asyncio.create_task(self._run(agent.tenant_id))
        judge(agent, (await asyncio.shield(batch.verdicts))[mine])

    async def _run(self, tenant_id: UUID) -> None:
        try:
            while batch := self._next.pop(tenant_id, None):
                try:
                    async with self._database.sessions(tenant_id) as session:
                        verdicts = await nodes.spend_all(session, tenant_id, batch.proofs)
                except Exception as error:  # noqa: BLE001 - it is for those who wait, and logged for them
                    batch.verdicts.set_exception(error)
                    batch.verdicts.exception()
                else:
                    batch.verdicts.set_result(verdicts)
        finally:
            del self._running[tenant_id]
