"""Sites and the paths between them, as their nodes measured them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from typing import Any
from uuid import UUID

from agent.protocol.report import PeerHealth
from controlplane.compile.members import topology
from controlplane.errors import NotFound
from controlplane.resources.base import Key, Stored
from controlplane.services.delivery import Delivery
from controlplane.services.heartbeats import is_fresh
from controlplane.services.view import View
from controlplane.store import nodes, observations
from controlplane.store.nodes import Node
from controlplane.store.session import Database

NAMESPACE = "system"


@dataclass(frozen=True)
class Link:
    """The path from one node to a peer site."""

    node: Node
    source: Stored[Any]
    destination: Stored[Any]
    status: str
    """`LINK_STATUS_…`: UNKNOWN when the node is silent or has not tried."""
    report: PeerHealth


@dataclass(frozen=True)
class Edge:
    """Two sites, and the links between them both ways."""

    sites: tuple[Stored[Any], Stored[Any]]
    status: str
    links: tuple[Link, ...]


@dataclass(frozen=True)
class Mesh:
    group: Stored[Any]
    sites: tuple[Stored[Any], ...]
    edges: tuple[Edge, ...]


async def meshes(database: Database, delivery: Delivery, tenant_id: UUID, now: datetime) -> tuple[Mesh, ...]:
    """Every site mesh group, by name."""
    view = (await delivery.cache(tenant_id)).view
    links = await _links(database, view, tenant_id, now)
    groups = sorted(view.intent.of("site_mesh_group").items())
    return tuple(_mesh(view, group, links) for _, group in groups)


async def mesh(database: Database, delivery: Delivery, tenant_id: UUID, name: str, now: datetime) -> Mesh:
    """Raises `NotFound`."""
    view = (await delivery.cache(tenant_id)).view
    group = view.intent.of("site_mesh_group").get(Key(NAMESPACE, name))
    if group is None:
        raise NotFound(f"site_mesh_group {name} does not exist")
    return _mesh(view, group, await _links(database, view, tenant_id, now))


def _mesh(view: View, group: Stored[Any], links: Mapping[tuple[str, str], tuple[Link, ...]]) -> Mesh:
    selected = topology(view.intent)
    ids = sorted(frozenset[str]().union(*(selected.members.get(ref.key, frozenset()) for ref in group.spec.virtual_site)))
    edges = []
    for one, other in combinations(ids, 2):
        both = links.get((one, other), ()) + links.get((other, one), ())
        edges.append(Edge((view.sites[one], view.sites[other]), together(link.status for link in both), both))
    return Mesh(group, tuple(view.sites[site_id] for site_id in ids), tuple(edges))


def together(statuses: Iterable[str]) -> str:
    """Of several links: what they agree on; DEGRADED if some are up and some are down."""
    known = {status for status in statuses if status != "LINK_STATUS_UNKNOWN"}
    if len(known) > 1:
        return "LINK_STATUS_DEGRADED"
    return known.pop() if known else "LINK_STATUS_UNKNOWN"


async def _links(database: Database, view: View, tenant_id: UUID, now: datetime) -> dict[tuple[str, str], tuple[Link, ...]]:
    """By site ids (from, to)."""
    known = {node.id: node for site_id, own in view.fleet.live.items() if site_id in view.sites for node in own}
    async with database.sessions(tenant_id) as session:
        states = await observations.peers(session, tenant_id, known)
        statuses = await nodes.statuses(session, tenant_id, known)
    found: dict[tuple[str, str], tuple[Link, ...]] = {}
    for state in sorted(states, key=lambda state: known[state.node_id].name):
        node = known[state.node_id]
        if state.site_id in view.sites:
            report = PeerHealth.model_validate(state.report)
            heard = is_fresh(statuses.get(node.id), view.fleet.size, now)
            status = f"LINK_STATUS_{report.state}" if heard else "LINK_STATUS_UNKNOWN"
            ends = str(node.site_id), state.site_id
            found[ends] = (*found.get(ends, ()), Link(node, view.sites[ends[0]], view.sites[ends[1]], status, report))
    return found
