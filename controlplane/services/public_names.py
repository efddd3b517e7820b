"""Public names: whose they are, and what load balancers have to have to be called from the public.

A name belongs to one tenant, with all that is under it: the operator grants it, or a TXT record of its DNS proves it.
"""

from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from dns.asyncresolver import Resolver
from dns.exception import DNSException
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.auth import Caller
from controlplane.compile.claims import advertised, refused_on_edges
from controlplane.compile.intent import Intent
from controlplane.compile.members import topology
from controlplane.compile.public_names import SHARED_PORTS, missing
from controlplane.errors import Conflict, FieldError, Forbidden, Invalid, NotFound
from controlplane.resources.base import Key, Stored
from controlplane.resources.claim import Claim
from controlplane.resources.origin_pool import OriginPool
from controlplane.resources.registry import refs
from controlplane.resources.scalars import Domain, is_port
from controlplane.services import auditing
from controlplane.store import changes, tenants
from controlplane.store import public_names as store
from controlplane.store import resources as resource_store
from controlplane.store.public_names import OwnedName, PublicName
from controlplane.store.session import enter

Txt = Callable[[str], Awaitable[Collection[str]]]
"""Texts of the TXT records at a name; none if there are none, or nobody answers."""

RECORD = "_isthmus"
_DOMAIN: TypeAdapter[str] = TypeAdapter(Domain)
_LOOKUP_S = 5.0


def resolver(address: str) -> Txt:
    """Asks the name server at `address[:port]`, or those of the system."""
    host, _, port = address.partition(":")
    resolving = Resolver(configure=not host)
    if host:
        resolving.nameservers, resolving.port = [host], int(port or 53)

    async def txt(name: str) -> Collection[str]:
        try:
            answer = await resolving.resolve(name, "TXT", lifetime=_LOOKUP_S)
        except (DNSException, OSError):
            return ()
        return tuple(b"".join(record.strings).decode(errors="replace") for record in answer)

    return txt


def checked(name: str) -> str:
    """A domain, or a port of the regional edges as `:8443`. Raises `Invalid`."""
    if name.startswith(":"):
        if not is_port(name[1:]) or int(name[1:]) in SHARED_PORTS.values():
            raise _invalid("should be a port besides those that all tenants share")
        return name
    try:
        domain = _DOMAIN.validate_python(name)
    except ValidationError:
        raise _invalid("should be a domain in lower case") from None
    if "*" in domain:
        raise _invalid("should be without wildcard: everything under a name belongs to it")
    return domain


async def proved(caller: Caller, name: str, txt: Txt) -> str:
    """The name, if its DNS says that it belongs to the caller's tenant. Raises `Invalid`, and `Forbidden` with what to do."""
    domain = checked(name)
    at, expected = f"{RECORD}.{domain}", f"isthmus-tenant={caller.tenant_id}"
    if domain.startswith(":"):
        raise Forbidden(f"port {domain} is for the operator to grant")
    if expected not in await txt(at):
        description = f"publish the TXT record {at} with the text {expected}, or ask the operator to grant the name"
        raise Forbidden(f"nothing says that {domain} belongs to this tenant: {description}", [FieldError("name", description)])
    return domain


async def keep(session: AsyncSession, caller: Caller, name: str, *, granted: bool, now: datetime) -> PublicName:
    """It belongs to the caller's tenant from now on. Raises `Conflict` if another tenant has it, or part of it."""
    wanted = PublicName(name, granted, now)
    revision = await changes.raise_revision(session, caller.tenant_id)
    if not await store.add(session, caller.tenant_id, wanted):
        raise Conflict(f"{name}, or something under or above it, belongs to another tenant", [FieldError("name", "is taken")])
    await _record(session, caller, "Create", name, revision, now)
    return next(own for own in await store.list_own(session, caller.tenant_id) if own.name == name)


async def grant(session: AsyncSession, caller: Caller, name: str, tenant: str, now: datetime) -> OwnedName:
    """By the operator, to any tenant. Raises `NotFound`, `Invalid` and `Conflict`."""
    inside = await _inside(session, caller, tenant)
    kept = await keep(session, inside, checked(name), granted=True, now=now)
    return OwnedName(kept.name, kept.granted, kept.created_at, tenant)


async def list_own(session: AsyncSession, caller: Caller) -> tuple[PublicName, ...]:
    return await store.list_own(session, caller.tenant_id)


