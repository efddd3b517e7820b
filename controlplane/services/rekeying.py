"""Sealing everything anew under the newest version of the key-encryption key, while replicas serve."""

from collections.abc import Callable, Mapping
from uuid import UUID

from controlplane.pki import KeyRing
from controlplane.services.authorities import purpose
from controlplane.store import authorities, sealed, tenants
from controlplane.store import secrets as secret_store
from controlplane.store.session import Database

BATCH = 100
"""Secrets in one transaction: whoever wants to change one of them waits for no longer than that takes."""

Counts = Mapping[int, int]
"""How much is sealed under each version."""


async def reseal(database: Database, ring: KeyRing, tell: Callable[[Counts], None]) -> Counts:
    """What is left under each version at the end. May be interrupted at any time, and repeated. Raises `pki.Unsealable`."""
    async with database.definer() as definer:
        known = await tenants.list_all(definer)
    await _reseal_authorities(database, ring, None)
    for tenant in known:
        await _reseal_authorities(database, ring, tenant.id)
        await _reseal_secrets(database, ring, tenant.id, tell)
    return await count(database)


async def count(database: Database) -> Counts:
    async with database.definer() as definer:
        return await sealed.under(definer)


async def _reseal_authorities(database: Database, ring: KeyRing, tenant_id: UUID | None) -> None:
    """Of a tenant, or the fabric's."""
    async with database.sessions(tenant_id) if tenant_id else database.transaction() as session:
        for authority in await authorities.of_owner(session, tenant_id):
            if ring.version_of(authority.sealed_key) != ring.version:
                what = purpose(authority.role, tenant_id, authority.version)
                key = ring.unseal(authority.sealed_key, what)
                await authorities.change(session, tenant_id, authority, sealed_key=ring.seal(key, what))


async def _reseal_secrets(database: Database, ring: KeyRing, tenant_id: UUID, tell: Callable[[Counts], None]) -> None:
    last = None
    while True:
        async with database.sessions(tenant_id) as session:
            found = await sealed.secrets_not_under(session, tenant_id, ring.version, last, BATCH)
            fresh = []
            for secret in found:
                what = secret_store.purpose(tenant_id, secret.ref)
                fresh.append((secret, ring.seal(ring.unseal(secret.sealed, what), what)))
            await sealed.put_secrets(session, tenant_id, fresh)
        if len(found) < BATCH:
            return
        last = found[-1]
        tell(await count(database))
