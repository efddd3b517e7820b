"""Bodies of secrets, for the nodes that need them."""

from collections.abc import Sequence
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.pki import KeyRing
from controlplane.store import secrets as store


async def open_secrets(session: AsyncSession, tenant_id: UUID, refs: Sequence[str], ring: KeyRing) -> dict[str, bytes]:
    """By reference; those that are gone are missing."""
    if not refs:
        return {}
    found = await store.find(session, tenant_id, tuple(refs))
    return {ref: ring.unseal(secret.sealed, store.purpose(tenant_id, ref)) for ref, secret in found.items()}
