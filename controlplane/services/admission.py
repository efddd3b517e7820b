"""How many agents are served at once. When all of them come back together, users are still answered, and so is everybody, in turn."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from random import uniform
from uuid import UUID

from controlplane.errors import TooManyRequests
from controlplane.services.agents import Agent, expiry, judge
from controlplane.services.batches import Batches
from controlplane.store import nodes
from controlplane.store.nodes import Verdict
from controlplane.store.session import Database

AT_ONCE = 8
"""Of the database's connections, which users need too."""
MOST_WAITING = 256
"""Some seconds of work; who comes then had better come later."""
_LATER_S = (2.0, 10.0)
CALLS_PER_S = 20.0
"""Of one node, for ever. Agents make a few each second where much changes, and one or less where nothing does."""
CALLS_AT_ONCE = 600
"""As many a node may have saved up: a manifest of 100,000 items is fetched by 400."""
CHANGES_PER_S = 1 / 3
"""Of what a node says that others are told of: each is a revision of its tenant, which all its caches follow."""
CHANGES_AT_ONCE = 12
"""A start takes a handful."""


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


class Allowance:
    """How often each node may do something. One for each replica."""

    def __init__(self, per_s: float, at_once: int, refusal: str) -> None:
        self._refusal = refusal
        self._cost_s, self._most_s = 1 / per_s, at_once / per_s
        self._paid_at: dict[UUID, float] = {}
        """When a node that does it no more has its whole allowance again; those that have it already are forgotten."""
        self._forget_from = 1000

    def spend(self, node_id: UUID, now: float) -> None:
        """Once, by a clock that never jumps. Raises `TooManyRequests`, which costs nothing."""
        paid_at = max(self._paid_at.get(node_id, now), now) + self._cost_s
        if paid_at > now + self._most_s:
            raise TooManyRequests(self._refusal, retry_after_s=paid_at - now - self._most_s)
        self._paid_at[node_id] = paid_at
        if len(self._paid_at) > self._forget_from:
            self._paid_at = {node: at for node, at in self._paid_at.items() if at > now}
            self._forget_from = 1000 + 2 * len(self._paid_at)


def calls(per_s: float = CALLS_PER_S, at_once: int = CALLS_AT_ONCE) -> Allowance:
    return Allowance(per_s, at_once, "this node calls too often")


def changes(per_s: float = CHANGES_PER_S, at_once: int = CHANGES_AT_ONCE) -> Allowance:
    """The refused report comes again, with what is true by then."""
    return Allowance(per_s, at_once, "what this node says of itself changes too often")


class Proofs:
    """Spends proofs of calls that only read: many in one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._batches = Batches(self._spend)

    async def spend(self, agent: Agent) -> None:
        """Raises `Unauthenticated` for a proof that was used before, and for a node that was revoked a moment ago."""
        proof = (agent.node.id, agent.proof.jti)
        if self._batches.waits(agent.tenant_id, proof):
            judge(agent, "replayed")
        judge(agent, await self._batches.ask(agent.tenant_id, proof, expiry(agent.proof)))

    async def _spend(self, tenant_id: UUID, proofs: Mapping[tuple[UUID, str], datetime]) -> Mapping[tuple[UUID, str], Verdict]:
        async with self._database.sessions(tenant_id) as session:
            return await nodes.spend_all(session, tenant_id, proofs)
