"""Which node is calling: the proof of possession that every call of an agent carries."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID
from weakref import WeakValueDictionary

from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.enrolment import PROOF_LIFE_S, Proof
from controlplane import pki
from controlplane.auth import proof_node, refused_proof, verify_proof
from controlplane.errors import NotFound, Unauthenticated
from controlplane.services.caches import TenantCache
from controlplane.services.delivery import Delivery
from controlplane.store import nodes as store
from controlplane.store.nodes import Node
from controlplane.store.session import Database

_LOOKUPS = 2
"""Of nodes whose tenants are not in memory: so many at once."""


@dataclass(frozen=True)
class Call:
    """A request as it was sent, without its body."""

    token: str
    """The JWT of its `Authorization: Proof`."""
    method: str
    target: str
    """Path and query."""


@dataclass(frozen=True)
class Agent:
    """A node that proved that it is calling, just now."""

    cache: TenantCache
    node: Node
    proof: Proof

    @property
    def tenant_id(self) -> UUID:
        return self.cache.id

    @property
    def site_id(self) -> str:
        return str(self.node.site_id)


class Agents:
    """Knows the nodes that called lately. A revocation reaches it as any change of the tenant does."""

    def __init__(self, database: Database, delivery: Delivery) -> None:
        self._database = database
        self._delivery = delivery
        self._caches: WeakValueDictionary[UUID, TenantCache] = WeakValueDictionary()
        """Of the tenant of a node, which never changes; forgotten with the cache, that is when nobody of the tenant has called for long."""
        self._lookups = asyncio.Semaphore(_LOOKUPS)

    async def recognise(self, call: Call, now: datetime) -> Agent:
        """Raises `Unauthenticated` with the reason as the field of its detail.

        Whether the proof is for the body is for `auth.verify_body`, whether it was used before for `spend`.
        """
        node_id = proof_node(call.token)
        cache = await self._cache(node_id)
        try:
            return self._verified(cache, node_id, call, now)
        except Unauthenticated:
            # It may have enrolled, or renewed its key, at another replica a moment ago.
            known = cache.view.fleet.nodes.get(node_id)
            await self._delivery.catch_up(cache)
            if cache.view.fleet.nodes.get(node_id) is known:
                raise
            return self._verified(cache, node_id, call, now)

    def knows(self, call: Call) -> bool:
        """Whether the node that a call claims to come from has called before."""
        return proof_node(call.token) in self._caches

    def _verified(self, cache: TenantCache, node_id: UUID, call: Call, now: datetime) -> Agent:
        node = cache.view.fleet.nodes.get(node_id)
        if node is None:
            self._caches.pop(node_id, None)
            raise _unknown(node_id)
        keys = pki.load_public_keys(node.public_key_pem)
        for key in keys[:-1]:
            try:
                return self._admitted(cache, node, _verify(call, key, now))
            except Unauthenticated:
                continue
        return self._admitted(cache, node, _verify(call, keys[-1], now))

    def _admitted(self, cache: TenantCache, node: Node, proof: Proof) -> Agent:
        if node.revoked_at:
            raise refused_proof("Revoked", f"node {node.name} was revoked at {node.revoked_at.isoformat(timespec='seconds')}")
        return Agent(cache, node, proof)

    async def _cache(self, node_id: UUID) -> TenantCache:
        known = self._caches.get(node_id)
        tenant_id = known.id if known else await self._tenant(node_id)
        try:
            cache = self._caches[node_id] = await self._delivery.cache(tenant_id)
        except NotFound:
            raise _unknown(node_id) from None
        return cache

    async def _tenant(self, node_id: UUID) -> UUID:
        """By memory, or by the database; when many call at once, the first ones bring what the others need."""
        if known := self._delivery.tenant_of(node_id):
            return known
        async with self._lookups:
            if known := self._delivery.tenant_of(node_id):
                return known
            async with self._database.definer() as connection:
                found = await connection.execute(text("SELECT tenant_id FROM node_by_id(:id)"), {"id": node_id})
            tenant_id: UUID | None = found.scalar()
            if tenant_id is None:
                raise _unknown(node_id)
            with suppress(NotFound):
                await self._delivery.cache(tenant_id)
            return tenant_id


async def spend(session: AsyncSession, agent: Agent) -> None:
    """Refuse a proof that was used before, and a node that was revoked a moment ago; part of the transaction that does what it asks for."""
    judge(agent, await store.spend(session, agent.tenant_id, agent.node.id, agent.proof.jti, expiry(agent.proof)))


def expiry(proof: Proof) -> datetime:
    """From then on it is refused for its age, also by a clock that is behind."""
    return datetime.fromtimestamp(proof.iat + 2 * PROOF_LIFE_S, UTC)


def judge(agent: Agent, verdict: store.Verdict) -> None:
    """Raises `Unauthenticated` unless the proof was spent."""
    match verdict:
        case "revoked":
            raise refused_proof("Revoked", f"node {agent.node.name} was revoked")
        case "replayed":
            raise refused_proof("Replayed", "this proof was used before")


def _verify(call: Call, key: ec.EllipticCurvePublicKey, now: datetime) -> Proof:
    return verify_proof(call.token, key, method=call.method, target=call.target, now=now)


def _unknown(node_id: UUID) -> Unauthenticated:
    return refused_proof("UnknownNode", f"there is no node {node_id}")
