"""One tenant's intent and observations at one revision, as a replica holds it. Pure: changes go in, a new view comes out."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from typing import Any, Self
from uuid import UUID
from weakref import ref

from agent.protocol.items import Gateway, IpsecNode
from agent.protocol.report import GatewayListener, IpsecAbility, MultiClusterServices
from controlplane.compile.concern import changed_sites
from controlplane.compile.intent import Intent, Observations, Tenant
from controlplane.compile.multicluster import Exported, with_imports
from controlplane.pki import key_identifier
from controlplane.resources.base import Key, Stored
from controlplane.store.changes import Anchors, Changes
from controlplane.store.edges import EdgeList
from controlplane.store.nodes import Node
from controlplane.store.resources import parsed

EVERYTHING = 256
"""So many changes at once concern every site; looking at each would take longer than compiling."""


@dataclass(frozen=True, eq=False)
class Fleet:
    """All nodes of a tenant."""

    nodes: Mapping[UUID, Node]
    """Revoked ones included."""

    @cached_property
    def live(self) -> Mapping[str, tuple[Node, ...]]:
        """By site id, those that are not revoked, by name."""
        found: dict[str, list[Node]] = defaultdict(list)
        for node in sorted(self.nodes.values(), key=lambda node: node.name):
            if not node.revoked_at:
                found[str(node.site_id)].append(node)
        return {site_id: tuple(own) for site_id, own in found.items()}

    @cached_property
    def size(self) -> int:
        """How many are not revoked."""
        return sum(map(len, self.live.values()))

    @cached_property
    def observations(self) -> Observations:
        gateways = {
            site_id: tuple(
                Gateway.model_validate(gateway) for node in sorted(own, key=lambda node: str(node.id)) for gateway in node.gateways
            )
            for site_id, own in self.live.items()
        }
        ipsec = {site_id: tuple(_ipsec_nodes(own)) for site_id, own in self.live.items()}
        lost = frozenset(site_id for site_id, own in self.live.items() if all(node.lost_at for node in own))
        return Observations({site_id: found for site_id, found in gateways.items() if found}, ipsec=ipsec, lost=lost)

    @cached_property
    def gateway_listeners(self) -> Mapping[str, Mapping[str, GatewayListener]]:
        """By site and name of the node, of those that told theirs."""
        return {
            site_id: {node.name: GatewayListener.model_validate(node.gateway_listener) for node in own if node.gateway_listener}
            for site_id, own in self.live.items()
        }

    @cached_property
    def multi_cluster(self) -> Mapping[str, MultiClusterServices]:
        """By site, what was said last of its cluster's part in the Multi-Cluster Services API."""
        said = {site_id: max(own, key=attrgetter("exports_revision")).exports for site_id, own in self.live.items()}
        return {site_id: MultiClusterServices.model_validate(exports) for site_id, exports in said.items() if exports}

    @cached_property
    def exported(self) -> Exported:
        return {site_id: found.exports for site_id, found in self.multi_cluster.items() if found.offered}


def _ipsec_nodes(nodes: Iterable[Node]) -> Iterator[IpsecNode]:
    """Those that say that they can."""
    for node in sorted(nodes, key=lambda node: str(node.id)):
        if node.ipsec and (said := IpsecAbility.model_validate(node.ipsec)).able:
            yield IpsecNode(node_id=str(node.id), host=said.host, port=said.port)


@dataclass(frozen=True)
class Edges:
    """All regional edges, as every tenant may know them."""

    operator_id: UUID | None = None
    """The tenant that they are in."""
    revision: int = -1
    """Of that tenant."""
    sites: Mapping[Key, Stored[Any]] = field(default_factory=dict)
    gateways: Mapping[str, tuple[Gateway, ...]] = field(default_factory=dict)
    """By id."""

    @classmethod
    def of(cls, found: EdgeList) -> Self:
        sites = [parsed(json) for json, _ in found.edges]
        gateways = (tuple(map(Gateway.model_validate, each)) for _, each in found.edges)
        reachable = {str(site.uid): own for site, own in zip(sites, gateways, strict=True) if own}
        return cls(found.operator_id, found.revision, {site.key: site for site in sites}, reachable)

    def same_as(self, other: "Edges") -> bool:
        """Whatever else the operator changed."""
        return (self.sites, self.gateways) == (other.sites, other.gateways)