async def list_all(session: AsyncSession) -> tuple[OwnedName, ...]:
    return await store.list_all(session)


async def delete(session: AsyncSession, caller: Caller, name: str, now: datetime) -> None:
    """Load balancers that need it leave the regional edges, and say so. Raises `NotFound`."""
    revision = await changes.raise_revision(session, caller.tenant_id)
    if not await store.remove(session, caller.tenant_id, name):
        raise NotFound(f"public name {name} does not belong to this tenant")
    await _record(session, caller, "Delete", name, revision, now)


async def withdraw(session: AsyncSession, caller: Caller, name: str, now: datetime) -> None:
    """By the operator, from whichever tenant has it."""
    owner = next((found.tenant for found in await store.list_all(session) if found.name == name), None)
    if owner is None:
        raise NotFound(f"public name {name} belongs to nobody")
    await delete(session, await _inside(session, caller, owner), name, now)


# What load balancers need


async def owned(session: AsyncSession, tenant_id: UUID) -> frozenset[str]:
    return frozenset(own.name for own in await store.list_own(session, tenant_id))


async def check(session: AsyncSession, tenant_id: UUID, load_balancer: Stored[Any], wanted: Collection[Claim], places: Intent) -> None:
    """That a load balancer can be where it asks to be on regional edges. Raises `Invalid` and `Forbidden`."""
    where = topology(places)
    if load_balancer.metadata.disable:
        return
    for index, place in enumerate(advertised(load_balancer.spec)):
        if reason := refused_on_edges(place, where):
            path = f"spec.advertise_custom.advertise_where[{index}]"
            raise Invalid(f"{path}: {reason}", [FieldError(path, reason)])
    public = [claim for claim in wanted if claim.site_id in where.edges]
    if not public:
        return
    await _check_pools(session, tenant_id, load_balancer)
    if names := missing(public, await owned(session, tenant_id)):
        hint = "prove them by DNS at public_names, or ask the operator to grant them"
        details = [
            FieldError("spec.domains" if not name.startswith(":") else "spec", f"{name} does not belong to this tenant") for name in names
        ]
        raise Forbidden(f"to be on regional edges it needs {', '.join(names)}, which do not belong to this tenant: {hint}", details)


def check_pool(pool: Stored[OriginPool], load_balancers: Collection[str]) -> None:
    """That regional edges can reach a pool; `load_balancers` are those of its users that are on them. Raises `Invalid`."""
    if load_balancers and (path := _public_origin(pool.spec)):
        description = f"regional edges reach only what is at sites, and {', '.join(sorted(load_balancers))} is advertised on them"
        raise Invalid(f"{path}: {description}", [FieldError(path, description)])


async def _check_pools(session: AsyncSession, tenant_id: UUID, load_balancer: Stored[Any]) -> None:
    for json in await resource_store.find(session, tenant_id, "origin_pool", _pools(load_balancer)):
        if path := _public_origin(resource_store.parsed(json).spec):
            description = f"regional edges reach only what is at sites, unlike {path} of origin_pool {json.key}"
            raise Invalid(f"spec: {description}", [FieldError("spec", description)])


def _pools(load_balancer: Stored[Any]) -> frozenset[Key]:
    found = refs(load_balancer.kind, load_balancer.metadata, load_balancer.spec)
    return frozenset(ref.key for ref in found if ref.kind == "origin_pool")


def _public_origin(pool: OriginPool) -> str:
    """Where it says that it has one which every site dials itself; empty if nowhere."""
    servers = enumerate(pool.origin_servers)
    return next((f"spec.origin_servers[{index}]" for index, server in servers if server.public_ip or server.public_name), "")


async def _inside(session: AsyncSession, caller: Caller, tenant: str) -> Caller:
    """The operator in another tenant; the session follows."""
    tenant_id = await tenants.find(session, tenant)
    if tenant_id is None:
        raise NotFound(f"tenant {tenant} does not exist")
    await enter(session, tenant_id)
    return replace(caller, tenant_id=tenant_id, tenant=tenant)


async def _record(session: AsyncSession, caller: Caller, verb: str, name: str, revision: int, now: datetime) -> None:
    await auditing.record(session, caller, f"public_name.API.{verb}", now, namespace="system", name=name, revision=revision)


def _invalid(description: str) -> Invalid:
    return Invalid(f"name: {description}", [FieldError("name", description)])
