"""Who of a site's nodes leads in their cluster, and which of them live: by Leases.

Clocks of nodes are not compared: a Lease has run out when this node has seen no change of it for that long.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from lightkube.models.coordination_v1 import LeaseSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.coordination_v1 import Lease
from msgspec.structs import replace

from agent.cluster import CONFLICT, Cluster, ObjectRefused
from agent.discovery.kubeconfig import ClusterAccess
from agent.published import NODE, Publisher

LEASE_S = 30


@dataclass
class Leases:
    """Of one site, in one namespace."""

    who: Publisher
    clock: Callable[[], float] = time.monotonic
    _seen: dict[str, tuple[str, float]] = field(default_factory=dict, init=False)
    """By name: the last version, and since when it has been that."""

    async def renew(self, cluster: Cluster, namespace: str) -> bool:
        """Say that this node lives; whether it leads."""
        await self._hold(cluster, namespace, f"isthmus-{self.who.node_id}", self.who.node_labels)
        return await self._hold(cluster, namespace, f"isthmus-{self.who.site_id}", self.who.site_labels)

    async def living(self, cluster: Cluster, namespace: str) -> frozenset[str]:
        """Ids of the site's nodes; the Leases of the others are taken away."""
        found = set()
        for lease in await cluster.listed(Lease, self.who.site_labels, namespace):
            node = _labels(lease).get(NODE)
            if node and self._has_run_out(lease):
                await _quietly_delete(cluster, lease)
            elif node:
                found.add(node)
        return frozenset(found)

    async def lead(self, cluster: Cluster, namespace: str, duty: str) -> bool:
        """Whether this node holds the site's Lease for that duty, and not another."""
        return await self._hold(cluster, namespace, f"isthmus-{self.who.site_id}-{duty}", self.who.site_labels)

    async def resign(self, cluster: Cluster, namespace: str, duty: str) -> None:
        await self._let_go(cluster, namespace, f"isthmus-{self.who.site_id}-{duty}")

    async def release(self, cluster: Cluster, namespace: str) -> None:
        """Of this node: others need not wait for them to run out."""
        for name in (f"isthmus-{self.who.node_id}", f"isthmus-{self.who.site_id}"):
            await self._let_go(cluster, namespace, name)

    async def _let_go(self, cluster: Cluster, namespace: str, name: str) -> None:
        lease = await cluster.get(Lease, name, namespace)
        if lease and lease.spec and lease.spec.holderIdentity == self.who.node_id:
            await _quietly_delete(cluster, lease)

    async def _hold(self, cluster: Cluster, namespace: str, name: str, labels: Mapping[str, str]) -> bool:
        """Take or renew a Lease; False if another node has it, or was quicker."""
        lease = await cluster.get(Lease, name, namespace)
        now = datetime.fromtimestamp(time.time(), UTC)
        # The API wants all six digits, and zeros would be left out.
        now = now.replace(microsecond=now.microsecond or 1)
        mine = LeaseSpec(holderIdentity=self.who.node_id, leaseDurationSeconds=LEASE_S, acquireTime=now, renewTime=now)
        try:
            if lease is None:
                await cluster.create(Lease(metadata=ObjectMeta(name=name, namespace=namespace, labels=dict(labels)), spec=mine))
            elif lease.spec and lease.spec.holderIdentity == self.who.node_id:
                await cluster.replace(replace(lease, spec=replace(lease.spec, renewTime=now)))
            elif self._has_run_out(lease):
                await cluster.replace(replace(lease, spec=mine))
            else:
                return False
        except ObjectRefused as refusal:
            if refusal.status != CONFLICT:
                raise
            return False
        return True

    def _has_run_out(self, lease: Lease) -> bool:
        assert lease.metadata is not None
        name, version = lease.metadata.name or "", lease.metadata.resourceVersion or ""
        if self._seen.get(name, ("", 0.0))[0] != version:
            self._seen[name] = (version, self.clock())
        held = lease.spec is not None and bool(lease.spec.holderIdentity)
        return not held or self.clock() > self._seen[name][1] + LEASE_S


def home(access: ClusterAccess) -> str:
    """Where Leases are kept."""
    return access.namespace or "default"


async def _quietly_delete(cluster: Cluster, lease: Lease) -> None:
    """Unless it has changed meanwhile, and so lives."""
    try:
        await cluster.delete(lease)
    except ObjectRefused as refusal:
        if refusal.status != CONFLICT:
            raise


def _labels(lease: Lease) -> Mapping[str, str]:
    return (lease.metadata.labels if lease.metadata else None) or {}
