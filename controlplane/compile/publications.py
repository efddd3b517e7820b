"""Services that stand for load balancers in the sites' own clusters, and who gives way where two want the same name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from typing import Literal

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile.imports import Import, ImportedPort
from controlplane.compile.intent import CACHE
from controlplane.compile.listeners import Placement
from controlplane.compile.members import Topology
from controlplane.compile.snapshot import CompiledItem, Condition


@dataclass
class Publications:
    """Of one site."""

    owners: dict[str, Placement] = field(default_factory=dict)
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


def publications(site_id: str, listening: Iterable[Placement], imports: Iterable[Import], topology: Topology) -> Publications:
    """`listening`: load balancers that have their listeners at the site, oldest first. Who loses a name keeps its listeners.

    What is imported comes last: a name that somebody asked for is that one's.
    """
    found = Publications()
    for placement in listening:
        for key, ports in placement.services.get(site_id, {}).items():
            _publish(found, placement, key, ports, (site_id, topology))
    taking_part = [each for each in imports if site_id in each.importers]
    tcp = {placement.key for placement in listening if placement.tcp} if taking_part else set()
    for each in sorted(taking_part, key=attrgetter("since", "group", "service")):
        listened = [port for port in each.ports if str(each.key(port.port)) in tcp]
        _publish_import(found, each, listened, (site_id, topology))
    return found


def _publish(at: Publications, placement: Placement, key: str, ports: tuple[int, ...], site: tuple[str, Topology]) -> None:
    owner = at.owners.setdefault(key, placement)
    if owner is placement:
        at.items.append(_item(key, placement.key, placement.tcp, ports))
    else:
        at.conflicts.append(_conflicted(key, placement, owner, *site))


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


def _conflicted(key: str, loser: Placement, winner: Placement, site_id: str, topology: Topology) -> Condition:
    site = topology.sites[site_id].metadata.name
    message = f"at site {site} {winner.target[0]} {winner.key} is older and has the published service {key}"
    return Condition(*loser.target, "Conflicted", message, site_id)


def _taken(key: str, loser: Import, winner: Placement | Import, site_id: str, topology: Topology) -> Condition:
    site = topology.sites[site_id].metadata.name
    who = f"site_mesh_group {winner.group} imports" if isinstance(winner, Import) else f"{winner.target[0]} {winner.key} has"
    return Condition("site_mesh_group", loser.group, "Conflicted", f"at site {site} {who} the published service {key}")
