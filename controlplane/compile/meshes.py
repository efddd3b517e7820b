"""Site mesh groups as relations between sites: a full mesh, a mesh of hubs, or spokes and the hubs that they reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from controlplane.compile.snapshot import Condition
from controlplane.resources.base import Key, Stored
from controlplane.resources.site import ENCAPSULATIONS
from controlplane.resources.site_mesh_group import SiteMeshGroup

Members = Mapping[Key, frozenset[str]]
"""By virtual site: ids of the sites that it selects."""


@dataclass(frozen=True)
class Mesh:
    """Of one group. Sites are ids."""

    members: frozenset[str]
    hubs: frozenset[str] | None
    """What the members, which are spokes, reach directly; None: each other."""
    fallback: bool
    """Whether regional edges may stand in."""
    encapsulations: frozenset[str] = ENCAPSULATIONS["SITE_TO_SITE_TUNNEL_IPSEC_OR_SSL"]
    """`ipsec`, `ssl`: what its tunnels may be."""

    @property
    def sites(self) -> frozenset[str]:
        """All that it joins to others."""
        return self.members | (self.hubs or frozenset())

    def joins(self, one: str, other: str) -> bool:
        """Whether there is a direct path between both."""
        if self.hubs is None:
            return one in self.members and other in self.members
        return (one in self.members and other in self.hubs) or (other in self.members and one in self.hubs)


@dataclass(frozen=True)
class Overlap:
    """A site that is hub and spoke of the same relation. The group that was made later does not get it."""

    site_id: str
    winner: Stored[SiteMeshGroup]
    loser: Stored[SiteMeshGroup]


def meshes(
    groups: Sequence[Stored[SiteMeshGroup]], selected: Members, names: Mapping[str, str]
) -> tuple[Mapping[Key, Mesh], tuple[Condition, ...]]:
    """Of these groups, by key, and what users should know. A spoke group whose hubs are not there joins nobody."""
    by_key = {group.key: group for group in groups}
    made = {}
    conflicts = []
    for group in sorted(groups, key=attrgetter("key")):
        own, hub = members(group.spec, selected), hub_of(group, by_key)
        hubs = members(hub.spec, selected) if hub else frozenset[str]()
        if hub:
            for overlap in overlaps(group, hub, selected):
                if overlap.loser is hub:
                    hubs -= {overlap.site_id}
                else:
                    own -= {overlap.site_id}
                conflicts.append(_conflicted(overlap, names[overlap.site_id]))
        fallback, allowed = group.spec.enable_re_fallback is not None, ENCAPSULATIONS[group.spec.tunnel_type]
        made[group.key] = Mesh(own, hubs if group.spec.spoke_mesh else None, fallback, allowed)
    return made, tuple(conflicts)


def members(spec: SiteMeshGroup, selected: Members) -> frozenset[str]:
    """Ids of the sites that the group selects."""
    return frozenset[str]().union(*(selected.get(ref.key, frozenset()) for ref in spec.virtual_site))


def hub_of(group: Stored[SiteMeshGroup], groups: Mapping[Key, Stored[SiteMeshGroup]]) -> Stored[SiteMeshGroup] | None:
    """The group of hubs that a group of spokes names, if it is there and is one."""
    spoke = group.spec.spoke_mesh
    hub = groups.get(spoke.hub_mesh_group.key) if spoke else None
    return hub if hub and hub.spec.hub_mesh else None


def overlaps(spoke: Stored[SiteMeshGroup], hub: Stored[SiteMeshGroup], selected: Members) -> tuple[Overlap, ...]:
    """By id of the site."""
    winner, loser = sorted((spoke, hub), key=attrgetter("created_revision", "key"))
    both = members(spoke.spec, selected) & members(hub.spec, selected)
    return tuple(Overlap(site_id, winner, loser) for site_id in sorted(both))


def _conflicted(overlap: Overlap, site: str) -> Condition:
    roles = {True: "spoke", False: "hub"}
    winner, loser = (roles[group.spec.spoke_mesh is not None] for group in (overlap.winner, overlap.loser))
    message = f"site {site} is a {winner} of site_mesh_group {overlap.winner.key}, which is older, and so no {loser} of this one"
    return Condition(overlap.loser.kind, overlap.loser.key, "Conflicted", message, overlap.site_id)
