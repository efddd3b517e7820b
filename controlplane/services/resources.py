"""Objects that users write: checked, sealed, stored and recorded, all in the transaction of the request."""

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as changed
from datetime import datetime
from typing import Any
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.auth import Caller
from controlplane.compile import members
from controlplane.compile.members import SITES
from controlplane.errors import AlreadyExists, Conflict, FieldError, Forbidden, Invalid, NotFound, StaleVersion, StillReferred
from controlplane.pki import KeyRing
from controlplane.resources.base import Key, Metadata, Resource, Stored
from controlplane.resources.normal import MAX_DETAILS
from controlplane.resources.registry import dump, parse, refs
from controlplane.resources.selector import Selector
from controlplane.resources.site import Site
from controlplane.services import auditing, listening, meshes, origins, public_names
from controlplane.services.sealing import Sealed, seal
from controlplane.store import changes, nodes, registrations, tokens
from controlplane.store import edges as edge_store
from controlplane.store import refs as ref_store
from controlplane.store import resources as store
from controlplane.store import secrets as secret_store
from controlplane.store.changes import StoredJson
from controlplane.store.claims import release_site
from controlplane.store.refs import Referrer
from controlplane.store.resources import Moment, parsed

BUILT_IN_NAMESPACES = ("system", "shared", "default")

MOST_NAMED = 10
"""Referrers, in one sentence; details have more of them, and `GET_RSP_FORMAT_REFERRING_OBJECTS` all."""

_BATCH = 1000


@dataclass(frozen=True)
class Page:
    """Part of a list. `next` is the key after which the following page starts; None on the last."""

    items: tuple[StoredJson, ...]
    next: Key | None


async def create(
    session: AsyncSession, caller: Caller, kind: str, namespace: str, body: Any, *, ring: KeyRing, now: datetime
) -> StoredJson:
    """Raises `Invalid`, `NotFound` for the namespace, `AlreadyExists` and `ListenerTaken`."""
    wanted = parse(kind, body, namespace=namespace, tenant=caller.tenant)
    await _check_edge(session, caller, wanted.metadata.name, wanted.spec)
    moment = Moment(await changes.raise_revision(session, caller.tenant_id), now)
    await _check(session, caller, kind, wanted.metadata, wanted.spec)
    spec, sealed = await seal(session, caller.tenant_id, ring, wanted.spec, None)
    written = StoredJson(
        kind=kind,
        namespace=wanted.metadata.namespace,
        name=wanted.metadata.name,
        uid=uuid4(),
        meta=wanted.metadata.model_dump(mode="json"),
        spec=dump(spec),
        version=1,
        revision=moment.revision,
        created_revision=moment.revision,
        created_at=now,
        modified_at=now,
        creator_id=caller.credential,
        creator_class=caller.creator_class,
    )
    if not await store.create(session, caller.tenant_id, written):
        raise AlreadyExists(f"{kind} {_name(written.key)} exists already")
    await _settle(session, caller, written, None, sealed)
    await _record(session, caller, "Create", written, moment, shown=True)
    return written


async def replace(session: AsyncSession, caller: Caller, kind: str, key: Key, body: Any, *, ring: KeyRing, now: datetime) -> StoredJson:
    """All of metadata and spec; what the body leaves out goes back to its default. An empty `resource_version` means that the last writer wins.

    Raises `Invalid`, `NotFound`, `StaleVersion` and `ListenerTaken`.
    """
    wanted = parse(kind, body, namespace=key.namespace, name=key.name, tenant=caller.tenant)
    moment = Moment(await changes.raise_revision(session, caller.tenant_id), now)
    before = await get(session, caller, kind, key)
    _check_version(body.get("resource_version"), before.version)
    await _check_edge(session, caller, key.name, wanted.spec, parsed(before).spec)
    await _check(session, caller, kind, wanted.metadata, wanted.spec)
    spec, sealed = await seal(session, caller.tenant_id, ring, wanted.spec, parsed(before))
    written = changed(
        before,
        meta=wanted.metadata.model_dump(mode="json"),
        spec=dump(spec),
        version=before.version + 1,
        revision=moment.revision,
        modified_at=now,
    )
    await store.replace(session, caller.tenant_id, written)
    await _settle(session, caller, written, before, sealed)
    await _record(session, caller, "Replace", written, moment, shown=True)
    return written


async def get(session: AsyncSession, caller: Caller, kind: str, key: Key) -> StoredJson:
    """Raises `NotFound`."""
    found = await store.get(session, caller.tenant_id, kind, key)
    if found is None:
        raise NotFound(f"{kind} {_name(key)} does not exist")
    return found


