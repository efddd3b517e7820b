"""Nodes that want to become part of a site, and the person who decides."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.enrolment import Passport
from controlplane.auth import Caller
from controlplane.errors import Conflict, FieldError, Forbidden, Invalid, NotFound
from controlplane.pki import KeyRing
from controlplane.resources.base import Labels, Unless, Value
from controlplane.services import auditing, sites
from controlplane.services.authorities import line_up, withdraw
from controlplane.store import nodes, tokens
from controlplane.store import registrations as store
from controlplane.store.changes import raise_revision
from controlplane.store.registrations import Registration

NAMESPACE = "system"
State = Literal[
    "NOTSET",
    "NEW",
    "APPROVED",
    "ADMITTED",
    "RETIRED",
    "FAILED",
    "DONE",
    "PENDING",
    "ONLINE",
    "UPGRADING",
    "MAINTENANCE",
    "FAILED_INACTIVE",
]
STATES: tuple[str, ...] = get_args(State)
"""Of F5 XC, in the order of their numbers. Ours are PENDING, APPROVED, ADMITTED and RETIRED."""


class ApprovedPassport(Value):
    """What a person confirms."""

    unsupported: ClassVar[Mapping[str, str | Unless]] = {
        "default_os_version": "software is not managed from here",
        "default_sw_version": "software is not managed from here",
        "operating_system_version": "software is not managed from here",
        "volterra_software_version": "software is not managed from here",
        "private_network_name": "private networks are not supported",
    }

    cluster_name: str
    cluster_type: Literal["ce", "re"] = "ce"
    cluster_size: int = Field(1, ge=0)
    latitude: float = Field(ge=-90, le=90)
    longitude: float = Field(ge=-180, le=180)


def is_edge(registration: Registration) -> bool:
    """Whether its node is to be one of a regional edge."""
    return bool(registration.passport["cluster_type"] == "re")


async def get(session: AsyncSession, caller: Caller, name: str) -> Registration:
    found = await store.get(session, caller.tenant_id, name)
    if found is None:
        raise NotFound(f"registration {name} does not exist")
    return found


async def search(
    session: AsyncSession, caller: Caller, *, state: str | None = None, site_name: str | None = None, token: str | None = None
) -> tuple[Registration, ...]:
    """Oldest first. `token` is the name of one."""
    token_id = None
    if token is not None:
        found = await tokens.get(session, caller.tenant_id, token)
        if found is None:
            raise NotFound(f"token {token} does not exist")
        token_id = found.id
    return await store.search(session, caller.tenant_id, state=state, site_name=site_name, token_id=token_id)


async def approve(
    session: AsyncSession,
    caller: Caller,
    name: str,
    passport: ApprovedPassport,
    labels: Mapping[str, str],
    annotations: Mapping[str, str],
    *,
    tunnel_type: str | None,
    ring: KeyRing,
    now: datetime,
) -> Registration:
    """Let the node in; its site is created if there is none. Labels and annotations are added, or overwrite, and so does the tunnel type;
    a site without coordinates gets those of the passport. Repeating it changes nothing.

    Raises `NotFound`, `Invalid` for a passport of another site or another place, and `Conflict` for a registration that was retired.
    """
    await raise_revision(session, caller.tenant_id)
    registration = await _locked(session, caller, name)
    if passport.cluster_name != registration.site_name:
        description = f"should be {registration.site_name}, which the node asks for; start it with another site name to change that"
        raise Invalid(f"passport.cluster_name: {description}", [FieldError("passport.cluster_name", description)])
    if passport.cluster_type != registration.passport["cluster_type"]:
        description = f"should be {registration.passport['cluster_type']}"
        raise Invalid(f"passport.cluster_type: {description}", [FieldError("passport.cluster_type", description)])
    if is_edge(registration) and not caller.runs_edges:
        raise Forbidden(f"{registration.site_name} is a regional edge: only the operator admits nodes to it")
    if registration.state == "RETIRED":
        raise Conflict(f"registration {name} is RETIRED: the node has to enrol again")
    if registration.state == "PENDING":
        wanted = replace(
            registration,
            passport={**registration.passport, **passport.model_dump(mode="json")},
            labels={**registration.labels, **labels},
            annotations={**registration.annotations, **annotations},
            tunnel_type=tunnel_type,
        )
        registration = await admit(session, caller, wanted, merge=True, ring=ring, now=now)
        await _record(session, caller, "CustomAPI.RegistrationApprove", registration, now)
    return registration


async def admit(
    session: AsyncSession, caller: Caller, registration: Registration, *, merge: bool, ring: KeyRing, now: datetime
) -> Registration:
    """Write that it is approved, with its site, to which its labels and annotations go: if that exists already, only with `merge`."""
    passport = Passport.model_validate(registration.passport)
    words = {"labels": checked_labels(registration.labels), "annotations": registration.annotations}
    spec = {"tunnel_type": registration.tunnel_type} if registration.tunnel_type else {}
    site = await sites.ensure(session, caller, registration.site_name, passport, words, spec, merge=merge, ring=ring, now=now)
    return await store.change(
        session,
        caller.tenant_id,
        registration.name,
        state="APPROVED",
        state_at=now,
        site_id=site.uid,
        passport=registration.passport,
        labels=registration.labels,
        annotations=registration.annotations,
        tunnel_type=registration.tunnel_type,
    )


async def retire(session: AsyncSession, caller: Caller, name: str, *, ring: KeyRing, now: datetime) -> Registration:
    """Whatever state it is in: its node is nobody's peer from now on, and may not come back with this key."""
    registration = await get(session, caller, name)
    if is_edge(registration) and not caller.runs_edges:
        raise Forbidden(f"{registration.site_name} is a regional edge: only the operator retires its nodes")
    await line_up(session, caller.tenant_id, edge=is_edge(registration))
    revision = await raise_revision(session, caller.tenant_id)
    registration = await _locked(session, caller, name)
    node_ids = [registration.node_id] if registration.node_id else []
    if await nodes.revoke(session, caller.tenant_id, node_ids, revision, now):
        await withdraw(session, ring, caller.tenant_id, edge=is_edge(registration), now=now)
    if registration.state != "RETIRED":
        registration = await store.change(session, caller.tenant_id, name, state="RETIRED", state_at=now)
        await _record(session, caller, "CustomAPI.RegistrationApprove", registration, now)
    return registration


