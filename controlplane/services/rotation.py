"""Replacing an authority by a next version of it, in steps that nobody notices:

1. `add`: the next version is trusted by everybody, and signs nothing.
2. `switch`, once every node has confirmed that it trusts it: it signs, and the one before is retiring. Nodes renew their certificates at once.
3. `remove`, once no certificate of the retiring version is in use: it is trusted no more.

A step that would leave somebody behind is refused, and names them. A version that was only added can be removed at any time, and a
retiring one can be switched back to.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane import pki
from controlplane.auth import OPERATOR_TENANT, Caller
from controlplane.errors import Conflict, FieldError, NotFound, StillTrusted
from controlplane.resources.normal import MAX_DETAILS
from controlplane.services import auditing, authorities
from controlplane.services.authorities import Fabric
from controlplane.services.delivery import Delivery
from controlplane.services.heartbeats import is_fresh
from controlplane.store import authorities as store
from controlplane.store import changes, nodes, resources, tenants
from controlplane.store.authorities import SealedAuthority
from controlplane.store.locks import Lock, take
from controlplane.store.nodes import CertifiedNode, NodeStatus
from controlplane.store.session import Database, enter
from controlplane.store.tenants import TenantRecord

Role = Literal["root", "servers", "edges", "tenant"]
OF_FABRIC: tuple[Role, ...] = ("root", "servers", "edges")
MOST_REMOVED = 8
"""Versions that nobody trusts any more, and that are still shown."""
_CARRIERS = frozenset({"site", "relay"})
"""Kinds of items that bring anchors to a node."""


@dataclass(frozen=True)
class Member:
    """A node that is not revoked, and how far it is."""

    tenant: str
    site: str
    edge: bool
    node: CertifiedNode
    status: NodeStatus | None
    revision: int
    """Of its tenant, at which anchors last changed."""
    fresh: bool
    """Heard of within its lease."""
    manifest: str | None = None
    """Of a regional edge, the hash that it should have, where another tenant's anchors are in question."""

    @property
    def doubt(self) -> str:
        """Why it is not known to trust every version; empty if it is. Told by its last ACK, as in the status of objects."""
        if self.status is None:
            return "never sent a heartbeat"
        for rejection in self.status.rejected:
            if rejection["kind"] in _CARRIERS:
                return f"rejects {rejection['kind']} {rejection['key']}: {rejection['reason']}"
        if self.status.applied_hash is None or self.status.applied_revision < self.revision:
            return f"has applied revision {self.status.applied_revision}, not {self.revision}; {_heard(self.status)}"
        if self.manifest is not None and self.status.applied_hash != self.manifest:
            return f"has not applied its latest manifest; {_heard(self.status)}"
        return ""

    def lag(self, issuer: str) -> str:
        """Why it is not known to use a certificate of the authority with this key identifier; empty if it is."""
        if self.status is None:
            return "never sent a heartbeat"
        return "" if self.status.issuer == issuer else f"still uses a certificate of another version; {_heard(self.status)}"


@dataclass(frozen=True)
class Progress:
    """Who is there yet, and why the others are not."""

    members: tuple[Member, ...]
    missing: tuple[tuple[Member, str], ...]

    @property
    def sites(self) -> int:
        return len({member.node.site_id for member in self.members})

    @property
    def sites_done(self) -> int:
        return self.sites - len({member.node.site_id for member, _ in self.missing})


@dataclass(frozen=True)
class Rotation:
    """One authority, and where its replacement stands."""

    role: Role
    versions: tuple[SealedAuthority, ...]
    """Newest first."""
    step: Literal["add", "switch", "remove"]
    """The next one."""
    progress: Progress
    """Towards that step: who has confirmed trust before a switch, who has a certificate of the new version before a removal."""
    removable_at: datetime | None = None
    """When no certificate of the retiring version is left in any case."""

    def of(self, state: str) -> SealedAuthority | None:
        return next((version for version in self.versions if version.state == state), None)


Manifests = Mapping[UUID, str]
"""By id of a regional edge, the hash of the manifest that it should have."""


async def edge_manifests(database: Database, delivery: Delivery, tenant_id: UUID) -> Manifests:
    """With what the tenant has for regional edges now. Their revisions are those of the operator's tenant, and say nothing of others."""
    async with database.definer() as definer:
        operators = await tenants.find(definer, OPERATOR_TENANT)
    assert operators
    edges = await delivery.cache(operators)
    await delivery.catch_up(edges)
    ids = [site_id for site_id, site in edges.view.sites.items() if site.spec.is_edge]
    if ids:
        own = await delivery.cache(tenant_id)
        await delivery.catch_up(own)
        await delivery.shares.at(tenant_id, own.view.revision)
    return {UUID(site_id): (await delivery.published(edges, site_id)).hash for site_id in ids}


async def look(session: AsyncSession, caller: Caller, role: Role, now: datetime, manifests: Manifests) -> Rotation:
    """Where it stands; that of a tenant in the caller's."""
    rotation = await _look(session, caller, role, now, manifests, lock=False)
    await enter(session, caller.tenant_id)
    return rotation


