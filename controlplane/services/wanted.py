"""What a site should have in force of an object, and whether what its nodes say amounts to that."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from agent.protocol.items import LOAD_BALANCERS, ItemKind, Listener, Publish
from controlplane.compile.concern import concerned_sites
from controlplane.compile.imports import Import
from controlplane.compile.intent import Intent
from controlplane.compile.references import referrers
from controlplane.compile.snapshot import CompiledItem
from controlplane.resources.base import Stored
from controlplane.services.caches import Published
from controlplane.store.nodes import NodeStatus

ITEMS_OF = {
    "http_loadbalancer": (ItemKind.HTTP_LOADBALANCER,),
    "tcp_loadbalancer": (ItemKind.TCP_LOADBALANCER,),
    "origin_pool": (ItemKind.ORIGIN_POOL, ItemKind.EXPORT),
    "service_policy": (ItemKind.POLICY,),
    "discovery": (ItemKind.DISCOVERY,),
    "site": (ItemKind.SITE, ItemKind.PEER),
}
"""Items that carry an object's key, or a site's id."""
Carrier = tuple[ItemKind, str]
"""Kind and key of an item."""


@dataclass(frozen=True)
class Wanted:
    """What one site should have in force."""

    carriers: frozenset[Carrier]
    revision: int
    published: Published
    lost_to: str = ""
    """Why the object does not hold at the site, if another one has what it asks for there."""
    is_told: Callable[[str | None], bool] | None = None
    """On a regional edge: whether the manifest of a hash says of the tenant what it should."""

    @property
    def compiled(self) -> bool:
        """Whether there is a snapshot of that revision at all."""
        return self.published.held_until is None or self.published.held_until >= self.revision

    def in_force(self, status: NodeStatus) -> bool:
        """By the last ACK: of a snapshot at that revision or later, or of one that is the same at that revision."""
        if self.is_told:
            return self.compiled and status.proxy == "live" and self.is_told(status.applied_hash)
        acked = status.applied_revision >= self.revision or (self.compiled and status.applied_hash == self.published.hash)
        return acked and status.applied_hash is not None and status.proxy == "live"

    def rejections(self, status: NodeStatus) -> Iterator[Mapping[str, Any]]:
        """Of the items that carry the object, as they are now."""
        items = self.published.snapshot.items
        for rejection in status.rejected:
            item = items.get((rejection["kind"], rejection["key"]))
            if item and item.hash == rejection["hash"] and self._is_carried_by(item):
                yield rejection

    def _is_carried_by(self, item: CompiledItem) -> bool:
        """A load balancer by the listeners that it shares, and the Services that lead to it, too."""
        if item.kind is ItemKind.PUBLISH:
            return any((LOAD_BALANCERS[port.protocol], port.load_balancer) in self.carriers for port in Publish.read(item.body).ports)
        if item.kind is not ItemKind.LISTENER:
            return (item.kind, item.key) in self.carriers
        listener = Listener.read(item.body)
        return any((LOAD_BALANCERS[listener.protocol], load_balancer) in self.carriers for load_balancer in listener.load_balancers)


def carriers(stored: Stored[Any], intent: Intent) -> frozenset[Carrier]:
    """Items that bring the object to a site. What has none of its own is carried by whatever refers to it."""
    if kinds := ITEMS_OF.get(stored.kind):
        key = str(stored.uid if stored.kind == "site" else stored.key)
        return frozenset((kind, key) for kind in kinds)
    if stored.kind == "site_mesh_group":
        peers = frozenset((ItemKind.PEER, site_id) for site_id in concerned_sites(stored.kind, stored.key, intent))
        return peers.union(*(_importing(each) for each in intent.imports if each.group == stored.key))
    by = referrers(intent).get((stored.kind, stored.key), ())
    return frozenset[Carrier]().union(*(carriers(referrer, intent) for referrer in by))


def _importing(each: Import) -> frozenset[Carrier]:
    """Items of a service that the clusters of a mesh group export to each other."""
    kinds = (ItemKind.TCP_LOADBALANCER, ItemKind.ORIGIN_POOL, ItemKind.EXPORT)
    return frozenset((kind, str(key)) for kind in kinds for key in each.keys) | {(ItemKind.SERVICE_EXPORT, each.service)}
