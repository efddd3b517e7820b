"""Services that sites found in their clusters: what origin pools can name."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from agent.protocol.report import DiscoveredService
from controlplane.resources.base import Key, Stored
from controlplane.services.delivery import Delivery
from controlplane.services.view import View
from controlplane.store import observations
from controlplane.store.observations import DiscoveryState
from controlplane.store.session import Database

IN_CLUSTER = "in-cluster"
ALL = "system"
"""The namespace in which everything is seen."""


@dataclass(frozen=True)
class Found:
    """A service as one site sees it."""

    name: str
    """Of the object: the service's own with a suffix that makes it unique, the same as long as the service is there."""
    site: Stored[Any]
    discovery: str
    """Key of the discovery, or `in-cluster`."""
    service: DiscoveredService


async def services(database: Database, delivery: Delivery, tenant_id: UUID, namespace: str, site: str | None = None) -> tuple[Found, ...]:
    """Those that a namespace may see, by name; of one site (its name) or of all."""
    view, states = await _latest(database, delivery, tenant_id)
    found = (each for site_id, state in states for each in _in(view, site_id, state) if site in (None, each.site.metadata.name))
    seen = (each for each in found if namespace == ALL or _is_seen(view, each, namespace))
    return tuple(sorted(seen, key=lambda each: each.name))


async def _latest(database: Database, delivery: Delivery, tenant_id: UUID) -> tuple[View, list[tuple[str, DiscoveryState]]]:
    """For each site and discovery what was said last: the nodes of a site see the same clusters."""
    view = (await delivery.cache(tenant_id)).view
    site_of = {node.id: site_id for site_id, own in view.fleet.live.items() if site_id in view.sites for node in own}
    async with database.sessions(tenant_id) as session:
        states = await observations.discoveries(session, tenant_id, site_of)
    last: dict[tuple[str, str], DiscoveryState] = {}
    for state in sorted(states, key=lambda state: state.reported_at):
        last[site_of[state.node_id], state.discovery] = state
    return view, [(site_id, state) for (site_id, _), state in last.items()]


def _in(view: View, site_id: str, state: DiscoveryState) -> Iterator[Found]:
    for each in state.services:
        service = DiscoveredService.model_validate(each)
        identity = f"{site_id}/{state.discovery}/{service.cluster_id}/{service.namespace}/{service.name}"
        suffix = hashlib.sha256(identity.encode()).hexdigest()[:10]
        yield Found(f"{service.name[:52]}-{suffix}", view.sites[site_id], state.discovery, service)


def _is_seen(view: View, found: Found, namespace: str) -> bool:
    """Everywhere, unless its discovery maps to certain namespaces. Which of those is for the agent, which knows how to match safely."""
    if found.discovery == IN_CLUSTER:
        return True
    discovery = view.intent.of("discovery").get(Key(*found.discovery.split("/", 1)))
    targets = _targets(discovery) if discovery else frozenset()
    return not targets or namespace in targets


def _targets(discovery: Stored[Any]) -> frozenset[str]:
    mapping = discovery.spec.discovery_k8s.namespace_mapping if discovery.spec.discovery_k8s else None
    return frozenset(item.namespace for item in mapping.items) if mapping else frozenset()
