"""Services that stand for load balancers in the sites' own clusters, and who gives way where two want the same name."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Any, Literal

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile.claims import published
from controlplane.compile.imports import Import, ImportedPort
from controlplane.compile.intent import CACHE
from controlplane.compile.listeners import Placement
from controlplane.compile.members import Topology
from controlplane.compile.snapshot import CompiledItem, Condition
from controlplane.resources.base import Stored


@dataclass
class Publications:
    """Of one site."""

    owners: dict[str, Stored[Any]] = field(default_factory=dict)
    """Load balancers by `namespace/service`."""
    imports: dict[str, Import] = field(default_factory=dict)
    """Likewise."""
    exports: dict[str, str] = field(default_factory=dict)
    """Services of the site's own cluster that are imported somewhere, and in what each conflicts with an older export."""
    items: list[CompiledItem] = field(default_factory=list)
    conflicts: list[Condition] = field(default_factory=list)

    @property
    def all_items(self) -> list[CompiledItem]:
        return [*self.items, *(_export_item(service, conflict) for service, conflict in self.exports.items())]


def publications(
    listening: Iterable[tuple[Placement, tuple[str, ...]]], imports: Iterable[Import], topology: Topology
) -> Mapping[str, Publications]:
    """`listening`: load balancers with the sites where they have their listeners, oldest first. Who loses a name keeps its listeners.

    What is imported comes last: a name that somebody asked for is that one's.
    """
    found: dict[str, Publications] = defaultdict(Publications)
    at: dict[str, frozenset[str]] = {}
    for placement, sites in listening:
        at[placement.key] = frozenset(sites) if placement.tcp else frozenset()
        for site_id, services in _wanted(placement, topology).items():
            if site_id in sites:
                _publish(found[site_id], placement, services, (site_id, topology))
    for each in sorted(imports, key=attrgetter("since", "group", "service")):
        for site_id in each.importers:
            _publish_import(
                found[site_id], each, [port for port in each.ports if site_id in at.get(str(each.key(port.port)), ())], (site_id, topology)
            )
    return dict(found)


def _publish(at: Publications, placement: Placement, services: Mapping[str, tuple[int, ...]], site: tuple[str, Topology]) -> None:
    for key, ports in services.items():
        owner = at.owners.setdefault(key, placement.stored)
        if owner is placement.stored:
            at.items.append(_item(key, placement.key, placement.tcp, ports))
        else:
            at.conflicts.append(_conflicted(key, placement.stored, owner, *site))


def _publish_import(at: Publications, each: Import, ports: Sequence[ImportedPort], site: tuple[str, Topology]) -> None:
    """At a site that exports it, together with what becomes of the export."""
    site_id, topology = site
    if site_id in each.exporters:
        at.exports[each.service] = max(at.exports.get(each.service, ""), dict(each.conflicts).get(site_id, ""))
    key = each.published_as(site_id)
    owner = at.owners.get(key) or at.imports.setdefault(key, each)
    if owner is not each:
        at.conflicts.append(_taken(key, each, owner, *site))
    elif ports:
        clusters = tuple(sorted(topology.sites[exporter].metadata.name for exporter in each.exporters))
        at.items.append(_import_item(key, each, tuple(ports), clusters))


@lru_cache(CACHE)
def _wanted(placement: Placement, topology: Topology) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
    """Ports by site and `namespace/service`."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for site_id, service, ports in published(placement.stored.spec, topology):
        found[site_id][f"{service.namespace}/{service.service}"].update(ports)
    return {site_id: {key: tuple(sorted(ports)) for key, ports in services.items()} for site_id, services in found.items()}


@lru_cache(CACHE)
def _item(key: str, load_balancer: str, tcp: bool, ports: tuple[int, ...]) -> CompiledItem:
    protocol: Literal["http", "tcp"] = "tcp" if tcp else "http"
    published = (
        items.PublishedPort(name=f"{protocol}-{port}", port=port, target_port=port, load_balancer=load_balancer, protocol=protocol)
        for port in ports
    )
    return CompiledItem.of(ItemKind.PUBLISH, key, items.Publish(ports=tuple(published)))


@lru_cache(CACHE)
def _import_item(key: str, each: Import, ports: tuple[ImportedPort, ...], clusters: tuple[str, ...]) -> CompiledItem:
    published = (
        items.PublishedPort(
            name=port.name, port=port.port, target_port=port.target_port, load_balancer=str(each.key(port.port)), protocol="tcp"
        )
        for port in ports
    )
    return CompiledItem.of(ItemKind.PUBLISH, key, items.Publish(ports=tuple(published), service_import=each.name, clusters=clusters))


@lru_cache(CACHE)
def _export_item(service: str, conflict: str) -> CompiledItem:
    return CompiledItem.of(ItemKind.SERVICE_EXPORT, service, items.ServiceExport(conflict=conflict))


def _conflicted(key: str, loser: Stored[Any], winner: Stored[Any], site_id: str, topology: Topology) -> Condition:
    site = topology.sites[site_id].metadata.name
    message = f"at site {site} {winner.kind} {winner.key} is older and has the published service {key}"
    return Condition(loser.kind, loser.key, "Conflicted", message, site_id)


def _taken(key: str, loser: Import, winner: Stored[Any] | Import, site_id: str, topology: Topology) -> Condition:
    site = topology.sites[site_id].metadata.name
    who = f"site_mesh_group {winner.group} imports" if isinstance(winner, Import) else f"{winner.kind} {winner.key} has"
    return Condition("site_mesh_group", loser.group, "Conflicted", f"at site {site} {who} the published service {key}")
