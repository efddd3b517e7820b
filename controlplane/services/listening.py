"""Claims of load balancers on listeners: refused when written, resolved when membership changes."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from controlplane.compile.claims import asking, claims
from controlplane.compile.intent import Intent, Tenant
from controlplane.compile.members import members, topology
from controlplane.compile.public_names import missing
from controlplane.errors import FieldError, ListenerTaken
from controlplane.resources.base import Key, Ref, Stored
from controlplane.resources.claim import Claim, Place
from controlplane.resources.normal import MAX_DETAILS
from controlplane.resources.registry import refs
from controlplane.services import gateways, public_names
from controlplane.store import claims as store
from controlplane.store import edges as edge_store
from controlplane.store import refs as ref_store
from controlplane.store import resources as resource_store
from controlplane.store.claims import Holding, Owner
from controlplane.store.refs import Referrer

KINDS = ("http_loadbalancer", "tcp_loadbalancer")


async def claim(session: AsyncSession, tenant_id: UUID, load_balancer: Stored[Any], before: Stored[Any] | None) -> None:
    """Take the places that a load balancer asks for. Raises `ListenerTaken` if one of them has an owner, or is a gateway's.

    What it asked for already (`before`) and did not get, because somebody else was there when a site joined, is no reason to refuse.
    """
    kind, key = load_balancer.kind, load_balancer.key
    places = await _places(session, tenant_id, [load_balancer, *([before] if before else [])])
    wanted = claims(load_balancer, places)
    await public_names.check(session, tenant_id, load_balancer, wanted, places)
    if any(claim.site_id in topology(places).edges for claim in wanted):
        await _follow_edges(session, tenant_id, places.edges, {load_balancer.uid: before})
    old = claims(before, places) if before else frozenset()
    if taken := await gateways.taken(session, tenant_id, {claim.place for claim in wanted - old}):
        raise _gateway_there(load_balancer.spec, taken, places)
    await store.release(session, tenant_id, [Holding(kind, key, old - wanted)])
    await _serve_waiting(session, tenant_id, (kind, key))
    await store.take(session, tenant_id, [Holding(kind, key, wanted)])
    got = (await store.owned(session, tenant_id, kind, [key])).get(key, frozenset())
    if refused := wanted - old - got:
        raise await _taken(session, tenant_id, load_balancer, refused, places)
    await store.note_waiting(session, tenant_id, {(kind, key): not wanted <= got})


async def on_edges(session: AsyncSession, tenant_id: UUID, referrers: Iterable[Referrer]) -> tuple[str, ...]:
    """Kind and key of those load balancers among these that have places on regional edges."""
    known = await _all_edges(session)
    await _follow_edges(session, tenant_id, known, {})
    edges = {str(edge.uid) for edge in known.values()}
    found: list[str] = []
    for kind in KINDS:
        owned = await store.owned(session, tenant_id, kind, [referrer.key for referrer in referrers if referrer.kind == kind])
        found += [f"{kind} {key}" for key, claimed in owned.items() if any(claim.site_id in edges for claim in claimed)]
    return tuple(sorted(found))


async def release(session: AsyncSession, tenant_id: UUID, kind: str, keys: Collection[Key]) -> None:
    """Give up everything that these load balancers have."""
    owned = await store.owned(session, tenant_id, kind, keys)
    await store.release(session, tenant_id, [Holding(kind, key, claimed) for key, claimed in owned.items()])


async def follow_site(session: AsyncSession, tenant_id: UUID, *versions: Stored[Any]) -> None:
    """A site appeared or changed: whoever is advertised there by name or label claims what is free, and lets go where it left.

    `versions` of the site are those before and after.
    """
    selecting = await _selecting(session, tenant_id, versions)
    await _follow(session, tenant_id, [*_refs("site", {site.key for site in versions}), *_refs("virtual_site", selecting)])


async def follow_virtual_site(session: AsyncSession, tenant_id: UUID, key: Key) -> None:
    """A selector changed."""
    await _follow(session, tenant_id, _refs("virtual_site", {key}))


async def _follow_edges(
    session: AsyncSession, tenant_id: UUID, edges: Mapping[Key, Stored[Any]], writing: Mapping[UUID, Stored[Any] | None]
) -> None:
    """Regional edges are the operator's, whose transactions do not touch other tenants: each follows before it next asks who is on them.

    `writing`: what is being written, as it was before.
    """
    if not await store.follows_edges(session, tenant_id, _hash(edges.values())):
        return
    virtual = [resource_store.parsed(json) for json in await resource_store.list_page(session, tenant_id, "virtual_site")]
    among = _intent({}, edges)
    selecting = [each.key for each in virtual if members(each, among)]
    targets = [*_refs("site", edges), *_refs("virtual_site", selecting)]
    found = {stored.uid: stored for target in targets for stored in await _advertised_at(session, tenant_id, *target)}
    public = await store.public(session, tenant_id)
    for kind in KINDS:
        own = await resource_store.find(session, tenant_id, kind, [key for of, key in public if of == kind])
        found |= {json.uid: resource_store.parsed(json) for json in own}
    await _claim_anew(session, tenant_id, [old for uid, stored in found.items() if (old := writing.get(uid, stored))])


def _hash(edges: Iterable[Stored[Any]]) -> str:
    """Of all that decides who is advertised on them."""
    told = sorted((str(edge.uid), edge.metadata.disable, sorted(edge.metadata.labels.items())) for edge in edges)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _refs(kind: str, keys: Iterable[Key]) -> list[tuple[str, Key]]:
    return [(kind, key) for key in keys]


async def _selecting(session: AsyncSession, tenant_id: UUID, sites: Collection[Stored[Any]]) -> set[Key]:
    """Virtual sites that select one of these."""
    virtual_sites = [resource_store.parsed(json) for json in await resource_store.list_page(session, tenant_id, "virtual_site")]
    alone = [_intent({"site": [site]}, {}) for site in sites]
    return {virtual.key for virtual in virtual_sites if any(members(virtual, intent) for intent in alone)}


async def _follow(session: AsyncSession, tenant_id: UUID, targets: Iterable[tuple[str, Key]]) -> None:
    """Bring the claims of those that refer to these up to date."""
    found = {stored.uid: stored for target in targets for stored in await _advertised_at(session, tenant_id, *target)}
    await _claim_anew(session, tenant_id, found.values())


async def _serve_waiting(session: AsyncSession, tenant_id: UUID, writing: tuple[str, Key]) -> None:
    """Whoever waits for a place comes before who asks for it now: sites serve it there since the place is free."""
    waiting = await store.waiting(session, tenant_id) - {writing}
    found = [await resource_store.find(session, tenant_id, of, [key for kind, key in waiting if kind == of]) for of in KINDS]
    await _claim_anew(session, tenant_id, [resource_store.parsed(json) for own in found for json in own])


async def _claim_anew(session: AsyncSession, tenant_id: UUID, load_balancers: Collection[Stored[Any]]) -> None:
    """The oldest comes first; what has an owner stays with it, and who lacks something waits for it."""
    if not load_balancers:
        return
    affected = sorted(load_balancers, key=lambda stored: (stored.created_revision, stored.kind, stored.key))
    places = await _places(session, tenant_id, affected)
    owned = await public_names.owned(session, tenant_id)
    asked = {(stored.kind, stored.key): claims(stored, places) for stored in affected}
    wanted = [Holding(*which, _admitted(claimed, topology(places).edges, owned)) for which, claimed in asked.items()]
    had = await _owned(session, tenant_id, wanted)
    await store.release(session, tenant_id, [replace(new, claims=had[new.kind, new.key] - new.claims) for new in wanted])
    await store.take(session, tenant_id, wanted)
    got = await _owned(session, tenant_id, wanted)
    await store.note_waiting(session, tenant_id, {which: not claimed <= got[which] for which, claimed in asked.items()})


async def _owned(session: AsyncSession, tenant_id: UUID, holdings: Collection[Holding]) -> Mapping[tuple[str, Key], frozenset[Claim]]:
    """What each of these load balancers has."""
    found: dict[tuple[str, Key], frozenset[Claim]] = defaultdict(frozenset)
    for kind in KINDS:
        own = await store.owned(session, tenant_id, kind, [holding.key for holding in holdings if holding.kind == kind])
        found |= {(kind, key): claimed for key, claimed in own.items()}
    return found


def _admitted(wanted: frozenset[Claim], edges: Collection[str], owned: frozenset[str]) -> frozenset[Claim]:
    """What is not the tenant's to serve in public takes nobody's place there."""
    public = frozenset(claim for claim in wanted if claim.site_id in edges)
    return wanted - public if missing(public, owned) else wanted


async def _advertised_at(session: AsyncSession, tenant_id: UUID, kind: str, key: Key) -> list[Stored[Any]]:
    referrers = await ref_store.referrers(session, tenant_id, kind, [key])
    found: list[Stored[Any]] = []
    for of in KINDS:
        keys = [referrer.key for referrer in referrers if referrer.kind == of]
        found += [resource_store.parsed(json) for json in await resource_store.find(session, tenant_id, of, keys)]
    return found


async def _places(session: AsyncSession, tenant_id: UUID, load_balancers: Iterable[Stored[Any]]) -> Intent:
    """The sites and virtual sites at which these are advertised, and nothing else of the tenant."""
    needed: set[Ref] = {ref for stored in load_balancers for ref in refs(stored.kind, stored.metadata, stored.spec)}
    virtual = {ref.key for ref in needed if ref.kind == "virtual_site"}
    named = {ref.key for ref in needed if ref.kind == "site"}
    sites = (
        await resource_store.list_page(session, tenant_id, "site")
        if virtual
        else await resource_store.find(session, tenant_id, "site", named)
    )
    virtual_sites = await resource_store.find(session, tenant_id, "virtual_site", virtual)
    found = {"site": map(resource_store.parsed, sites), "virtual_site": map(resource_store.parsed, virtual_sites)}
    return _intent(found, await _all_edges(session))


async def _all_edges(session: AsyncSession) -> dict[Key, Stored[Any]]:
    listed = await edge_store.list_all(session)
    return {json.key: resource_store.parsed(json) for json, _ in listed.edges} if listed else {}


def _intent(objects: Mapping[str, Iterable[Stored[Any]]], edges: Mapping[Key, Stored[Any]]) -> Intent:
    tenant = Tenant(id="", name="", trust_domain="", peer_anchor_pem="")
    return Intent(tenant, {kind: {stored.key: stored for stored in found} for kind, found in objects.items()}, edges)


async def _taken(
    session: AsyncSession, tenant_id: UUID, load_balancer: Stored[Any], refused: frozenset[Claim], places: Intent
) -> ListenerTaken:
    names = _names(places)
    spec, own = load_balancer.spec, (load_balancer.kind, load_balancer.key)
    owners: dict[tuple[Place, str | None], Owner] = {}
    for owner in await store.owners(session, tenant_id, Holding(*own, refused)):
        owners.setdefault((owner.claim.place, owner.claim.domain), owner)
        if (owner.kind, owner.key) != own:
            owners.setdefault((owner.claim.place, None), owner)
    details = []
    for wanted in sorted(refused):
        owner = owners.get((wanted.place, wanted.domain)) or owners[wanted.place, None]
        what = f"{wanted.network} port {wanted.port} of site {names[wanted.site_id]}"
        path = asking(spec, wanted.place, topology(places))
        if owner.claim.domain == wanted.domain and wanted.domain:
            what, path = f"domain {wanted.domain!r} at {what}", f"spec.domains[{spec.domains.index(wanted.domain)}]"
        details.append(FieldError(path, f"{what} belongs to {owner.kind} {owner.key} ({owner.claim.protocol})"))
    return ListenerTaken(details[0].description, details[:MAX_DETAILS])


def _gateway_there(spec: Any, taken: Mapping[Place, str], places: Intent) -> ListenerTaken:
    names = _names(places)
    details = [
        FieldError(asking(spec, place, topology(places)), f"at site {names[place.site_id]} {gateways.described(place, taken[place])}")
        for place in sorted(taken)
    ]
    return ListenerTaken(details[0].description, details[:MAX_DETAILS])


def _names(places: Intent) -> dict[str, str]:
    """Of sites, by id."""
    return {str(site.uid): site.metadata.name for site in (*places.of("site").values(), *places.edges.values())}