async def list_page(
    session: AsyncSession, caller: Caller, kind: str, namespace: str, *, selector: Selector | None, after: Key | None, limit: int | None
) -> Page:
    """Sorted by name; without a limit, all. Raises `NotFound` for the namespace."""
    if namespace:
        await _check_namespace(session, caller, namespace)
    found: list[StoredJson] = []
    while limit is None or len(found) <= limit:
        batch = await store.list_page(session, caller.tenant_id, kind, namespace, after=after, limit=_BATCH)
        found += [json for json in batch if selector is None or selector.matches(_labels(json))]
        if len(batch) < _BATCH:
            break
        after = batch[-1].key
    if limit is None or len(found) <= limit:
        return Page(tuple(found), None)
    return Page(tuple(found[:limit]), found[limit - 1].key)


async def referrers(session: AsyncSession, caller: Caller, kind: str, key: Key) -> tuple[Referrer, ...]:
    """Who refers to an object."""
    return await ref_store.referrers(session, caller.tenant_id, kind, [key])


async def broken_references(session: AsyncSession, caller: Caller, kind: str, key: Key) -> tuple[tuple[str, Key, bool], ...]:
    """Kind and key of what an object refers to that is gone or disabled, and whether it is there."""
    return await ref_store.broken(session, caller.tenant_id, kind, key)


async def delete(session: AsyncSession, caller: Caller, kind: str, key: Key, *, now: datetime) -> StoredJson:
    """Refused while others refer to it (`StillReferred` lists them); but a site always can be: who refers to it shows `SiteGone`."""
    moment = Moment(await changes.raise_revision(session, caller.tenant_id), now)
    gone = await get(session, caller, kind, key)
    await _check_edge(session, caller, key.name, parsed(gone).spec, parsed(gone).spec)
    if kind == "site":
        await _close_site(session, caller, gone, moment)
    else:
        await _check_unreferred(session, caller, [gone])
    await _remove(session, caller, [gone], moment)
    return gone


async def delete_namespace(session: AsyncSession, caller: Caller, name: str, *, now: datetime) -> tuple[StoredJson, ...]:
    """With everything in it, which is answered. Raises `StillReferred` if something outside refers to something inside."""
    if name in BUILT_IN_NAMESPACES:
        raise Forbidden(f"namespace {name} is built in")
    moment = Moment(await changes.raise_revision(session, caller.tenant_id), now)
    namespace = await get(session, caller, "namespace", Key("", name))
    inside = await store.in_namespace(session, caller.tenant_id, name)
    await _check_unreferred(session, caller, [*inside])
    await _remove(session, caller, [*inside, namespace], moment)
    return inside


async def _settle(session: AsyncSession, caller: Caller, written: StoredJson, before: StoredJson | None, sealed: Sealed) -> None:
    """What hangs on an object: references, secrets, claims."""
    tenant_id, kind, stored = caller.tenant_id, written.kind, parsed(written)
    old = parsed(before) if before else None
    await ref_store.put(session, tenant_id, kind, written.key, refs(kind, stored.metadata, stored.spec))
    await secret_store.keep(session, tenant_id, kind, written.key, tuple(sealed.added), sealed.dropped)
    if kind in listening.KINDS:
        await origins.check(session, tenant_id, stored)
        await listening.claim(session, tenant_id, stored, old)
    elif kind == "site" and (old is None or _place(old) != _place(stored)):
        await listening.follow_site(session, tenant_id, stored, *([old] if old else []))
    elif kind == "origin_pool":
        users = await ref_store.referrers(session, tenant_id, kind, [written.key])
        await origins.check_pool(session, tenant_id, stored, users)
        public_names.check_pool(stored, await listening.on_edges(session, tenant_id, users))
    elif kind == "virtual_site":
        await listening.follow_virtual_site(session, tenant_id, written.key)
    elif kind == "site_mesh_group":
        await meshes.check(session, tenant_id, stored, old)


def _place(site: Stored[Any]) -> tuple[object, ...]:
    """What decides which load balancers are advertised at a site, and on which addresses."""
    return site.metadata.labels, site.metadata.disable, site.spec.site_type, site.spec.inside_vip, site.spec.outside_vip


async def _remove(session: AsyncSession, caller: Caller, gone: list[StoredJson], moment: Moment) -> None:
    for kind in listening.KINDS:
        await listening.release(session, caller.tenant_id, kind, [json.key for json in gone if json.kind == kind])
    await store.remove(session, caller.tenant_id, gone, moment)
    for json in gone:
        await _record(session, caller, "Delete", json, moment, shown=False)


