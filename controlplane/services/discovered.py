"""Services that sites found in their clusters: what origin pools can name."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import UUID

from agent.protocol.report import DiscoveredService
from controlplane.resources.base import Key, Stored
from controlplane.resources.selector import Selector
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
    """A service as one site sees it. Most of many thousands are only counted or skipped, so each is read when it is looked at."""

    site: Stored[Any]
    discovery: str
    """Key of the discovery, or `in-cluster`."""
    reported: dict[str, Any]
    """A `DiscoveredService`, as JSON."""

    @cached_property
    def name(self) -> str:
        """Of the object: the service's own with a suffix that makes it unique, the same as long as the service is there."""
        service = self.reported
        identity = f"{self.site.uid}/{self.discovery}/{service['cluster_id']}/{service['namespace']}/{service['name']}"
        return f"{service['name'][:52]}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"

    @cached_property
    def service(self) -> DiscoveredService:
        return DiscoveredService.model_validate(self.reported)


@dataclass(frozen=True)
class Wanted:
    """What is given has to match."""

    site: str | None = None
    """Name."""
    cluster_id: str | None = None
    service_namespace: str | None = None
    service: str | None = None
    labels: Selector | None = None

    def has(self, found: Found) -> bool:
        said = {"cluster_id": self.cluster_id, "namespace": self.service_namespace, "name": self.service}
        if self.site not in (None, found.site.metadata.name) or any(
            value not in (None, found.reported[name]) for name, value in said.items()
        ):
            return False
        return self.labels is None or self.labels.matches(found.reported["labels"])


async def services(database: Database, delivery: Delivery, tenant_id: UUID, namespace: str, wanted: Wanted) -> tuple[Found, ...]:
    """Those that a namespace may see, by name."""
    view, states = await _latest(database, delivery, tenant_id)
    seen = (state for state in states if namespace == ALL or _is_seen(view, state[1].discovery, namespace))
    found = (Found(view.sites[site_id], state.discovery, service) for site_id, state in seen for service in state.services or ())
    return tuple(sorted(filter(wanted.has, found), key=lambda each: each.name))


async def _latest(database: Database, delivery: Delivery, tenant_id: UUID) -> tuple[View, list[tuple[str, DiscoveryState]]]:
    """For each site and discovery what was said last: the nodes of a site see the same clusters. What is said of a discovery that is gone counts no more."""
    view = (await delivery.cache(tenant_id)).view
    known = {IN_CLUSTER, *map(str, view.intent.of("discovery"))}
    site_of = {node.id: site_id for site_id, own in view.fleet.live.items() if site_id in view.sites for node in own}
    async with database.sessions(tenant_id) as session:
        states = await observations.discoveries(session, tenant_id, site_of)
    last: dict[tuple[str, str], DiscoveryState] = {}
    for state in sorted(
        (state for state in states if state.services is not None and state.discovery in known), key=lambda state: state.reported_at
    ):
        last[site_of[state.node_id], state.discovery] = state
    return view, [(site_id, state) for (site_id, _), state in last.items()]


def _is_seen(view: View, discovery: str, namespace: str) -> bool:
    """Everywhere, unless the discovery maps to certain namespaces. Which of those is for the agent, which knows how to match safely."""
    if discovery == IN_CLUSTER:
        return True
    targets = _targets(view.intent.of("discovery")[Key(*discovery.split("/", 1))])
    return not targets or namespace in targets


def _targets(discovery: Stored[Any]) -> frozenset[str]:
    mapping = discovery.spec.discovery_k8s.namespace_mapping if discovery.spec.discovery_k8s else None
    return frozenset(item.namespace for item in mapping.items) if mapping else frozenset()