@dataclass(frozen=True, eq=False)
class View:
    """Never changed in place; what did not change is shared with the view before."""

    revision: int
    intent: Intent
    fleet: Fleet
    own_certificate: bool = True
    """Whether control planes are trusted under the fabric's roots."""
    issuers: frozenset[str] = frozenset()
    """Key identifiers of the authorities whose leaves nodes may keep until they expire."""
    edges: Edges = Edges()
    homes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By customer edge, ids of regional edges in the order of use."""

    @cached_property
    def observations(self) -> Observations:
        seen = self.fleet.observations
        return replace(seen, gateways={**seen.gateways, **self.edges.gateways}, homes=self.homes)

    @cached_property
    def sites(self) -> Mapping[str, Stored[Any]]:
        """By id."""
        return {str(site.uid): site for site in self.intent.of("site").values()}


def first_view(tenant: Tenant, changes: Changes, own_certificate: bool = True, edges: Edges = Edges()) -> View:
    """From everything there is."""
    return advance(View(-1, Intent(tenant, {}, edges.sites), Fleet({}), own_certificate, edges=edges), changes)


def beside(view: View, edges: Edges) -> View:
    """The same among other edges."""
    intent = view.intent if view.edges.sites == edges.sites else replace(view.intent, edges=edges.sites)
    return replace(view, intent=intent, edges=edges)


def beside_concerned(view: View, edges: Edges, connected_to: Callable[[str], Iterable[str]]) -> frozenset[str]:
    """Ids of the sites whose snapshot may be another one beside these edges. `connected_to` an edge: sites that have it in their snapshot."""
    if view.edges.sites != edges.sites:
        return frozenset(view.sites)
    ids = view.edges.gateways.keys() | edges.gateways.keys()
    moved = (edge for edge in ids if view.edges.gateways.get(edge) != edges.gateways.get(edge))
    return frozenset(site_id for edge in moved for site_id in connected_to(edge))


def advance(view: View, changes: Changes) -> View:
    """What holds after the changes. If it raises, nothing of them may be used."""
    intent = view.intent
    tenant = _trusting(view, changes)
    if changes.written or changes.deleted or (tenant, changes.names) != (intent.tenant, intent.names):
        intent = Intent(
            tenant, _objects(intent.objects, changes), intent.edges, changes.names, intent.imports, ref(intent), changes.targets
        )
    fleet = Fleet({**view.fleet.nodes, **{node.id: node for node in changes.nodes}}) if changes.nodes else view.fleet
    intent = with_imports(intent, fleet.exported)
    issuers = view.issuers if changes.anchors is None else _issuers(changes.anchors)
    homes = {**view.homes, **changes.homes} if changes.homes else view.homes
    return View(changes.revision, intent, fleet, view.own_certificate, issuers, view.edges, homes)


def _trusting(view: View, changes: Changes) -> Tenant:
    """The tenant with the anchors that its sites should have."""
    tenant = replace(view.intent.tenant, revocations=tuple(sorted(changes.revocations.items())))
    if changes.anchors is None:
        return tenant
    peers, edges, roots = (changes.anchors[role] for role in ("tenant", "edges", "root"))
    return replace(
        tenant,
        peer_anchor_pem=peers.pem,
        peer_crl_pem=peers.crl_pem,
        edge_anchor_pem=edges.pem,
        edge_crl_pem=edges.crl_pem,
        control_plane_anchor_pem=roots.pem if view.own_certificate else "",
        root_anchor_pem=roots.pem,
    )


def _issuers(anchors: Mapping[str, Anchors]) -> frozenset[str]:
    both = {**anchors["tenant"].issuers, **anchors["edges"].issuers}
    return frozenset(key_identifier(pem) for pem, state in both.items() if state != "retiring")


def concerned(old: View, new: View, changes: Changes, peers_of: Callable[[str], Iterable[str]]) -> frozenset[str]:
    """Ids of the sites whose snapshot may differ. `peers_of` a site: the sites in whose snapshot it is a peer."""
    keys = changes.targets | {("tcp_loadbalancer", key) for each in {*old.intent.imports} ^ {*new.intent.imports} for key in each.keys}
    if len(keys) > EVERYTHING or (old.intent.tenant, old.intent.names) != (new.intent.tenant, new.intent.names):
        return frozenset(old.sites) | frozenset(new.sites)
    found: set[str] = set()
    for kind, key in keys:
        found |= changed_sites(kind, key, old.intent, new.intent)
    for site_id in _moved(old, new, changes.nodes) | changes.homes.keys():
        found |= {site_id, *peers_of(site_id)}
    return frozenset(found)


def _moved(old: View, new: View, nodes: Iterable[Node]) -> set[str]:
    """Sites whose nodes are reached in another way than before, or lost since, or back."""
    sites = {str(node.site_id) for node in nodes}
    before, after = old.fleet.observations, new.fleet.observations
    moved = {site_id for site_id in sites if _ends(before, site_id) != _ends(after, site_id)}
    return moved | (sites & (before.lost ^ after.lost))


def _ends(seen: Observations, site_id: str) -> tuple[object, ...]:
    return seen.gateways.get(site_id), seen.ipsec.get(site_id)


def _objects(objects: Mapping[str, Mapping[Key, Stored[Any]]], changes: Changes) -> Mapping[str, Mapping[Key, Stored[Any]]]:
    touched = {kind for kind, _, _ in changes.deleted} | {written.kind for written in changes.written}
    fresh = {kind: dict(objects.get(kind, {})) for kind in touched}
    for kind, key, uid in changes.deleted:
        if key in fresh[kind] and fresh[kind][key].uid == uid:
            del fresh[kind][key]
    for written in changes.written:
        fresh[written.kind][written.key] = parsed(written)
    return {**objects, **fresh}
