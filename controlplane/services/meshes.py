"""Site mesh groups: what is refused when one is written. What comes to conflict later, by a label, is resolved in compile."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from agent.protocol.report import MultiClusterServices
from controlplane.compile.concern import concerned_sites
from controlplane.compile.imports import Import
from controlplane.compile.intent import Intent, Tenant
from controlplane.compile.members import members as selected_by
from controlplane.compile.members import topology
from controlplane.compile.meshes import overlaps
from controlplane.errors import FieldError, HubAndSpoke, Invalid, StillReferred
from controlplane.resources.base import Key, Stored
from controlplane.resources.site_mesh_group import SiteMeshGroup
from controlplane.store import resources as store
from controlplane.store.resources import parsed

_KIND = "site_mesh_group"


@dataclass(frozen=True)
class Membership:
    """Who is in a group, and whom it joins them to."""

    role: str
    """Of its members: `hub`, `spoke` or `member`."""
    sites: tuple[Stored[Any], ...]
    """By name, as are the others."""
    others: tuple[Stored[Any], ...]
    """Hubs of its spokes, spokes of its hubs."""
    exporting: "Exporting | None" = None
    """Where the group allows it: what clusters export to each other."""


@dataclass(frozen=True)
class Exporting:
    clusters: tuple[tuple[str, MultiClusterServices | None], ...]
    """By name of the site, what was said of its cluster's part; None: nothing yet."""
    imports: tuple[Import, ...]
    names: Mapping[str, str]
    """Of sites, by id."""


def membership(group: Stored[SiteMeshGroup], intent: Intent, said: Mapping[str, MultiClusterServices]) -> Membership:
    """Nobody, if it is disabled. `said`: by site, what it said of its cluster's part in exporting services."""
    where = topology(intent)
    mesh = where.meshes.get(group.key)
    own = mesh.members if mesh else frozenset[str]()
    joined = concerned_sites(_KIND, group.key, intent) - own if mesh else frozenset[str]()
    role = "hub" if group.spec.hub_mesh else "spoke" if group.spec.spoke_mesh else "member"
    sites, others = (tuple(sorted((where.sites[id_] for id_ in ids), key=attrgetter("key"))) for ids in (own, joined))
    exporting = _exporting(group, (*sites, *others), intent, said) if group.spec.enable_multi_cluster_services else None
    return Membership(role, sites, others, exporting)


def _exporting(
    group: Stored[SiteMeshGroup], sites: Iterable[Stored[Any]], intent: Intent, said: Mapping[str, MultiClusterServices]
) -> Exporting:
    names = {str(site.uid): site.metadata.name for site in sites}
    clusters = tuple((name, said.get(site_id)) for site_id, name in sorted(names.items(), key=itemgetter(1)))
    return Exporting(clusters, tuple(each for each in intent.imports if each.group == group.key), names)


async def check(session: AsyncSession, tenant_id: UUID, group: Stored[SiteMeshGroup], before: Stored[SiteMeshGroup] | None) -> None:
    """Raises `Invalid` if hubs are not a group of hubs, `StillReferred` if they no longer would be, and `HubAndSpoke` if a site would be both in one relation.

    `before` is the group as it was: what it had in common with its hubs already is no reason to refuse.
    """
    if group.metadata.disable or (group.spec.full_mesh and not (before and before.spec.hub_mesh)):
        return
    others = {json.key: parsed(json) for json in await store.list_page(session, tenant_id, _KIND)}
    groups: dict[Key, Stored[SiteMeshGroup]] = {**others, group.key: group}
    relations = [(spoke, hub) for spoke in groups.values() if (hub := _hub(spoke, groups)) and group.key in (spoke.key, hub.key)]
    for spoke, hub in relations:
        if not hub.spec.hub_mesh:
            if spoke is group:
                path, description = "spec.spoke_mesh.hub_mesh_group", f"site_mesh_group {hub.key} has no hub_mesh"
                raise Invalid(f"{path}: {description}", [FieldError(path, description)])
            refers = FieldError(f"site_mesh_group {spoke.key}", "has its hubs here")
            raise StillReferred(f"site_mesh_group {spoke.key} has its hubs in {hub.key}, which therefore stays a hub_mesh", [refers])
    await _check_sites(session, tenant_id, relations, before)


def _hub(spoke: Stored[SiteMeshGroup], groups: dict[Key, Stored[SiteMeshGroup]]) -> Stored[SiteMeshGroup] | None:
    mesh = spoke.spec.spoke_mesh
    return groups.get(mesh.hub_mesh_group.key) if mesh else None


async def _check_sites(
    session: AsyncSession,
    tenant_id: UUID,
    relations: list[tuple[Stored[SiteMeshGroup], Stored[SiteMeshGroup]]],
    before: Stored[SiteMeshGroup] | None,
) -> None:
    enabled = [(spoke, hub) for spoke, hub in relations if not spoke.metadata.disable and not hub.metadata.disable]
    if not enabled:
        return
    keys = {ref.key for pair in enabled for group in (*pair, *([before] if before else [])) for ref in group.spec.virtual_site}
    sites = {json.uid: parsed(json) for json in await store.list_page(session, tenant_id, "site")}
    intent = Intent(_NOBODY, {"site": {site.key: site for site in sites.values()}})
    selected = {json.key: selected_by(parsed(json), intent) for json in await store.find(session, tenant_id, "virtual_site", keys)}
    for spoke, hub in enabled:
        had = _had(spoke, hub, before, selected)
        for overlap in overlaps(spoke, hub, selected):
            if overlap.site_id not in had:
                site = sites[UUID(overlap.site_id)].metadata.name
                description = f"site {site} would be a spoke in site_mesh_group {spoke.key} and one of its hubs in {hub.key}"
                raise HubAndSpoke(description, [FieldError("spec.virtual_site", description)])


def _had(spoke: Stored[Any], hub: Stored[Any], before: Stored[SiteMeshGroup] | None, selected: dict[Key, frozenset[str]]) -> frozenset[str]:
    """Sites that were both before."""
    if before is None:
        return frozenset()
    old_spoke, old_hub = (before if before.key == group.key else group for group in (spoke, hub))
    related = old_spoke.spec.spoke_mesh and old_spoke.spec.spoke_mesh.hub_mesh_group.key == old_hub.key
    return frozenset(overlap.site_id for overlap in overlaps(old_spoke, old_hub, selected)) if related else frozenset()


_NOBODY = Tenant(id="", name="", trust_domain="", peer_anchor_pem="")
