"""The fabric's authorities: made once, kept sealed, opened when something is to be signed."""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane import pki
from controlplane.auth import OPERATOR_TENANT
from controlplane.store import authorities as store
from controlplane.store import changes, nodes, tenants
from controlplane.store.authorities import SealedAuthority, State
from controlplane.store.session import enter


@dataclass(frozen=True)
class Fabric:
    """What every replica knows about the fabric's trust, and what never changes while it runs."""

    trust_domain: str
    ring: pki.KeyRing
    tokens: pki.Authority
    """Signs registration tokens."""
    own_certificate: bool = True
    """Whether control planes are trusted under the roots; otherwise the public knows their certificates."""
    node_life: timedelta = pki.NODE_LIFE
    """Of certificates of nodes, those of regional edges among them."""


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
        await keep(session, ring, None, role, authority, now)


async def load_fabric(session: AsyncSession, ring: pki.KeyRing, trust_domain: str) -> Fabric:
    return Fabric(trust_domain, ring, await open_authority(session, ring, None, "tokens"))


async def create_tenant_authority(session: AsyncSession, fabric: Fabric, tenant_id: UUID, now: datetime) -> None:
    """The intermediate of a new tenant; part of the transaction that creates it."""
    root = await open_authority(session, fabric.ring, None, "root")
    authority = pki.create_tenant_authority(root, str(tenant_id), fabric.trust_domain, now)
    await keep(session, fabric.ring, tenant_id, "tenant", authority, now)


async def open_authority(session: AsyncSession, ring: pki.KeyRing, tenant_id: UUID | None, role: str) -> pki.Authority:
    """The version that signs. Raises `pki.Unsealable` if the key-encryption key is not the one it was sealed under."""
    sealed = await store.active(session, tenant_id, role)
    if sealed is None:
        raise LookupError(f"there is no authority {purpose(role, tenant_id, 1)}")
    return unsealed(ring, sealed)


def unsealed(ring: pki.KeyRing, sealed: SealedAuthority) -> pki.Authority:
    """Ready to sign."""
    key = ring.unseal(sealed.sealed_key, purpose(sealed.role, sealed.tenant_id, sealed.version))
    return pki.Authority.load(sealed.certificate_pem, key)


async def peer_anchor(session: AsyncSession, tenant_id: UUID) -> str:
    """In PEM, what gateways of the tenant trust for their peers."""
    return "".join(await store.certificates(session, tenant_id, "tenant"))


async def edge_anchor(session: AsyncSession) -> str:
    """In PEM, what nodes trust for regional edges."""
    return "".join(await store.certificates(session, None, "edges"))


async def control_plane_anchor(session: AsyncSession, fabric: Fabric) -> str:
    """In PEM, what nodes trust for control planes; empty: what the public trusts."""
    return "".join(await store.certificates(session, None, "root")) if fabric.own_certificate else ""


async def ca_pin(session: AsyncSession, fabric: Fabric) -> str | None:
    """Hex SHA-256 of the roots in PEM, by which a newcomer recognises them."""
    anchor = await control_plane_anchor(session, fabric)
    return hashlib.sha256(anchor.encode()).hexdigest() if anchor else None


async def line_up(session: AsyncSession, tenant_id: UUID, *, edge: bool) -> None:
    """Take what `withdraw` needs before anything else is locked, in the order of rotations, so that no two of these wait for each other."""
    owner, role = _signers(tenant_id, edge=edge)
    await store.versions(session, owner, role, lock=True)
    for concerned in await _concerned(session, tenant_id, role):
        await enter(session, concerned)
        await tenants.lock(session, concerned)
    await enter(session, tenant_id)


async def withdraw(session: AsyncSession, ring: pki.KeyRing, tenant_id: UUID, *, edge: bool, now: datetime) -> None:
    """A node of the tenant (`edge`: of a regional edge) was revoked while its site lives on: nobody accepts its certificates any more."""
    serials = await nodes.revoked_serials(session, tenant_id, now)
    owner, role = _signers(tenant_id, edge=edge)
    for sealed in await store.versions(session, owner, role, lock=True):
        if sealed.state != "removed":
            await store.change(session, sealed.tenant_id, sealed, crl_pem=pki.revocations(unsealed(ring, sealed), serials, now))
    await announce(session, tenant_id, role, edge_revoked=edge)


async def announce(session: AsyncSession, tenant_id: UUID, role: str, *, edge_revoked: bool = False) -> None:
    """What is trusted for a role changes: tell the sites of every tenant that it concerns.

    `edge_revoked`: gateways are to let go of what regional edges have opened.
    """
    for concerned in await _concerned(session, tenant_id, role):
        await enter(session, concerned)
        await changes.raise_anchors_revision(session, concerned, edge_revoked=edge_revoked)
    await enter(session, tenant_id)


async def _concerned(session: AsyncSession, tenant_id: UUID, role: str) -> list[UUID]:
    """The tenants that trust a role, and the operator's, as regional edges serve all: last, so that no two of these wait for each other."""
    known = await tenants.list_all(session)
    last = [tenant.id for tenant in known if tenant.name == OPERATOR_TENANT]
    own = [tenant_id] if role == "tenant" else [tenant.id for tenant in known]
    return [*(each for each in own if each not in last), *last]


def _signers(tenant_id: UUID, *, edge: bool) -> tuple[UUID | None, str]:
    """Owner and role of the authority that signs for a tenant's nodes, or for those of regional edges."""
    return (None, "edges") if edge else (tenant_id, "tenant")


async def keep(
    session: AsyncSession,
    ring: pki.KeyRing,
    tenant_id: UUID | None,
    role: str,
    authority: pki.Authority,
    now: datetime,
    *,
    version: int = 1,
    state: State = "active",
    crl_pem: str = "",
) -> None:
    """Store a new version."""
    sealed_key = ring.seal(authority.private_key, purpose(role, tenant_id, version))
    sealed = SealedAuthority(role, tenant_id, version, state, now, authority.certificate_pem, sealed_key, crl_pem)
    await store.add(session, sealed, now)


def purpose(role: str, tenant_id: UUID | None, version: int) -> str:
    """What its key is sealed as."""
    return f"authority:{role}:{tenant_id or 'fabric'}:{version}"