async def add(session: AsyncSession, caller: Caller, fabric: Fabric, role: Role, now: datetime) -> None:
    """Raises `Conflict` while another replacement is under way."""
    versions = await _locked(session, caller, role)
    for version in versions:
        if version.state in ("added", "retiring"):
            raise Conflict(f"version {version.version} is {version.state}: finish that replacement first")
    await _create(session, caller, fabric, role, versions, now)
    await _settle(session, caller, role, "Add", versions[0].version + 1, now)


async def switch(
    session: AsyncSession,
    caller: Caller,
    fabric: Fabric,
    role: Role,
    number: int,
    now: datetime,
    *,
    manifests: Manifests,
    ignore_offline: bool,
) -> None:
    """From now on version `number` signs. Raises `NotFound`, `Conflict`, and `StillTrusted` while a node may not know it."""
    rotation = await _look(session, caller, role, now, manifests, lock=True)
    wanted = _version(rotation, number)
    if wanted.state == "added":
        _refuse(rotation, f"version {number} cannot sign yet: it is not trusted", ignore_offline=ignore_offline)
    elif wanted.state != "retiring":
        raise Conflict(f"version {number} is {wanted.state}")
    await enter(session, caller.tenant_id)
    await _activate(session, rotation.versions, wanted, now)
    if role == "root":
        await _replace_servers(session, caller, fabric, now)
    await _settle(session, caller, role, "Switch", number, now)


async def remove(session: AsyncSession, caller: Caller, role: Role, number: int, now: datetime) -> None:
    """From now on nobody trusts version `number`. Raises `NotFound`, `Conflict`, and `StillTrusted` while its certificates are in use."""
    rotation = await _look(session, caller, role, now, {}, lock=True)
    gone = _version(rotation, number)
    if gone.state in ("active", "removed"):
        raise Conflict(f"version {number} is {gone.state}" + (": switch to another one first" if gone.state == "active" else ""))
    if gone.state == "retiring":
        assert rotation.removable_at
        if role in ("root", "servers") and now < rotation.removable_at:
            until = rotation.removable_at.isoformat(timespec="seconds")
            raise StillTrusted(f"version {number} cannot be removed: control planes may use its certificates until {until}")
        if now < rotation.removable_at:
            _refuse(rotation, f"version {number} cannot be removed: its certificates are in use")
    await enter(session, caller.tenant_id)
    await store.remove(session, gone.tenant_id, gone, now)
    await store.forget_removed(session, gone.tenant_id, role, keep=MOST_REMOVED)
    if role == "root":
        for version in await store.versions(session, None, "servers", lock=True):
            if version.state == "retiring":
                await store.remove(session, version.tenant_id, version, now)
    await _settle(session, caller, role, "Remove", number, now)


# What the steps do


async def _create(
    session: AsyncSession, caller: Caller, fabric: Fabric, role: Role, versions: tuple[SealedAuthority, ...], now: datetime
) -> None:
    number = versions[0].version + 1
    authority = await _next(session, caller, fabric, role, number, now)
    crl_pem = pki.revocations(authority, (), now) if any(version.crl_pem for version in versions) else ""
    tenant_id = _owner(caller, role)
    await authorities.keep(session, fabric.ring, tenant_id, role, authority, now, version=number, state="added", crl_pem=crl_pem)


async def _next(session: AsyncSession, caller: Caller, fabric: Fabric, role: Role, number: int, now: datetime) -> pki.Authority:
    if role == "root":
        return pki.create_root(fabric.trust_domain, now, number)
    root = await authorities.open_authority(session, fabric.ring, None, "root")
    if role == "servers":
        return pki.create_servers_authority(root, fabric.trust_domain, now, number)
    if role == "edges":
        return pki.create_edges_authority(root, fabric.trust_domain, now, number)
    return pki.create_tenant_authority(root, str(caller.tenant_id), fabric.trust_domain, now, number)


async def _activate(session: AsyncSession, versions: Iterable[SealedAuthority], wanted: SealedAuthority, now: datetime) -> None:
    for version in versions:
        if version.state == "active":
            await store.change(session, version.tenant_id, version, state="retiring", state_at=now)
    await store.change(session, wanted.tenant_id, wanted, state="active", state_at=now)


async def _replace_servers(session: AsyncSession, caller: Caller, fabric: Fabric, now: datetime) -> None:
    """Control planes' certificates come from under the new root at once: every node trusts it."""
    versions = await store.versions(session, None, "servers", lock=True)
    for version in versions:
        if version.state == "added":
            await store.remove(session, version.tenant_id, version, now)
    await _create(session, caller, fabric, "servers", versions, now)
    versions = await store.versions(session, None, "servers")
    await _activate(session, versions, versions[0], now)


