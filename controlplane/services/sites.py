"""Sites as places with nodes: how they appear, whether they are online, and how they are taken down."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.enrolment import Passport
from controlplane.auth import Caller
from controlplane.compile.members import labels
from controlplane.errors import FieldError, Forbidden
from controlplane.pki import KeyRing
from controlplane.resources.base import COMPUTED_LABELS, Key
from controlplane.resources.envelope import refuse_all
from controlplane.services import homes, resources
from controlplane.services.heartbeats import Heartbeats
from controlplane.store import edges as edge_store
from controlplane.store import nodes
from controlplane.store import resources as resource_store
from controlplane.store.changes import StoredJson
from controlplane.store.nodes import NodeStatus
from controlplane.store.resources import parsed

NAMESPACE = "system"


async def ensure(
    session: AsyncSession,
    caller: Caller,
    name: str,
    passport: Passport,
    words: Mapping[str, Mapping[str, str]],
    spec: Mapping[str, str],
    *,
    merge: bool,
    ring: KeyRing,
    now: datetime,
) -> StoredJson:
    """The site of that name: created if there is none, with the `labels` and `annotations` in `words` and the fields in `spec`.

    To a site that exists they are added, or overwrite, only with `merge`: what a site is part of is not for its nodes to change. Then it also
    gets the passport's coordinates, if it has none; raises `Invalid` if it has others.
    """
    key = Key(NAMESPACE, name)
    site = await resource_store.get(session, caller.tenant_id, "site", key)
    _check_type(name, site, passport)
    if site is None:
        body = {"metadata": {"name": name, **words}, "spec": {**_spec(passport), **spec}}
        return await resources.create(session, caller, "site", NAMESPACE, body, ring=ring, now=now)
    merged = {word: {**site.meta[word], **added} for word, added in words.items()}
    changed = {**_spec(passport), **site.spec, **spec}
    if merge:
        _check_coordinates(changed["coordinates"], passport)
    if not merge or (changed == site.spec and all(merged[word] == site.meta[word] for word in words)):
        return site
    body = {"metadata": {**site.meta, **merged}, "spec": changed}
    return await resources.replace(session, caller, "site", key, body, ring=ring, now=now)


def _spec(passport: Passport) -> dict[str, Any]:
    return {"coordinates": {"latitude": passport.latitude, "longitude": passport.longitude}}


def _check_coordinates(known: Mapping[str, float], passport: Passport) -> None:
    errors = [
        FieldError(f"passport.{word}", f"should be {value}, as site {passport.cluster_name} has it; change that at the site")
        for word, value in known.items()
        if getattr(passport, word) != value
    ]
    refuse_all(errors)


def _check_type(name: str, site: StoredJson | None, passport: Passport) -> None:
    """A regional edge is there before its nodes, and admits those alone whom the operator let in as its nodes."""
    wanted = passport.cluster_type == "re"
    if wanted and site is None:
        raise Forbidden(f"there is no regional edge {name}")
    if site is not None and wanted != parsed(site).spec.is_edge:
        raise Forbidden(f"site {name} is {'no' if wanted else 'a'} regional edge: the token is for another kind of site")


async def decommission(session: AsyncSession, caller: Caller, name: str, *, now: datetime) -> StoredJson:
    """Revoke its nodes, retire its registrations, delete it; whoever refers to it shows `SiteGone`. Raises `NotFound`."""
    return await resources.delete(session, caller, "site", Key(NAMESPACE, name), now=now)


def system_labels(site: StoredJson) -> dict[str, str]:
    """What selectors see besides the labels that users gave it."""
    return {label: value for label, value in labels(parsed(site)).items() if label in COMPUTED_LABELS}


@dataclass(frozen=True)
class Observed:
    """What GET tells of a site besides its spec."""

    state: str
    """`site_state` as in F5 XC."""
    connected_re: tuple[str, ...]
    """Names of the regional edges to which its tunnels are up."""
    connected_re_for_config: tuple[str, ...]
    """Of those to which they should be, in the order of use."""


async def observed(
    session: AsyncSession, tenant_id: UUID, site_ids: Collection[UUID], heartbeats: Heartbeats, now: datetime
) -> dict[UUID, Observed]:
    """By id."""
    listed = await edge_store.list_all(session)
    names = {str(json.uid): json.name for json, _ in listed.edges} if listed else {}
    wanted = await edge_store.homes(session, tenant_id)
    up = await homes.connected(session, tenant_id, site_ids, now)
    return {
        site_id: Observed(
            state,
            tuple(sorted(names[edge] for edge in up.get(site_id, ()) if edge in names)),
            tuple(names[edge] for edge in (wanted[site_id].edges if site_id in wanted else ()) if edge in names),
        )
        for site_id, state in (await _states(session, tenant_id, site_ids, heartbeats, now)).items()
    }


async def _states(
    session: AsyncSession, tenant_id: UUID, site_ids: Collection[UUID], heartbeats: Heartbeats, now: datetime
) -> dict[UUID, str]:
    found = await nodes.live(session, tenant_id, site_ids)
    statuses = await nodes.statuses(session, tenant_id, [node.id for node in found])
    silent = partial(heartbeats.is_silent, fleet=await nodes.count_live(session, tenant_id), now=now)
    return {site_id: _state([statuses.get(node.id) for node in found if node.site_id == site_id], silent) for site_id in site_ids}


def _state(statuses: Sequence[NodeStatus | None], is_silent: Callable[[datetime | None], bool]) -> str:
    """ONLINE: a node that is not known to be silent has a configuration in force."""
    if not statuses:
        return "WAITING_FOR_REGISTRATION"
    silent = [is_silent(status.last_heartbeat_at if status else None) for status in statuses]
    if any(status and status.applied_hash and status.proxy == "live" and not gone for status, gone in zip(statuses, silent, strict=True)):
        return "ONLINE"
    return "FAILED" if all(silent) else "PROVISIONING"
