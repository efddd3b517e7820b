"""The fabric's authorities: made once, kept sealed, opened when something is to be signed."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane import pki
from controlplane.store import authorities as store
from controlplane.store.authorities import SealedAuthority


@dataclass(frozen=True)
class Fabric:
    """What every replica knows about the fabric's trust."""

    trust_domain: str
    ring: pki.KeyRing
    roots_pem: str
    """Under which control planes and edges are trusted; newest first."""
    tokens: pki.Authority
    """Signs registration tokens."""


async def create_fabric(session: AsyncSession, ring: pki.KeyRing, trust_domain: str, now: datetime) -> None:
    """Root and the fabric's intermediates. The caller holds the lock of the first start and knows that there are none."""
    root = pki.create_root(trust_domain, now)
    made = {
        "root": root,
        "servers": pki.create_servers_authority(root, trust_domain, now),
        "edges": pki.create_edges_authority(root, trust_domain, now),
        "tokens": pki.create_tokens_signer(root, now),
    }
    for role, authority in made.items():
        await _keep(session, ring, None, role, authority, now)


async def load_fabric(session: AsyncSession, ring: pki.KeyRing, trust_domain: str) -> Fabric:
    roots = await store.certificates(session, None, "root")
    return Fabric(trust_domain, ring, "".join(roots), await open_authority(session, ring, None, "tokens"))


async def create_tenant_authority(session: AsyncSession, fabric: Fabric, tenant_id: UUID, now: datetime) -> None:
    """The intermediate of a new tenant; part of the transaction that creates it."""
    root = await open_authority(session, fabric.ring, None, "root")
    authority = pki.create_tenant_authority(root, str(tenant_id), fabric.trust_domain, now)
    await _keep(session, fabric.ring, tenant_id, "tenant", authority, now)


async def open_authority(session: AsyncSession, ring: pki.KeyRing, tenant_id: UUID | None, role: str) -> pki.Authority:
    """Ready to sign. Raises `pki.Unsealable` if the key-encryption key is not the one it was sealed under."""
    sealed = await store.newest(session, tenant_id, role)
    if sealed is None:
        raise LookupError(f"there is no authority {_purpose(role, tenant_id, 1)}")
    key = ring.unseal(sealed.sealed_key, _purpose(sealed.role, sealed.tenant_id, sealed.version))
    return pki.Authority.load(sealed.certificate_pem, key)


async def peer_anchor(session: AsyncSession, tenant_id: UUID) -> str:
    """In PEM, what gateways of the tenant trust for their peers."""
    return "".join(await store.certificates(session, tenant_id, "tenant"))


async def _keep(
    session: AsyncSession, ring: pki.KeyRing, tenant_id: UUID | None, role: str, authority: pki.Authority, now: datetime
) -> None:
    sealed_key = ring.seal(authority.private_key, _purpose(role, tenant_id, 1))
    await store.add(session, SealedAuthority(role, tenant_id, 1, authority.certificate_pem, sealed_key), now)


def _purpose(role: str, tenant_id: UUID | None, version: int) -> str:
    return f"authority:{role}:{tenant_id or 'fabric'}:{version}"
