"""How a node becomes part of a site: token, registration, certificate; and renewals from then on.

Every write takes the tenant's row before those of registrations and nodes, so that no two can wait for each other.
"""

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Literal
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, TypeAdapter, ValidationError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.enrolment import BootstrapSpec, ConfigRequest, Credentials, TokenClaims
from agent.protocol.items import EDGES
from controlplane import pki
from controlplane.auth import Caller, refused_proof
from controlplane.errors import Conflict, FieldError, Forbidden, Invalid, NotAdmitted, TooManyRequests, Unauthenticated
from controlplane.resources.base import Name
from controlplane.services import registrations as decisions
from controlplane.services.agents import Agent, spend
from controlplane.services.authorities import Fabric, control_plane_anchor, edge_anchor, open_authority, peer_anchor
from controlplane.services.tokens import Entrance
from controlplane.store import nodes, registrations, tenants, tokens
from controlplane.store.changes import raise_revision
from controlplane.store.nodes import CertifiedNode, Node
from controlplane.store.registrations import Registration
from controlplane.store.tokens import Token

HostName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9_]{0,61}[a-z0-9])?$")]
MOST_LEAVES = 64
"""Of one node, at a time. All of them have to be told to everybody when it is revoked."""
_SITE_NAME: TypeAdapter[str] = TypeAdapter(Name)
_NODE_NAME: TypeAdapter[str] = TypeAdapter(HostName)
_CLUSTER_TYPE: TypeAdapter[str] = TypeAdapter(Literal["ce", "re"])
_LOCK_NAME = text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))")


@dataclass(frozen=True)
class Desk:
    """Where nodes of one tenant enrol."""

    fabric: Fabric
    entrance: Entrance
    tenant_id: UUID
    edge: bool = False
    """Whether the node is one of a regional edge."""

    def at(self, registration: Registration) -> "Desk":
        return replace(self, edge=decisions.is_edge(registration))


async def bootstrap(session: AsyncSession, desk: Desk, claims: TokenClaims, spec: BootstrapSpec, now: datetime) -> Registration:
    """The registration of the CSR's key: made now, at the cost of one use of the token, or the one that there is already.

    Raises `Invalid`, `Unauthenticated` for a token that is no good, `Forbidden` for another site's, `Conflict` for a name that is taken.
    """
    site_name = _checked(_SITE_NAME, spec.passport.cluster_name, "spec.passport.cluster_name")
    node_name = _checked(_NODE_NAME, spec.infra.hostname, "spec.infra.hostname")
    _checked(_CLUSTER_TYPE, spec.passport.cluster_type, "spec.passport.cluster_type")
    key_hash = _hash(_requested_key(spec.csr_pem, site_name, "spec.csr_pem"))
    decisions.checked_labels(spec.infra.labels)
    await session.execute(_LOCK_NAME, {"name": f"{desk.tenant_id}/{site_name}/{node_name}"})
    if known := await registrations.by_key(session, desk.tenant_id, key_hash):
        return _again(known, claims, site_name, node_name)
    token = await _use(session, desk.tenant_id, claims, site_name, now)
    if spec.passport.cluster_type == "re" and not token.edge:
        raise Forbidden(f"the registration token is for a customer edge; create {site_name} as a regional edge, then a token for it")
    await _check_name_is_free(session, desk.tenant_id, site_name, node_name, now)
    registration = _registration(spec, token, key_hash, now)
    await registrations.create(session, desk.tenant_id, registration)
    if not token.approve:
        return registration
    caller = Caller(desk.tenant_id, await tenants.name(session, desk.tenant_id), operator=False, credential=f"token:{token.name}")
    return await decisions.admit(session, caller, registration, merge=False, ring=desk.fabric.ring, now=now)


async def request_config(session: AsyncSession, desk: Desk, claims: TokenClaims, request: ConfigRequest, now: datetime) -> Credentials:
    """The certificate of an admitted node. Raises `NotAdmitted` while the registration waits, `Forbidden` when it was retired."""
    registration = await _own_registration(session, desk.tenant_id, claims, request)
    key = _requested_key(request.csr_pem, registration.site_name, "csr_pem")
    if _hash(key) != registration.key_hash:
        raise Forbidden(f"registration {registration.name} is that of another key")
    _check_state(registration)
    if registration.node_id is None:
        node = await _first_certificate(session, desk, registration.name, key, now)
    else:
        node = await _same_certificate(session, desk.at(registration), registration.node_id, key, now)
    return await _credentials(session, desk.at(registration), node, registration.site_name)


