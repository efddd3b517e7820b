"""Certificate authorities and their replacement: the fabric's for the operator, a tenant's own for the tenant. Paths of our own."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends

from controlplane import pki
from controlplane.api.deps import CurrentCaller, CurrentServices, Now, Operator, OptionalJsonBody, Services, Session
from controlplane.api.description import asked
from controlplane.api.requests import read
from controlplane.auth import Caller
from controlplane.resources.base import Value
from controlplane.services import rotation
from controlplane.services.rotation import OF_FABRIC, Manifests, Progress, Rotation
from controlplane.store.authorities import SealedAuthority

router = APIRouter(tags=["authority"])

Json = dict[str, Any]
FabricRole = Literal["root", "servers", "edges"]

_MOST_MISSING = 100
_FABRIC = "/api/operator/authorities"
_TENANT = "/api/register/namespaces/system/authority"


class Switch(Value):
    offline: Literal["fail", "ignore"] = "fail"
    """Whether nodes that are not heard of hold the switch up. Left behind, they may have to enrol anew."""


async def _manifests(caller: CurrentCaller, services: CurrentServices) -> Manifests:
    return await rotation.edge_manifests(services.database, services.delivery, caller.tenant_id)


EdgeManifests = Annotated[Manifests, Depends(_manifests)]
"""Comes before a session: it needs connections of its own. What the session writes would not be in it yet in any case."""


# The fabric's


@router.get(_FABRIC, operation_id="isthmus.authority.List")
async def list_authorities(caller: Operator, session: Session, now: Now) -> Json:
    """The fabric's authorities: root (control planes), servers (their HTTPS certificates) and edges (regional edges)."""
    return {"items": [await _look(session, caller, role, {}, now) for role in OF_FABRIC]}


@router.get(f"{_FABRIC}/{{role}}", operation_id="isthmus.authority.Get")
async def get_authority(role: FabricRole, caller: Operator, session: Session, now: Now) -> Json:
    """Its versions, the next step of a replacement, and which nodes that waits for."""
    return await _look(session, caller, role, {}, now)


@router.post(f"{_FABRIC}/{{role}}/versions", operation_id="isthmus.authority.Add")
async def add_version(
    role: FabricRole, body: OptionalJsonBody, caller: Operator, services: CurrentServices, session: Session, now: Now
) -> Json:
    """Step 1 of a replacement: a next version, which everybody comes to trust. Registration tokens from before a new root are of no more use."""
    await rotation.add(session, caller, services.fabric, role, now)
    return await _look(session, caller, role, {}, now)


@router.post(
    f"{_FABRIC}/{{role}}/versions/{{version}}/switch", operation_id="isthmus.authority.Switch", openapi_extra=asked(Switch, required=False)
)
async def switch_version(
    role: FabricRole, version: int, body: OptionalJsonBody, caller: Operator, services: CurrentServices, session: Session, now: Now
) -> Json:
    """Step 2: it signs from now on, and the one before is retiring. 409 names the nodes that have not confirmed it."""
    return await _switch(session, caller, services, role, version, body, {}, now)


@router.delete(f"{_FABRIC}/{{role}}/versions/{{version}}", operation_id="isthmus.authority.Remove")
async def remove_version(role: FabricRole, version: int, body: OptionalJsonBody, caller: Operator, session: Session, now: Now) -> Json:
    """Step 3: it is trusted no more. 409 names the nodes that still use its certificates."""
    await rotation.remove(session, caller, role, version, now)
    return await _look(session, caller, role, {}, now)


# The tenant's


@router.get(_TENANT, operation_id="isthmus.authority.GetOfTenant")
async def get_own_authority(caller: CurrentCaller, manifests: EdgeManifests, session: Session, now: Now) -> Json:
    """The authority of the tenant's nodes: its versions, the next step of a replacement, and which nodes that waits for."""
    return await _look(session, caller, "tenant", manifests, now)


@router.post(f"{_TENANT}/versions", operation_id="isthmus.authority.AddOfTenant")
async def add_own_version(
    body: OptionalJsonBody, caller: CurrentCaller, services: CurrentServices, manifests: EdgeManifests, session: Session, now: Now
) -> Json:
    """Step 1 of a replacement: a next version, which all nodes come to trust."""
    await rotation.add(session, caller, services.fabric, "tenant", now)
    return await _look(session, caller, "tenant", manifests, now)


@router.post(
    f"{_TENANT}/versions/{{version}}/switch", operation_id="isthmus.authority.SwitchOfTenant", openapi_extra=asked(Switch, required=False)
)
async def switch_own_version(
    version: int,
    body: OptionalJsonBody,
    caller: CurrentCaller,
    services: CurrentServices,
    manifests: EdgeManifests,
    session: Session,
    now: Now,
) -> Json:
    """Step 2: it signs from now on, and the one before is retiring. 409 names the nodes that have not confirmed it."""
    return await _switch(session, caller, services, "tenant", version, body, manifests, now)


@router.delete(f"{_TENANT}/versions/{{version}}", operation_id="isthmus.authority.RemoveOfTenant")
async def remove_own_version(
    version: int, body: OptionalJsonBody, caller: CurrentCaller, manifests: EdgeManifests, session: Session, now: Now
) -> Json:
    """Step 3: it is trusted no more. 409 names the nodes that still use its certificates."""
    await rotation.remove(session, caller, "tenant", version, now)
    return await _look(session, caller, "tenant", manifests, now)


async def _switch(
    session: Session, caller: Caller, services: Services, role: rotation.Role, version: int, body: Any, manifests: Manifests, now: Now
) -> Json:
    ignore_offline = read(Switch, body or {}).offline == "ignore"
    await rotation.switch(session, caller, services.fabric, role, version, now, manifests=manifests, ignore_offline=ignore_offline)
    return await _look(session, caller, role, manifests, now)


async def _look(session: Session, caller: Caller, role: rotation.Role, manifests: Manifests, now: Now) -> Json:
    return _shown(await rotation.look(session, caller, role, now, manifests))


# What is shown


def _shown(found: Rotation) -> Json:
    return {
        "role": found.role,
        "versions": [_version(version) for version in found.versions],
        "next_step": found.step,
        "progress": _progress(found.progress),
        "removable_at": found.removable_at.isoformat() if found.removable_at else None,
    }


def _version(version: SealedAuthority) -> Json:
    return {
        "version": version.version,
        "state": version.state,
        "state_update_timestamp": version.state_at.isoformat(),
        "sha256": pki.fingerprint(version.certificate_pem),
        "expiration_timestamp": pki.expiry(version.certificate_pem).isoformat(),
        "certificate_pem": version.certificate_pem,
    }


def _progress(progress: Progress) -> Json:
    """Before a switch: who has confirmed that it trusts the added version. Before a removal: who has a certificate of the active one."""
    return {
        "sites": progress.sites,
        "sites_done": progress.sites_done,
        "nodes": len(progress.members),
        "nodes_done": len(progress.members) - len(progress.missing),
        "missing": [
            {"tenant": member.tenant, "site": member.site, "node": member.node.name, "live": member.fresh, "reason": reason}
            for member, reason in progress.missing[:_MOST_MISSING]
        ],
    }
