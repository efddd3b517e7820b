"""Intent and observations in, the snapshot of one site out."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile.discoveries import discovery_item, watching
from controlplane.compile.imports import Import
from controlplane.compile.intent import CACHE, Intent, Observations, Tenant
from controlplane.compile.members import labels
from controlplane.compile.multicluster import MOST_PORTS
from controlplane.compile.plan import Export, Plan, peers, plan
from controlplane.compile.references import dangling
from controlplane.compile.snapshot import CompiledItem, Condition, Snapshot, snapshot_of
from controlplane.resources.base import Key, Stored
from controlplane.resources.site import Site

_DEAD_TIMEOUT_MS = 10_000


def compile_site(site_id: str, intent: Intent, observations: Observations) -> Snapshot:
    """What the site needs to know; nothing at all if it is gone or disabled.

    Any accepted intent compiles: what refers to something that is gone, or has to give way to another object, is compiled
    without it, and `conditions` say so. Equal intent gives equal bytes. Text that users wrote for headers and the like is
    handed on as it is: the agent escapes it where Envoy would read a format.
    """
    made = plan(intent)
    site = made.topology.sites.get(site_id)
    return snapshot_of(site_id, _items(site, made, observations) if site else ())


def conditions(intent: Intent) -> tuple[Condition, ...]:
    """What users should know of their objects, whether or not a site has them: dangling references, conflicts, what edges refuse, conflicts by site."""
    made = plan(intent)
    conflicts = (condition for site_id in sorted(made.listeners) for condition in made.listeners[site_id].conflicts)
    unpublished = (condition for site_id in sorted(made.topology.sites) for condition in made.publications(site_id).conflicts)
    unplaced = (_unplaced(each) for each in intent.imports if each.unplaced)
    found = (*dangling(intent), *made.topology.conflicts, *made.refused, *made.overruled, *conflicts, *unpublished, *unplaced)
    groups = {key: each.group for each in intent.imports for key in each.keys}
    return tuple(_of_group(condition, groups) if condition.key in groups else condition for condition in found)


def _unplaced(each: Import) -> Condition:
    message = f"{each.service} is not imported on port {', '.join(map(str, each.unplaced))}: a tenant imports at most {MOST_PORTS} ports"
    return Condition("site_mesh_group", each.group, "Conflicted", message)


def _of_group(condition: Condition, groups: Mapping[Key, Key]) -> Condition:
    """What is imported is no object that a user could look at: its mesh group is."""
    message = f"{condition.kind} {condition.key}, which imports a service: {condition.message}"
    return replace(condition, kind="site_mesh_group", key=groups[condition.key], message=message, site_id="")


def _items(site: Stored[Site], made: Plan, observations: Observations) -> list[CompiledItem]:
    """Some of them twice: pools that the site calls and serves."""
    site_id = str(site.uid)
    listening = made.accepted(site_id)
    balancers = [made.load_balancers[placement] for placement in listening]
    exports, called = made.exports(site_id), made.called(site_id)
    policies = {policy for balancer in balancers for policy in balancer.use.policies or ()}.union(*(export.policies for export in exports))
    known = peers(site_id, called, exports)
    return [
        site_item(site, made.intent.tenant),
        *(made.listeners[site_id].items if listening else ()),
        *[balancer.item for balancer in balancers],
        *[export.item for export in exports],
        *[pool.item for pool in called],
        *[made.pools[export.pool].item for export in exports],
        *[made.policies[policy].item for policy in policies],
        *[_peer_of(site_id, peer, made, observations) for peer in known],
        *_edges(site_id, known, exports, made, observations),
        *_discoveries(site_id, made),
        *made.publications(site_id).all_items,
    ]


def _peer_of(site_id: str, peer: str, made: Plan, observations: Observations) -> CompiledItem:
    """Without a common mesh there is no direct path, and so nothing to dial."""
    direct = made.topology.joined(site_id, peer)
    allowed = made.topology.encapsulations(site_id, peer) if direct else frozenset[str]()
    ipsec = observations.ipsec.get(peer, ()) if "ipsec" in allowed else ()
    ssl = "ssl" in allowed or not direct
    gateways = observations.gateways.get(peer, ()) if direct and ssl else ()
    site = made.topology.sites[peer]
    ways = _ways(site_id, peer, made, observations)
    return _peer(peer, site.metadata.name, direct, Ends(gateways, ipsec, ssl), ways, site.spec.drain, peer in observations.lost)


def _ways(site_id: str, peer: str, made: Plan, observations: Observations) -> tuple[str, ...]:
    """Ids of the regional edges through which the peer may be reached, in the order of use."""
    homes = observations.homes.get(peer, ()) if made.topology.fallback(site_id, peer) else ()
    return tuple(edge for edge in homes if edge in made.topology.edges)


def _edges(site_id: str, known: Iterable[str], exports: Iterable[Export], made: Plan, observations: Observations) -> Iterator[CompiledItem]:
    """It keeps tunnels to its homes, and to the edges that call its exports; what leads to its peers it only dials."""
    own = {*observations.homes.get(site_id, ()), *(edge for export in exports for edge in export.edges)}
    for edge in sorted(own.union(*(_ways(site_id, peer, made, observations) for peer in known)) & made.topology.edges):
        yield _edge(made.topology.sites[edge], observations.gateways.get(edge, ()), edge in own)


def _discoveries(site_id: str, made: Plan) -> Iterator[CompiledItem]:
    for stored in made.intent.enabled("discovery"):
        if site_id in watching(stored, made.topology) and (item := discovery_item(stored)):
            yield item


@lru_cache(CACHE)
def site_item(site: Stored[Site], tenant: Tenant) -> CompiledItem:
    """Of a regional edge too, whose tenant is the operator's."""
    body = items.Site(
        tenant_id=tenant.id,
        tenant=tenant.name,
        site_id=str(site.uid),
        name=site.metadata.name,
        labels=dict(sorted(labels(site).items())),
        trust_domain=tenant.trust_domain,
        kind="regional_edge" if site.spec.is_edge else "customer_edge",
        peer_anchor_pem="" if site.spec.is_edge else tenant.peer_anchor_pem,
        edge_anchor_pem=tenant.edge_anchor_pem,
        control_plane_anchor_pem=tenant.control_plane_anchor_pem,
        root_anchor_pem="" if site.spec.is_edge else tenant.root_anchor_pem,
        peer_crl_pem=tenant.peer_crl_pem,
        edge_crl_pem=tenant.edge_crl_pem,
        revocations=dict(tenant.revocations),
        tunnel_dead_timeout=site.spec.tunnel_dead_timeout or _DEAD_TIMEOUT_MS,
    )
    return CompiledItem.of(ItemKind.SITE, str(site.uid), body)


class Ends(NamedTuple):
    """Of direct tunnels to a peer; see `items.Peer`."""

    gateways: tuple[items.Gateway, ...]
    ipsec: tuple[items.IpsecNode, ...]
    ssl: bool


@lru_cache(CACHE)
def _peer(site_id: str, name: str, direct: bool, ends: Ends, edges: tuple[str, ...], draining: bool, lost: bool) -> CompiledItem:
    body = items.Peer(site_id=site_id, name=name, direct=direct, **ends._asdict(), edges=edges, draining=draining, lost=lost)
    return CompiledItem.of(ItemKind.PEER, site_id, body)


@lru_cache(CACHE)
def _edge(edge: Stored[Site], gateways: tuple[items.Gateway, ...], home: bool) -> CompiledItem:
    site_id = str(edge.uid)
    body = items.Edge(site_id=site_id, name=edge.metadata.name, gateways=gateways, home=home, draining=edge.spec.drain)
    return CompiledItem.of(ItemKind.EDGE, site_id, body)
