"""Which sites there are, which of them virtual sites select, and which are joined by a mesh."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from controlplane.compile.intent import Intent
from controlplane.resources.base import Key, SiteRef, Stored, VirtualSiteRef
from controlplane.resources.site import Site
from controlplane.resources.site_mesh_group import SiteMeshGroup
from controlplane.resources.virtual_site import VirtualSite

SITES = "system"
"""The namespace that all sites are in."""
_SITE_TYPE_LABEL = {"CUSTOMER_EDGE": "ves-io-ce"}


@dataclass(frozen=True, eq=False)
class Topology:
    """The sites of a tenant. Equal sites, virtual sites and mesh groups give the very same topology, so it is a cheap key of caches."""

    sites: Mapping[str, Stored[Site]]
    """By id, sorted."""
    ids: Mapping[Key, str]
    """Of sites, by key."""
    members: Mapping[Key, frozenset[str]]
    """Of virtual sites: ids of sites."""
    meshes: tuple[frozenset[str], ...]
    """Members of each full mesh: ids of sites."""

    def joined(self, one: str, other: str) -> bool:
        """Whether both sites are in one full mesh, so that there is a direct path."""
        return any(one in mesh and other in mesh for mesh in self.meshes)

    def located(self, site: SiteRef | None, virtual_site: VirtualSiteRef | None) -> frozenset[str]:
        """Ids of the sites that either reference means; none for a site that is gone."""
        if site:
            return frozenset({self.ids[site.key]}) if site.key in self.ids else frozenset()
        return self.members.get(virtual_site.key, frozenset()) if virtual_site else frozenset()


def topology(intent: Intent) -> Topology:
    """Of the objects that are not disabled."""
    return _topology(intent.enabled("site"), intent.enabled("virtual_site"), intent.enabled("site_mesh_group"))


def members(virtual_site: Stored[VirtualSite], intent: Intent) -> frozenset[str]:
    """Ids of the sites that the virtual site selects."""
    return _selected(virtual_site.spec, intent.enabled("site"))


def mesh(intent: Intent) -> tuple[frozenset[str], ...]:
    """Ids of the members of each full mesh."""
    return topology(intent).meshes


def labels(site: Stored[Site]) -> dict[str, str]:
    """What selectors see: the user's labels, and those of the system, which cannot be overridden."""
    return {
        **site.metadata.labels,
        "ves.io/siteName": site.metadata.name,
        "ves.io/siteType": _SITE_TYPE_LABEL[site.spec.site_type],
    }


@lru_cache(maxsize=256)
def _topology(
    sites: tuple[Stored[Site], ...], virtual_sites: tuple[Stored[VirtualSite], ...], groups: tuple[Stored[SiteMeshGroup], ...]
) -> Topology:
    selected = {virtual_site.key: _selected(virtual_site.spec, sites) for virtual_site in virtual_sites}
    return Topology(
        sites={str(site.uid): site for site in sorted(sites, key=lambda site: str(site.uid))},
        ids={site.key: str(site.uid) for site in sites},
        members=selected,
        meshes=tuple(frozenset().union(*(selected.get(ref.key, frozenset()) for ref in group.spec.virtual_site)) for group in groups),
    )


def _selected(virtual_site: VirtualSite, sites: Sequence[Stored[Site]]) -> frozenset[str]:
    selector = virtual_site.site_selector.selector
    return frozenset(str(site.uid) for site in sites if selector.matches(labels(site)))
