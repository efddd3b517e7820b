"""Which sites there are, which of them virtual sites select, and which of those meshes join."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter

from controlplane.compile.intent import Intent
from controlplane.compile.meshes import Mesh, meshes
from controlplane.compile.snapshot import Condition
from controlplane.resources.base import Key, SiteRef, Stored, VirtualSiteRef
from controlplane.resources.site import ENCAPSULATIONS, Site
from controlplane.resources.site_mesh_group import SiteMeshGroup
from controlplane.resources.virtual_site import VirtualSite

SITES = "system"
"""The namespace that all sites are in."""
_SITE_TYPE_LABEL = {"CUSTOMER_EDGE": "ves-io-ce", "REGIONAL_EDGE": "ves-io-re"}


@dataclass(frozen=True, eq=False)
class Topology:
    """The sites of a tenant. Equal sites, virtual sites and mesh groups give the very same topology, so it is a cheap key of caches."""

    sites: Mapping[str, Stored[Site]]
    """By id, sorted; with the regional edges, which belong to no mesh."""
    ids: Mapping[Key, str]
    """Of sites, by key. A site of the tenant comes before an edge of its name."""
    members: Mapping[Key, frozenset[str]]
    """Of virtual sites: ids of sites."""
    meshes: Mapping[Key, Mesh]
    """By key of the group."""
    conflicts: tuple[Condition, ...]
    """Of sites that are hub and spoke of the same relation."""
    edges: frozenset[str] = frozenset()
    """Ids of those sites that are regional edges."""

    def joining(self, one: str, other: str) -> tuple[Mesh, ...]:
        """The meshes that join both sites directly."""
        return tuple(mesh for mesh in self.meshes.values() if mesh.joins(one, other))

    def joined(self, one: str, other: str) -> bool:
        """Whether a mesh joins both sites, so that there is a direct path."""
        return any(mesh.joins(one, other) for mesh in self.meshes.values())

    def fallback(self, one: str, other: str) -> bool:
        """Whether regional edges may stand in between both: unless a mesh joins them, and each that does forbids it."""
        joining = self.joining(one, other)
        return not joining or any(mesh.fallback for mesh in joining)

    def encapsulations(self, one: str, other: str) -> frozenset[str]:
        """`ipsec`, `ssl`: what a direct tunnel between both may be. Both sites must allow it, and a mesh that joins them."""
        meshed = frozenset[str]().union(*(mesh.encapsulations for mesh in self.joining(one, other)))
        return meshed.intersection(*(ENCAPSULATIONS[self.sites[site].spec.tunnel_type] for site in (one, other)))

    def located(self, site: SiteRef | None, virtual_site: VirtualSiteRef | None) -> frozenset[str]:
        """Ids of the sites that either reference means; none for a site that is gone."""
        if site:
            return frozenset({self.ids[site.key]}) if site.key in self.ids else frozenset()
        return self.members.get(virtual_site.key, frozenset()) if virtual_site else frozenset()


def topology(intent: Intent) -> Topology:
    """Of the objects that are not disabled."""
    customers = tuple(site for site in intent.enabled("site") if not site.spec.is_edge)
    edges = tuple(edge for _, edge in sorted(intent.edges.items(), key=itemgetter(0)) if not edge.metadata.disable)
    return _topology(customers, edges, intent.enabled("virtual_site"), intent.enabled("site_mesh_group"))


def members(virtual_site: Stored[VirtualSite], intent: Intent) -> frozenset[str]:
    """Ids of the sites that the virtual site selects."""
    return _selected(virtual_site.spec, (*intent.enabled("site"), *intent.edges.values()))


def labels(site: Stored[Site]) -> dict[str, str]:
    """What selectors see: the user's labels, and those of the system, which cannot be overridden."""
    return {
        **site.metadata.labels,
        "ves.io/siteName": site.metadata.name,
        "ves.io/siteType": _SITE_TYPE_LABEL[site.spec.site_type],
    }


@lru_cache(maxsize=256)
def _topology(
    customers: tuple[Stored[Site], ...],
    edges: tuple[Stored[Site], ...],
    virtual_sites: tuple[Stored[VirtualSite], ...],
    groups: tuple[Stored[SiteMeshGroup], ...],
) -> Topology:
    sites = (*edges, *customers)
    selected = {virtual_site.key: _selected(virtual_site.spec, sites) for virtual_site in virtual_sites}
    by_id = {str(site.uid): site for site in sorted(sites, key=lambda site: str(site.uid))}
    joinable = {site.key: selected[site.key] for site in virtual_sites if site.spec.site_type == "CUSTOMER_EDGE"}
    joined, conflicts = meshes(groups, joinable, {site_id: site.metadata.name for site_id, site in by_id.items()})
    ids = {site.key: str(site.uid) for site in sites}
    return Topology(by_id, ids, selected, joined, conflicts, frozenset(str(edge.uid) for edge in edges))


def _selected(virtual_site: VirtualSite, sites: Sequence[Stored[Site]]) -> frozenset[str]:
    selector, wanted = virtual_site.site_selector.selector, virtual_site.site_type
    return frozenset(str(site.uid) for site in sites if site.spec.site_type == wanted and selector.matches(labels(site)))