async def renew(session: AsyncSession, desk: Desk, agent: Agent, csr_pem: str, now: datetime) -> Credentials:
    """A new certificate, for the same key or another. The key that signed the request is recognised until the next renewal,
    in case that the answer gets lost.
    """
    await spend(session, agent)
    site = agent.cache.view.sites[agent.site_id]
    desk = replace(desk, edge=site.spec.is_edge)
    identity = _identity(desk, agent.node)
    key = _requested_key(csr_pem, site.metadata.name, "csr_pem", identity)
    revision = await raise_revision(session, desk.tenant_id)
    node = await nodes.get(session, desk.tenant_id, agent.node.id, lock=True)
    if node is None or node.revoked_at:
        raise refused_proof("Revoked", "this node was revoked")
    keys = _keys_after(node.public_key_pem, key)
    renewed = await _issue(session, desk, node, key, keys, revision, now)
    return await _credentials(session, desk, renewed, site.metadata.name)


# Before a node is admitted


def _registration(spec: BootstrapSpec, token: Token, key_hash: bytes, now: datetime) -> Registration:
    uid = uuid4()
    return Registration(
        name=f"r-{uid}",
        uid=uid,
        token_id=token.id,
        key_hash=key_hash,
        csr_pem=spec.csr_pem,
        state="PENDING",
        site_name=spec.passport.cluster_name,
        node_name=spec.infra.hostname,
        passport=spec.passport.model_dump(mode="json") | {"cluster_type": "re" if token.edge else "ce"},
        infra=spec.infra.model_dump(mode="json"),
        labels=spec.infra.labels,
        clock_skew_s=spec.infra.timestamp - now.timestamp() if spec.infra.timestamp else None,
        created_at=now,
        state_at=now,
    )


def _again(known: Registration, claims: TokenClaims, site_name: str, node_name: str) -> Registration:
    """The answer to the first call got lost; anything but a repetition of that call is refused."""
    if str(known.token_id) != claims.jti or (known.site_name, known.node_name) != (site_name, node_name):
        raise Forbidden(f"this key is registered already, as {known.name} for node {known.node_name} of site {known.site_name}")
    if known.state == "RETIRED":
        raise Forbidden(f"registration {known.name} was retired: enrol with a new key")
    return known


async def _use(session: AsyncSession, tenant_id: UUID, claims: TokenClaims, site_name: str, now: datetime) -> Token:
    token = await tokens.by_id(session, tenant_id, UUID(claims.jti))
    if token is None:
        raise _bad_token("the registration token was revoked")
    if token.site_name is not None and token.site_name != site_name:
        raise Forbidden(f"the registration token is for site {token.site_name}, not for {site_name}")
    if token.approve:
        await raise_revision(session, tenant_id)  # or the site could be decommissioned between being found and being joined
    if not await tokens.use(session, tenant_id, token.id, now):
        token = await tokens.by_id(session, tenant_id, token.id) or token  # it may have been revoked meanwhile
        raise _bad_token(f"the registration token {token.name} {token.refusal(now) or 'has no uses left'}")
    return token


async def _check_name_is_free(session: AsyncSession, tenant_id: UUID, site_name: str, node_name: str, now: datetime) -> None:
    others = await registrations.search(session, tenant_id, site_name=site_name, node_name=node_name)
    for other in others:
        if other.state != "RETIRED":
            heard = await _last_heard(session, tenant_id, other, now)
            raise Conflict(
                f"site {site_name} has a node {node_name} already (registration {other.name}, {other.state}, {heard});"
                " retire that one, or start this one under another name"
            )


async def _last_heard(session: AsyncSession, tenant_id: UUID, registration: Registration, now: datetime) -> str:
    statuses = await nodes.statuses(session, tenant_id, [registration.node_id]) if registration.node_id else {}
    for status in statuses.values():
        return f"last heard of {(now - status.last_heartbeat_at).total_seconds():.0f} s ago"
    return "never heard of"


async def _own_registration(session: AsyncSession, tenant_id: UUID, claims: TokenClaims, request: ConfigRequest) -> Registration:
    registration = await registrations.get(session, tenant_id, request.name)
    if registration is None or str(registration.token_id) != claims.jti:
        raise Forbidden(f"there is no registration {request.name} of this token")
    return registration


def _check_state(registration: Registration) -> None:
    if registration.state == "PENDING":
        raise NotAdmitted(f"registration {registration.name} waits for approval")
    if registration.state == "RETIRED":
        raise Forbidden(f"registration {registration.name} was retired")


# Certificates


async def _first_certificate(session: AsyncSession, desk: Desk, name: str, key: ec.EllipticCurvePublicKey, now: datetime) -> CertifiedNode:
    revision = await raise_revision(session, desk.tenant_id)
    registration = await registrations.get(session, desk.tenant_id, name, lock=True)
    assert registration
    _check_state(registration)
    if registration.node_id is not None:
        return await _same_certificate(session, desk.at(registration), registration.node_id, key, now)
    assert registration.site_id
    node = await _create(session, desk.at(registration), registration, key, revision, now)
    await registrations.change(session, desk.tenant_id, name, state="ADMITTED", state_at=now, node_id=node.id)
    return node


