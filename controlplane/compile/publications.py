"""Services that stand for load balancers in the sites' own clusters, and who gives way where two want the same name."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from agent.protocol import items
from agent.protocol.items import ItemKind
from controlplane.compile.claims import published
from controlplane.compile.intent import CACHE
from controlplane.compile.listeners import Placement
from controlplane.compile.members import Topology
from controlplane.compile.snapshot import CompiledItem, Condition


@dataclass
class Publications:
    """Of one site."""

    owners: dict[str, Placement] = field(default_factory=dict)
    """By `namespace/service`."""
    items: list[CompiledItem] = field(default_factory=list)
    conflicts: list[Condition] = field(default_factory=list)


def publications(listening: Iterable[tuple[Placement, tuple[str, ...]]], topology: Topology) -> Mapping[str, Publications]:
    """`listening`: load balancers with the sites where they have their listeners, oldest first. Who loses a name keeps its listeners."""
    found: dict[str, Publications] = defaultdict(Publications)
    for placement, sites in listening:
        for site_id, services in _wanted(placement, topology).items():
            if site_id in sites:
                _publish(found[site_id], placement, services, (site_id, topology))
    return dict(found)


def _publish(at: Publications, placement: Placement, services: Mapping[str, tuple[int, ...]], site: tuple[str, Topology]) -> None:
    for key, ports in services.items():
        owner = at.owners.setdefault(key, placement)
        if owner is placement:
            at.items.append(_item(key, placement.key, placement.tcp, ports))
        else:
            at.conflicts.append(_conflicted(key, placement, owner, *site))


@lru_cache(CACHE)
def _wanted(placement: Placement, topology: Topology) -> Mapping[str, Mapping[str, tuple[int, ...]]]:
    """Ports by site and `namespace/service`."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for site_id, service, ports in published(placement.stored.spec, topology):
        found[site_id][f"{service.namespace}/{service.service}"].update(ports)
    return {site_id: {key: tuple(sorted(ports)) for key, ports in services.items()} for site_id, services in found.items()}


@lru_cache(CACHE)
def _item(key: str, load_balancer: str, tcp: bool, ports: tuple[int, ...]) -> CompiledItem:
    body = items.Publish(load_balancer=load_balancer, protocol="tcp" if tcp else "http", ports=ports)
    return CompiledItem.of(ItemKind.PUBLISH, key, body)


def _conflicted(key: str, loser: Placement, winner: Placement, site_id: str, topology: Topology) -> Condition:
    site = topology.sites[site_id].metadata.name
    message = f"at site {site} {winner.stored.kind} {winner.key} is older and has the published service {key}"
    return Condition(loser.stored.kind, loser.stored.key, "Conflicted", message, site_id)