async def _close_site(session: AsyncSession, caller: Caller, site: StoredJson, moment: Moment) -> None:
    """Its nodes are nobody's peers from this revision on, nobody joins it any more, and its listeners are free."""
    live = await nodes.live(session, caller.tenant_id, [site.uid])
    await nodes.revoke(session, caller.tenant_id, [node.id for node in live], moment.revision, moment.now)
    await registrations.retire_of_site(session, caller.tenant_id, site.name, moment.now)
    await tokens.revoke_of_site(session, caller.tenant_id, site.name, moment.now)
    await release_site(session, caller.tenant_id, site.uid)


async def _check(session: AsyncSession, caller: Caller, kind: str, metadata: Metadata, spec: Resource) -> None:
    if metadata.namespace:
        await _check_namespace(session, caller, metadata.namespace)
    missing = await ref_store.missing(session, caller.tenant_id, refs(kind, metadata, spec))
    if missing and kind in listening.KINDS:
        edges = await edge_store.names(session)
        missing = tuple(ref for ref in missing if ref.kind != "site" or ref.key not in edges)
    if missing:
        details = [FieldError(ref.path, f"{ref.kind} {_name(ref.key)} does not exist") for ref in missing]
        raise Invalid(f"{details[0].field}: {details[0].description}", details)


async def _check_edge(session: AsyncSession, caller: Caller, name: str, spec: Resource, before: Resource | None = None) -> None:
    """Regional edges are the operator's, a site is one for good or never, and no other has the name of one."""
    if not isinstance(spec, Site):
        return
    if isinstance(before, Site) and before.site_type != spec.site_type:
        description = f"cannot become {spec.site_type}: delete the site, and create it anew"
        raise Invalid(f"spec.site_type: {before.site_type} {description}", [FieldError("spec.site_type", description)])
    if before is None and not spec.is_edge and Key(SITES, name) in await edge_store.names(session):
        raise Conflict(f"{name} is the name of a regional edge", [FieldError("metadata.name", "is that of a regional edge")])
    if spec.is_edge and not caller.runs_edges:
        description = "regional edges are made and changed by the operator, in the operator's tenant"
        raise Forbidden(description, [FieldError("spec.site_type", description)])


async def _check_namespace(session: AsyncSession, caller: Caller, namespace: str) -> None:
    if not await store.exists(session, caller.tenant_id, "namespace", Key("", namespace)):
        raise NotFound(f"namespace {namespace} does not exist")


async def _check_unreferred(session: AsyncSession, caller: Caller, gone: list[StoredJson]) -> None:
    """Those that go together may refer to each other."""
    together = {(json.kind, json.key) for json in gone}
    outside: list[Referrer] = []
    for kind in sorted({json.kind for json in gone}):
        keys = [json.key for json in gone if json.kind == kind]
        found = await ref_store.referrers(session, caller.tenant_id, kind, keys)
        outside += [referrer for referrer in found if (referrer.kind, referrer.key) not in together]
    if outside:
        details = [FieldError(f"{referrer.kind} {referrer.key}", f"refers to it at {referrer.path}") for referrer in outside[:MAX_DETAILS]]
        what = f"{gone[0].kind} {_name(gone[0].key)}" if len(gone) == 1 else f"namespace {gone[0].namespace}"
        more = f" and {len(outside) - MOST_NAMED} more" if len(outside) > MOST_NAMED else ""
        named = ", ".join(detail.field for detail in details[:MOST_NAMED])
        raise StillReferred(f"{what} is still referred to by {named}{more}", details)


def _check_version(given: object, actual: int) -> None:
    if given not in (None, "") and str(given) != str(actual):
        raise StaleVersion(str(given), str(actual))


async def _record(session: AsyncSession, caller: Caller, verb: str, json: StoredJson, moment: Moment, *, shown: bool) -> None:
    await auditing.record(
        session,
        caller,
        f"{json.kind}.API.{verb}",
        moment.now,
        namespace=json.namespace,
        name=json.name,
        uid=json.uid,
        revision=moment.revision,
        shown={"metadata": json.meta, "spec": json.spec} if shown else None,
    )


def _labels(json: StoredJson) -> Mapping[str, str]:
    """What selectors see."""
    labels: Mapping[str, str] = members.labels(parsed(json)) if json.kind == "site" else json.meta["labels"]
    return labels


def _name(key: Key) -> str:
    return str(key) if key.namespace else key.name