async def _create(
    session: AsyncSession, desk: Desk, registration: Registration, key: ec.EllipticCurvePublicKey, revision: int, now: datetime
) -> CertifiedNode:
    assert registration.site_id
    blank = CertifiedNode(
        id=uuid4(),
        site_id=registration.site_id,
        name=registration.node_name,
        public_key_pem="",
        certificate_pem="",
        certificate_expires_at=now,
        revision=revision,
        created_at=now,
    )
    await nodes.add(session, desk.tenant_id, blank)
    return await _issue(session, desk, blank, key, pki.public_key_pem(key), revision, now)


async def _same_certificate(
    session: AsyncSession, desk: Desk, node_id: UUID, key: ec.EllipticCurvePublicKey, now: datetime
) -> CertifiedNode:
    """What was answered before, or a fresh one if little of its life is left."""
    node = _same(await nodes.get(session, desk.tenant_id, node_id), key)
    if node.certificate_expires_at - now > desk.fabric.node_life / 2:
        return node
    revision = await raise_revision(session, desk.tenant_id)
    node = _same(await nodes.get(session, desk.tenant_id, node_id, lock=True), key)
    return await _issue(session, desk, node, key, node.public_key_pem, revision, now)


def _same(node: CertifiedNode | None, key: ec.EllipticCurvePublicKey) -> CertifiedNode:
    if node is None or node.revoked_at:
        raise Forbidden("this node was revoked")
    if node.public_key_pem != pki.public_key_pem(key):
        raise Forbidden("this node has another key by now")
    return node


async def _issue(
    session: AsyncSession, desk: Desk, node: CertifiedNode, key: ec.EllipticCurvePublicKey, keys_pem: str, revision: int, now: datetime
) -> CertifiedNode:
    role, tenant_id = ("edges", None) if desk.edge else ("tenant", desk.tenant_id)
    authority = await open_authority(session, desk.fabric.ring, tenant_id, role)
    leaves = [leaf for leaf in node.leaves if leaf[1] > now.timestamp()]
    if len(leaves) >= MOST_LEAVES:
        raise TooManyRequests(f"node {node.name} has {len(leaves)} certificates that have not expired", retry_after_s=3600.0)
    certificate = pki.issue_node(authority, _identity(desk, node), key, now, desk.fabric.node_life)
    serial = f"{certificate.serial_number:x}"
    await nodes.change(
        session,
        desk.tenant_id,
        node.id,
        public_key_pem=keys_pem,
        certificate_pem=pki.to_pem(certificate),
        certificate_expires_at=certificate.not_valid_after_utc,
        leaves=[*leaves, [serial, certificate.not_valid_after_utc.timestamp(), pki.key_identifier(authority.certificate_pem)]],
        revision=revision,
    )
    issued = await nodes.get(session, desk.tenant_id, node.id)
    assert issued
    return issued


def _keys_after(known_pem: str, key: ec.EllipticCurvePublicKey) -> str:
    """The new key first, then the one that was current."""
    current = pki.public_key_pem(pki.load_public_keys(known_pem)[0])
    new = pki.public_key_pem(key)
    return new if new == current else new + current


async def _credentials(session: AsyncSession, desk: Desk, node: CertifiedNode, site_name: str) -> Credentials:
    return Credentials(
        certificate_pem=node.certificate_pem,
        tenant_id=str(desk.tenant_id),
        site_id=str(node.site_id),
        site_name=site_name,
        node_id=str(node.id),
        node_name=node.name,
        trust_domain=desk.fabric.trust_domain,
        peer_anchor_pem="" if desk.edge else await peer_anchor(session, desk.tenant_id),
        edge_anchor_pem=await edge_anchor(session),
        kind="regional_edge" if desk.edge else "customer_edge",
        control_plane_anchor_pem=await control_plane_anchor(session, desk.fabric),
        control_plane_urls=desk.entrance.urls,
    )


def _identity(desk: Desk, node: Node) -> pki.NodeIdentity:
    tenant = EDGES if desk.edge else str(desk.tenant_id)
    return pki.NodeIdentity(desk.fabric.trust_domain, tenant, str(node.site_id), str(node.id))


# What was sent


def _checked(of: TypeAdapter[str], value: str, path: str) -> str:
    try:
        return of.validate_python(value)
    except ValidationError as error:
        description = error.errors()[0]["msg"]
        raise Invalid(f"{path}: {description}", [FieldError(path, description)]) from None


def _requested_key(csr_pem: str, site_name: str, path: str, identity: pki.NodeIdentity | None = None) -> ec.EllipticCurvePublicKey:
    try:
        return pki.requested_key(csr_pem, site_name=site_name, identity=identity)
    except pki.BadCsr as error:
        raise Invalid(f"{path}: {error}", [FieldError(path, str(error))]) from None


def _hash(key: ec.EllipticCurvePublicKey) -> bytes:
    return hashlib.sha256(pki.public_key_pem(key).encode()).digest()


def _bad_token(message: str) -> Unauthenticated:
    return Unauthenticated(message, [FieldError("token", message)])