async def delete(session: AsyncSession, caller: Caller, name: str, *, ring: KeyRing, now: datetime) -> None:
    """Retired first, if it was not."""
    registration = await retire(session, caller, name, ring=ring, now=now)
    await store.delete(session, caller.tenant_id, name)
    await _record(session, caller, "API.Delete", registration, now)


def checked_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """Raises `Invalid` unless a site could have them."""
    try:
        return _Labelled(labels=dict(labels)).labels
    except ValidationError as error:
        details = [FieldError(f"labels.{refusal['loc'][1]}", refusal["msg"].removeprefix("Value error, ")) for refusal in error.errors()]
        raise Invalid(f"{details[0].field} {details[0].description}", details) from None


class _Labelled(Value):
    labels: Labels


async def _locked(session: AsyncSession, caller: Caller, name: str) -> Registration:
    found = await store.get(session, caller.tenant_id, name, lock=True)
    if found is None:
        raise NotFound(f"registration {name} does not exist")
    return found


async def _record(session: AsyncSession, caller: Caller, rpc: str, registration: Registration, now: datetime) -> None:
    shown: dict[str, Any] = {"state": registration.state, "passport": registration.passport, "labels": registration.labels}
    name, uid = registration.name, registration.uid
    await auditing.record(session, caller, f"registration.{rpc}", now, namespace=NAMESPACE, name=name, uid=uid, shown=shown)