async def _settle(session: AsyncSession, caller: Caller, role: Role, step: str, number: int, now: datetime) -> None:
    """Let everybody know whom it concerns, and write it down."""
    if role != "servers":
        await authorities.announce(session, caller.tenant_id, role)
    await auditing.record(session, caller, f"authority.CustomAPI.{step}", now, namespace="system", name=f"{role}-v{number}")


# Where it stands


async def _locked(session: AsyncSession, caller: Caller, role: Role) -> tuple[SealedAuthority, ...]:
    """One step at a time, of all authorities."""
    await take(session, Lock.ROTATION)
    return await store.versions(session, _owner(caller, role), role, lock=True)


async def _look(session: AsyncSession, caller: Caller, role: Role, now: datetime, manifests: Manifests, *, lock: bool) -> Rotation:
    """Leaves the session inside some tenant."""
    versions = await (_locked(session, caller, role) if lock else store.versions(session, _owner(caller, role), role))
    states = {version.state: version for version in versions}
    if "added" in states:
        found = [member async for member in _trusting(session, caller, role, now)]
        members = tuple(replace(member, manifest=manifests.get(member.node.site_id)) for member in found)
        return Rotation(role, versions, "switch", _progress((member, member.doubt) for member in members))
    if "retiring" in states:
        issuer = pki.key_identifier(states["active"].certificate_pem)
        members = tuple([member async for member in _holding(session, caller, role, now)])
        progress = _progress((member, member.lag(issuer)) for member in members)
        return Rotation(role, versions, "remove", progress, _removable_at(states["retiring"], members))
    return Rotation(role, versions, "add", _progress(()))


def _removable_at(retiring: SealedAuthority, members: Iterable[Member]) -> datetime:
    """A root lives on in the certificates of control planes: nodes need it for nothing else."""
    if retiring.role in ("root", "servers"):
        return retiring.state_at + pki.SERVER_LIFE
    issuer = pki.key_identifier(retiring.certificate_pem)
    ends = [until for member in members for _, until, by in member.node.leaves if by == issuer]
    return datetime.fromtimestamp(max(ends), UTC) if ends else retiring.state_at


def _progress(said: Iterable[tuple[Member, str]]) -> Progress:
    found = tuple(said)
    return Progress(tuple(member for member, _ in found), tuple((member, doubt) for member, doubt in found if doubt))


def _refuse(rotation: Rotation, message: str, *, ignore_offline: bool = False) -> None:
    """Unless everybody is there."""
    missing = [(member, doubt) for member, doubt in rotation.progress.missing if member.fresh or not ignore_offline]
    if missing:
        details = [FieldError(f"tenant {it.tenant}, site {it.site}, node {it.node.name}", doubt) for it, doubt in missing[:MAX_DETAILS]]
        raise StillTrusted(f"{message} by all nodes: {len(missing)} of {len(rotation.progress.members)} are missing", details)


def _version(rotation: Rotation, number: int) -> SealedAuthority:
    for version in rotation.versions:
        if version.version == number:
            return version
    raise NotFound(f"authority {rotation.role} has no version {number}")


def _owner(caller: Caller, role: Role) -> UUID | None:
    return caller.tenant_id if role == "tenant" else None


def _heard(status: NodeStatus) -> str:
    return f"last heard of at {status.last_heartbeat_at.isoformat(timespec='seconds')}"


# Who is concerned


async def _trusting(session: AsyncSession, caller: Caller, role: Role, now: datetime) -> AsyncIterator[Member]:
    """Nodes that have to trust an authority: of the fabric's all; of a tenant's its own, and those of regional edges."""
    if role == "servers":
        return
    for tenant in await tenants.list_all(session):
        own = role != "tenant" or tenant.id == caller.tenant_id
        if own or tenant.name == OPERATOR_TENANT:
            for member in await _members(session, tenant, now):
                if own or member.edge:
                    yield member


async def _holding(session: AsyncSession, caller: Caller, role: Role, now: datetime) -> AsyncIterator[Member]:
    """Nodes that have certificates of an authority."""
    if role in ("root", "servers"):
        return
    for tenant in await tenants.list_all(session):
        if tenant.name == OPERATOR_TENANT if role == "edges" else tenant.id == caller.tenant_id:
            for member in await _members(session, tenant, now):
                if member.edge == (role == "edges"):
                    yield member


async def _members(session: AsyncSession, tenant: TenantRecord, now: datetime) -> Iterator[Member]:
    await enter(session, tenant.id)
    sites = {json.uid: resources.parsed(json) for json in await resources.list_page(session, tenant.id, "site")}
    live = await nodes.live(session, tenant.id)
    statuses = await nodes.statuses(session, tenant.id)
    revision = await changes.anchors_revision(session, tenant.id)
    return (
        Member(
            tenant=tenant.name,
            site=sites[node.site_id].metadata.name,
            edge=sites[node.site_id].spec.is_edge,
            node=node,
            status=statuses.get(node.id),
            revision=revision,
            fresh=is_fresh(statuses.get(node.id), len(live), now),
        )
        for node in live
        if node.site_id in sites
    )
