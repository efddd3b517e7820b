"""Sealed secrets of objects; each goes with its object."""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import delete, insert, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.resources.base import Key
from controlplane.store.tables import SecretRow


@dataclass(frozen=True)
class SealedSecret:
    uid: UUID
    version: int
    sealed: bytes

    @property
    def ref(self) -> str:
        return f"secret:{self.uid}:{self.version}"


def purpose(tenant_id: UUID, ref: str) -> str:
    """What a secret is sealed as, so that no other row can be put in its place."""
    return f"{tenant_id}:{ref}"


async def held(session: AsyncSession, tenant_id: UUID, kind: str, key: Key) -> dict[str, SealedSecret]:
    """By reference, those of one object."""
    query = select(SecretRow.uid, SecretRow.version, SecretRow.sealed).where(
        SecretRow.tenant_id == tenant_id, SecretRow.kind == kind, SecretRow.namespace == key.namespace, SecretRow.name == key.name
    )
    found = (SealedSecret(*row) for row in await session.execute(query))
    return {secret.ref: secret for secret in found}


async def find(session: AsyncSession, tenant_id: UUID, refs: tuple[str, ...]) -> dict[str, SealedSecret]:
    """By reference; those that do not exist are missing."""
    ids = [(UUID(uid), int(version)) for _, uid, version in (ref.split(":") for ref in refs)]
    query = select(SecretRow.uid, SecretRow.version, SecretRow.sealed).where(
        SecretRow.tenant_id == tenant_id, tuple_(SecretRow.uid, SecretRow.version).in_(ids)
    )
    found = (SealedSecret(*row) for row in await session.execute(query))
    return {secret.ref: secret for secret in found}


async def keep(
    session: AsyncSession, tenant_id: UUID, kind: str, key: Key, added: tuple[SealedSecret, ...], dropped: tuple[SealedSecret, ...]
) -> None:
    """Change which secrets an object holds."""
    if dropped:
        ids = [(secret.uid, secret.version) for secret in dropped]
        columns = tuple_(SecretRow.uid, SecretRow.version)
        await session.execute(delete(SecretRow).where(SecretRow.tenant_id == tenant_id, columns.in_(ids)))
    if added:
        holder = {"tenant_id": tenant_id, "kind": kind, "namespace": key.namespace, "name": key.name}
        await session.execute(insert(SecretRow), [vars(secret) | holder for secret in added])
